"""Every command on encrypted images, with QEMU as the judge of what they make and change."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qcowfs as qcowfs_library
from qcowfs import Keys, OpenOptions
from qcowfs.errors import BadPassphrase
from tests.e2e.encrypted import PASSPHRASE, Locked, locked
from tests.e2e.mounts import mounted
from tests.e2e.test_encryption import spoken
from tests.e2e.tools import (
    KIB,
    MIB,
    QCOWFS,
    Word,
    assert_same,
    create,
    qcowfs,
    qemu_info,
    raw_file,
    run,
    until,
)
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


@pytest.mark.parametrize("words", [(), ("--encrypt", "luks")], ids=["of the source", "of the copy"])
def test_an_interrupt_ends_the_question_for_a_passphrase(words: tuple[str, ...], tmp_path: Path) -> None:
    source = raw_file(tmp_path / "a.raw", SIZE, "a") if words else locked(tmp_path, "a", SIZE).image
    pid, terminal = pty.fork()
    if pid == 0:
        command = [*QCOWFS, "convert", *words, str(source), str(tmp_path / "copy.qcow2")]
        os.execv(sys.executable, command)  # noqa: S606 - the child of a fork
    spoken(terminal, b": ")
    os.write(terminal, b"\x03")
    status: list[int] = []

    def has_ended() -> bool:
        ended, how = os.waitpid(pid, os.WNOHANG)
        status.extend([how] if ended else [])
        return bool(ended)

    try:
        until(has_ended)
    finally:
        if not status:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status[0]) == 130
    os.close(terminal)
    assert not (tmp_path / "copy.qcow2").exists()


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


# -- reading without a mount


def test_disks_are_compared_and_mapped_by_their_passphrases(tmp_path: Path) -> None:
    first, twin = filled(tmp_path, "a")
    second = made_by_us(tmp_path)
    second.fill(twin)
    keys = ("--key-file", second.key, "--key-file", f"a.qcow2={first.key}")
    assert ok("compare", *keys, first.image, second.image) == "Images are identical.\n"
    second.io("write -q -P 9 70000 1")
    result = qcowfs("compare", *keys, first.image, second.image)
    assert (result.returncode, result.stdout) == (1, f"Content mismatch at offset {70000 // 512 * 512}!\n")
    records = json.loads(ok("map", "--json", *keys[:2], second.image))
    words = ("map", "--output=json", *second.secrets(), "--image-opts", second.options())
    theirs = json.loads(run("qemu-img", *words).stdout)
    keep = ("start", "length", "depth", "data", "offset")
    assert [{k: r.get(k) for k in keep} for r in records] == [{k: r.get(k) for k in keep} for r in theirs]
    sizes = json.loads(ok("measure", "-O", "qcow2", "--json", *keys[:2], second.image))
    assert sizes["required"] < sizes["fully-allocated"]


def test_python_programs_give_the_passphrases(tmp_path: Path) -> None:
    below, twin = filled(tmp_path, "base")
    made = locked(tmp_path, "top", SIZE, backing_file=below.image, backing_fmt="qcow2")
    keys = {"base.qcow2": below.key.read_bytes()}
    with qcowfs_library.open(made.image, mode="r+", key=made.key.read_bytes(), keys=keys) as disk:
        assert disk.read(SIZE) == twin.read_bytes()
        disk.write_at(b"new", 1000)
    with twin.open("r+b") as file:
        file.seek(1000)
        file.write(b"new")
    Locked(made.image, made.key, below).assert_sound_and_same(twin)
    options = OpenOptions(keys=Keys(keys, made.key.read_bytes()))
    with qcowfs_library.open(made.image, options=options) as disk:
        assert disk.read(SIZE) == twin.read_bytes()
    with pytest.raises(BadPassphrase, match="opens none of the image's key slots"):
        qcowfs_library.open(made.image, key=b"wrong", keys=keys)


# -- compressed clusters, which are never encrypted


def test_compressed_clusters_in_an_encrypted_image(tmp_path: Path) -> None:
    _, twin = filled(tmp_path)
    made = made_by_us(tmp_path)
    made.fill_compressed(twin)
    assert "0 compressed" not in ok("check", "--data", made.image)
    raw = tmp_path / "out.raw"
    ok("convert", "--key-file", made.key, made.image, raw)
    assert_same(raw, twin)
    with mounted(made.image, "--key-file", made.key, writable=True) as mount:
        assert_same(mount.disk, twin)
        write_to_both(mount.disk, twin, "compressed", 12)
        assert_same(mount.disk, twin)
    made.assert_sound_and_same(twin)
    ok("check", "--data", made.image)


# -- commit and rebase


@dataclass(frozen=True)
class Chain:
    """A plain or encrypted image or raw disk, and what lies below it."""

    image: Path
    key: Path | None
    format: str
    below: Chain | None = None

    @property
    def key_words(self) -> list[Word]:
        return [] if self.key is None else ["--key-file", f"{self.image.name}={self.key}"]

    @property
    def keys(self) -> list[Word]:
        return self.key_words + ([] if self.below is None else self.below.keys)

    def wrong_keys(self, wrong: Path) -> list[list[Word]]:
        """The options of the chain with each passphrase in turn a wrong one."""
        keys = self.keys
        return [
            [*keys[:n], f"{str(keys[n]).partition('=')[0]}={wrong}", *keys[n + 1 :]]
            for n in range(1, len(keys), 2)
        ]

    def secrets(self, number: int = 0) -> list[str]:
        own = [] if self.key is None else ["--object", f"secret,id=key{number},file={self.key}"]
        return own + ([] if self.below is None else self.below.secrets(number + 1))

    def options(self, prefix: str = "", number: int = 0) -> str:
        words = f"{prefix}driver={self.format},{prefix}file.filename={self.image}"
        if self.key is not None:
            words += f",{prefix}encrypt.key-secret=key{number}"
        if self.below is None:
            return words
        return f"{words},{self.below.options(f'{prefix}backing.', number + 1)}"

    def as_raw(self, raw: Path, *, below: bool = False) -> Path:
        """What QEMU reads of the chain or of what lies below."""
        if below and self.below is not None:
            return self.below.as_raw(raw)
        run("qemu-img", "convert", "-O", "raw", *self.secrets(), "--image-opts", self.options(), raw)
        return raw

    def check(self) -> None:
        """Fail unless QEMU finds every image sound."""
        if self.format == "qcow2":
            run("qemu-img", "check", *self.secrets(), "--image-opts", self.options())
        if self.below is not None:
            self.below.check()

    def stored(self) -> list[bytes]:
        """The bytes of every file."""
        return [self.image.read_bytes(), *([] if self.below is None else self.below.stored())]


def base(folder: Path, name: str, kind: str) -> Chain:
    """A disk with content of its own."""
    if kind == "raw":
        return Chain(raw_file(folder / f"{name}.raw", SIZE, name), None, "raw")
    made, _ = filled(folder, name, kind)
    return Chain(made.image, made.key, "qcow2")


def overlay(folder: Path, below_kind: str, top_kind: str) -> Chain:
    """An image with some content upon another disk."""
    below = base(folder, "base", below_kind)
    backing: dict[str, Any] = {"backing_file": below.image, "backing_fmt": below.format}
    if top_kind == "plain":
        image = create(folder / "top.qcow2", SIZE, "-u", **backing)
        chain = Chain(image, None, "qcow2", below)
    else:
        made = locked(folder, "top", SIZE, top_kind, **backing)
        chain = Chain(made.image, made.key, "qcow2", below)
    words = ["write -q -P 7 100 70001", f"write -q -z {MIB // 2} 200000", "write -q -P 9 3000000 1000"]
    commands = [word for command in words for word in ("-c", command)]
    result = run("qemu-io", *chain.secrets(), *commands, "--image-opts", chain.options())
    assert "failed" not in result.stdout, result.stdout
    return chain


def assert_refused_unchanged(chain: Chain, command: str, *words: Word) -> None:
    """Fail unless a wrong passphrase is one line and every file stays as it was."""
    before = chain.stored()
    result = qcowfs(command, *words, chain.image)
    assert (result.returncode, result.stderr.count("\n")) == (8, 1), result.stderr
    assert chain.stored() == before


@pytest.mark.parametrize("below_kind", ["luks", "aes", "raw"])
@pytest.mark.parametrize("top_kind", ["luks", "plain"])
def test_an_overlay_is_committed(below_kind: str, top_kind: str, tmp_path: Path) -> None:
    chain = overlay(tmp_path, below_kind, top_kind)
    twin = chain.as_raw(tmp_path / "twin")
    (tmp_path / "wrong").write_bytes(b"wrong")
    if below_kind != "aes":  # which cannot tell
        for wrong in chain.wrong_keys(tmp_path / "wrong"):
            assert_refused_unchanged(chain, "commit", *wrong)
    commit = qcowfs("commit", *chain.keys, chain.image)
    assert commit.returncode == 0, commit.stderr
    assert_same(chain.as_raw(tmp_path / "after"), twin)
    assert_same(chain.as_raw(tmp_path / "below", below=True), twin)
    chain.check()


@pytest.mark.parametrize("top_kind", ["luks", "plain"])
@pytest.mark.parametrize("new_kind", ["luks", "aes", "raw", ""])
def test_an_overlay_is_put_on_another_backing_file(new_kind: str, top_kind: str, tmp_path: Path) -> None:
    chain = overlay(tmp_path, "luks", top_kind)
    twin = chain.as_raw(tmp_path / "twin")
    new = None if not new_kind else base(tmp_path, "new", new_kind)
    words: list[Word] = ["-b", "", *chain.keys]
    if new is not None:
        words = ["-b", new.image.name, "-F", new.format, *chain.keys, *new.key_words]
        (tmp_path / "wrong").write_bytes(b"wrong")
        if new_kind == "luks":
            wrong = ("--key-file", f"new.qcow2={tmp_path / 'wrong'}")
            assert_refused_unchanged(chain, "rebase", "-b", "new.qcow2", "-F", "qcow2", *chain.keys, *wrong)
    result = qcowfs("rebase", *words, chain.image)
    assert result.returncode == 0, result.stderr
    after = Chain(chain.image, chain.key, chain.format, new)
    assert_same(after.as_raw(tmp_path / "after"), twin)
    after.check()


# -- snapshots and sizes


def test_snapshots_and_sizes_of_an_image_that_nobody_has_open(tmp_path: Path) -> None:
    made, twin = filled(tmp_path)
    key = ("--key-file", made.key)
    result = qcowfs("snapshot", "create", made.image, "then", start_new_session=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    ok("snapshot", "create", *key, made.image, "then")
    made.io("write -q -P 5 0 100000")
    assert_same(made.as_raw(tmp_path / "then", "-l", "then"), twin)
    ok("snapshot", "revert", *key, made.image, "then")
    made.assert_sound_and_same(twin)
    ok("snapshot", "rename", *key, made.image, "then", "once")
    ok("resize", *key, made.image, "+1M")
    grown = tmp_path / "grown"
    grown.write_bytes(twin.read_bytes() + bytes(MIB))
    made.assert_sound_and_same(grown)
    ok("snapshot", "delete", *key, made.image, "once")
    assert ok("snapshot", "list", made.image) == ""
    ok("resize", *key, "--shrink", made.image, str(SIZE - 700 * 512))
    grown.write_bytes(twin.read_bytes()[: SIZE - 700 * 512])
    made.assert_sound_and_same(grown)


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_snapshots_and_sizes_of_a_mounted_image_need_no_passphrase(kind: str, tmp_path: Path) -> None:
    made, then = filled(tmp_path, kind=kind)
    now = tmp_path / "now"
    now.write_bytes(then.read_bytes())
    with mounted(made.image, "--key-file", made.key, writable=True) as mount:
        mount.take_complaints()
        ok("snapshot", "create", mount.folder, "then")
        write_to_both(mount.disk, now, kind, 10)
        assert_same(mount.disk, now)
        assert_same(mount.snapshot("then"), then)
        ok("resize", made.image, str(SIZE + MIB))
        with now.open("r+b") as file:
            file.truncate(SIZE + MIB)
        assert_same(mount.disk, now)
        with mount.disk.open("r+b", buffering=0) as disk, now.open("r+b") as file:
            for each in (disk, file):
                each.seek(SIZE - 100)
                each.write(b"over the old end" * 20)
        assert_same(mount.disk, now)
        ok("snapshot", "create", made.image, "later")
        ok("snapshot", "revert", mount.folder, "then")
        assert_same(mount.disk, then)
        assert_same(mount.snapshot("later"), now)
    made.assert_sound_and_same(then)
    os.truncate(now, SIZE)  # QEMU cuts a snapshot where the live disk ends
    assert_same(made.as_raw(tmp_path / "later", "-l", "later"), now)
