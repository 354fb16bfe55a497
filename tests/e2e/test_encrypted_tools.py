"""Every command on encrypted images, with QEMU as the judge of what they make and change."""

from __future__ import annotations

import json
import os
import pty
import sys
from pathlib import Path

import pytest

from tests.e2e.encrypted import PASSPHRASE, Locked, locked
from tests.e2e.mounts import mounted
from tests.e2e.test_encryption import spoken
from tests.e2e.tools import KIB, MIB, QCOWFS, Word, assert_same, qcowfs, qemu_info, raw_file, run
from tests.e2e.writes import write_to_both

SIZE = 3 * MIB + 5 * 512
QUICK = ("--iter-time", "1")
NOISE = "with encryption needs compat=v3, for what nobody wrote would read as noise"
CHOICES = {
    "default": ((), ("aes-256", "xts", "plain64", "sha256")),
    "aes-128-cbc": (
        ("--cipher-alg", "aes-128", "--cipher-mode", "cbc", "--ivgen-alg", "essiv", "--hash-alg", "sha1"),
        ("aes-128", "cbc", "essiv", "sha1"),
    ),
    "cast5": (
        (
            "-o",
            "encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain,cluster_size=2M",
        ),
        ("cast5-128", "cbc", "plain", "sha256"),
    ),
    "aes-192-512": (
        ("-o", "encrypt.cipher-alg=aes-192,cluster_size=512,refcount_bits=1"),
        ("aes-192", "xts", "plain64", "sha256"),
    ),
    "v2": (("-o", "compat=v2,encrypt.hash-alg=sha512"), ("aes-256", "xts", "plain64", "sha512")),
}


def key_in(folder: Path, name: str = "key") -> Path:
    key = folder / name
    key.write_bytes(PASSPHRASE + name.encode())
    return key


def ok(*words: Word) -> str:
    """What the command under test says when it succeeds, without a complaint."""
    result = qcowfs(*words)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def made_by_us(folder: Path, *words: Word) -> Locked:
    made = Locked(folder / "ours.qcow2", key_in(folder))
    ok("create", "-q", "--encrypt", "luks", *QUICK, "--key-file", made.key, *words, made.image, str(SIZE))
    return made


def zeros(folder: Path, size: int = SIZE) -> Path:
    path = folder / "zeros"
    path.write_bytes(bytes(size))
    return path


# -- create


@pytest.mark.parametrize("name", CHOICES)
def test_an_image_that_we_encrypt_is_qemus_too(name: str, tmp_path: Path) -> None:
    words, expected = CHOICES[name]
    made = made_by_us(tmp_path, *words)
    record = qemu_info(made.image)["format-specific"]["data"]["encrypt"]
    keys = ("cipher-alg", "cipher-mode", "ivgen-alg", "hash-alg")
    assert tuple(record[key] for key in keys) == expected
    made.assert_sound_and_same(zeros(tmp_path))
    twin = raw_file(tmp_path / "twin", SIZE, name)
    made.fill(twin)
    with mounted(made.image, "--key-file", made.key, writable=True) as mount:
        assert_same(mount.disk, twin)
        write_to_both(mount.disk, twin, name, 10)
        assert_same(mount.disk, twin)
    made.assert_sound_and_same(twin)
    assert ok("check", made.image).startswith("no errors were found")


@pytest.mark.parametrize("kind", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("more", ["", ",extended_l2=on,cluster_size=16k", ",data_file=data"])
def test_space_set_aside_reads_as_zeros(
    kind: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = made_by_us(tmp_path, "-o", f"preallocation={kind}{more}")
    made.assert_sound_and_same(zeros(tmp_path))
    if "data_file" not in more:
        end = made.image.stat().st_size
        made.io(f"write -q -P 7 100 {2 * MIB}")
        assert made.image.stat().st_size == end
    run("qemu-img", "check", *made.secrets(), "--image-opts", made.options())


def test_an_encrypted_overlay_takes_the_size_of_an_encrypted_backing_file(tmp_path: Path) -> None:
    below = locked(tmp_path, "base", SIZE)
    below.fill(raw_file(tmp_path / "content", SIZE, "base"))
    made = Locked(tmp_path / "top.qcow2", key_in(tmp_path), below)
    keys = ("--key-file", made.key, "--key-file", f"base.qcow2={below.key}")
    words = ("create", "--encrypt", "luks", *QUICK, *keys, "-b", "base.qcow2", "-F", "qcow2", made.image)
    assert ok(*words) == f"{made.image}: made a disk of {SIZE} bytes, in clusters of 65536\n"
    made.assert_sound_and_same(tmp_path / "content")


REFUSED = {
    "-o encrypt.format=aes": "encrypt.format=aes: must be one of luks",
    "--cipher-alg aes-128": "encrypt.cipher-alg: needs encrypt.format=luks",
    "--encrypt luks --hash-alg rot13": "encrypt.hash-alg=rot13: must be one of sha1, sha224",
    "--encrypt luks -o encrypt.key-secret=s": "encrypt.key-secret: there are no secret objects here",
    "--encrypt luks -o encrypt.made=up": "'encrypt.made' is no creation option; of encryption there are:",
    "--encrypt luks --cipher-alg cast5-128": "encrypt.cipher-alg=cast5-128: needs encrypt.cipher-mode=cbc",
    "--encrypt luks --iter-time 0": "encrypt.iter-time=0: must be 1 or more milliseconds",
    "--encrypt luks --iter-time 1s": "encrypt.iter-time=1s: must be a number of milliseconds",
    "--encrypt luks -o compat=v2,preallocation=full": f"preallocation=full: {NOISE}",
    "--encrypt luks -o data_file=d,data_file_raw=on": "data_file_raw=on: an encrypted data file",
    "--encrypt luks --key-file /dev/null": "an encrypted image needs a passphrase that is not empty",
    "--encrypt luks": "image.qcow2: is encrypted (LUKS); give its passphrase by --key-file FILE",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_encrypted_is_one_clear_line(words: str, tmp_path: Path) -> None:
    result = qcowfs("create", *words.split(), "image.qcow2", "1M", cwd=tmp_path, start_new_session=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"qcowfs: {REFUSED[words]}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("same", [True, False])
def test_the_terminal_is_asked_twice_for_a_new_passphrase(same: bool, tmp_path: Path) -> None:
    made = Locked(tmp_path / "image.qcow2", key_in(tmp_path))
    pid, terminal = pty.fork()
    if pid == 0:
        words = [*QCOWFS, "create", "--encrypt", "luks", *QUICK, str(made.image), str(SIZE)]
        os.execv(sys.executable, words)  # noqa: S606 - the child of a fork
    said = b""
    for number in range(2):
        said += spoken(terminal, b": ")
        os.write(terminal, made.key.read_bytes() + (b"" if same or not number else b"x") + b"\n")
    said += spoken(terminal, b"65536\r\n" if same else b"changed\r\n")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert (os.waitstatus_to_exitcode(status), PASSPHRASE in said) == (0 if same else 2, False)
    assert made.image.exists() == same
    if same:
        made.assert_sound_and_same(zeros(tmp_path))


# -- convert


def filled(folder: Path, name: str = "a", kind: str = "luks") -> tuple[Locked, Path]:
    """An encrypted image with content, and that content as a raw file."""
    made = locked(folder, name, SIZE, kind)
    made.fill(raw_file(folder / f"{name}.raw", SIZE, name))
    made.io(f"write -q -z {MIB} 200000", f"discard -q {2 * MIB} 65536")
    return made, made.as_raw(folder / f"{name}.raw")


@pytest.mark.parametrize(
    ("form", "compress"),
    [
        ("", False),
        ("", True),
        (",preallocation=metadata", False),
        (",preallocation=full,extended_l2=on", False),
    ],
)
def test_a_copy_is_encrypted_by_its_own_passphrase(form: str, compress: bool, tmp_path: Path) -> None:
    source, twin = filled(tmp_path)
    made = Locked(tmp_path / "copy.qcow2", key_in(tmp_path))
    options = ("--encrypt", "luks", "-o", f"encrypt.iter-time=1,encrypt.hash-alg=sha1{form}")
    keys = ("--key-file", made.key, "--key-file", f"a.qcow2={source.key}")
    ok("convert", *(["-c"] if compress else []), *options, *keys, source.image, made.image)
    made.assert_sound_and_same(twin)
    stored = made.image.read_bytes()
    secret = twin.read_bytes()
    random = [secret[n : n + 32] for n in range(0, SIZE, 64 * KIB) if any(secret[n : n + 32])]
    assert compress or not any(part in stored for part in random)


def test_an_encrypted_disk_is_copied_plain(tmp_path: Path) -> None:
    for kind in ("luks", "aes"):
        source, twin = filled(tmp_path, kind, kind)
        source.take_snapshot("then")
        source.io("write -q -P 9 0 70000")
        for words in (("--snapshot", "then"), ()):
            raw, image = tmp_path / "out.raw", tmp_path / "out.qcow2"
            for target in (raw, image):
                result = qcowfs("convert", *words, "--force", "--key-file", source.key, source.image, target)
                assert result.returncode == 0, result.stderr
            expected = twin if words else source.as_raw(tmp_path / "now")
            assert_same(raw, expected)
            run("qemu-img", "compare", "-F", "raw", image, expected)


MEASURED_BY_QEMU = {
    "": (2424832, 6619136),
    ",encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc": (917504, 5111808),
    ",preallocation=full": (6619136, 6619136),
}
"""Required and fully allocated size for 4 MiB by QEMU 7.2, whose own run at times never ends."""


@pytest.mark.parametrize("options", MEASURED_BY_QEMU)
def test_measuring_counts_the_luks_area_as_qemu_does(options: str) -> None:
    form = f"encrypt.format=luks{options}"
    record = json.loads(ok("measure", "-O", "qcow2", "--size", "4M", "--json", "-o", form))
    assert (record["required"], record["fully-allocated"]) == MEASURED_BY_QEMU[options]


def test_what_is_measured_is_what_a_full_image_takes(tmp_path: Path) -> None:
    form = "cluster_size=512,preallocation=full"
    made = made_by_us(tmp_path, "-o", form)  # QEMU forgets what counts the clusters of the LUKS area
    words = ("measure", "-O", "qcow2", "--size", str(SIZE), "--json", "-o", f"{form},encrypt.format=luks")
    assert json.loads(ok(*words))["fully-allocated"] == made.image.stat().st_size
