"""Encrypted images: read, written and refused as QEMU does, with passphrases that show nowhere."""

from __future__ import annotations

import os
import pty
import select
import sys
from pathlib import Path

import pytest

from tests.e2e.encrypted import PASSPHRASE, Locked, locked
from tests.e2e.mounts import daemon_of, loop_mounted, mounted, refusal
from tests.e2e.tools import KIB, MIB, QCOWFS, as_raw, assert_same, create, qcowfs, raw_file, run
from tests.e2e.writes import write_to_both

SIZE = 3 * MIB + 5 * 512
LEGACY = "legacy AES cannot tell a wrong passphrase; with one, everything is noise"


def luks(
    cipher: str, mode: str, key_bits: int, hash_name: str = "sha256", **fields: object
) -> dict[str, object]:
    volume = {"cipher": cipher, "mode": mode, "key_bytes": key_bits // 8, "hash_name": hash_name}
    return {"volume": volume, **fields}


KINDS: dict[str, dict[str, object]] = {
    "aes-128-xts": luks("aes", "xts-plain64", 256, "sha1"),
    "aes-192-xts": luks("aes", "xts-plain64", 384, cluster_size=512),
    "aes-256-xts": luks("aes", "xts-plain64", 512, "sha512", cluster_size="2M"),
    "aes-128-cbc": luks("aes", "cbc-plain64", 128, "ripemd160"),
    "aes-256-cbc": luks("aes", "cbc-plain64", 256, compat="0.10"),
    "aes-256-cbc-plain": luks("aes", "cbc-plain", 256, "sha224"),
    "aes-128-cbc-essiv": luks("aes", "cbc-essiv:sha256", 128, "sha384"),
    "aes-256-cbc-essiv": luks("aes", "cbc-essiv:sha256", 256, extended_l2="on", cluster_size="16k"),
    "aes-256-xts-essiv": luks("aes", "xts-essiv:sha256", 512),
    "cast5-128-cbc": luks("cast5", "cbc-plain64", 128),
    "legacy": {"kind": "aes"},
    "legacy-512": {"kind": "aes", "cluster_size": 512},
}


@pytest.mark.parametrize(("kind", "options"), [("luks", []), ("aes", [LEGACY])])
def test_an_image_that_qemu_encrypted_opens(
    kind: str, options: list[str], encrypted_images: dict[str, Path], tmp_path: Path
) -> None:
    made = Locked(tmp_path / "image.qcow2", tmp_path / "key")
    made.key.write_bytes(b"passphrase")
    made.image.write_bytes(encrypted_images[kind].read_bytes())
    twin = raw_file(tmp_path / "twin", MIB, kind)
    made.fill(twin)
    with mounted(made.image, "--key-file", made.key, writable=True) as mount:
        write_to_both(mount.disk, twin, kind, 5)
        assert_same(mount.disk, twin)
        assert [text.partition(": ")[2] for text in mount.take_complaints()] == options
    made.assert_sound_and_same(twin)


@pytest.mark.parametrize("name", KINDS)
def test_each_cipher_is_read_as_qemu_wrote_it_and_the_other_way_round(name: str, tmp_path: Path) -> None:
    made = locked(tmp_path, name, SIZE, **KINDS[name])  # type: ignore[arg-type]
    twin = raw_file(tmp_path / "twin", SIZE, name)
    made.fill(twin)
    made.take_snapshot("then")
    then = made.as_raw(tmp_path / "then", "-l", "then")
    made.io("write -q -P 7 100 70001", f"write -q -z {MIB} 200000", f"discard -q {2 * MIB} 65536")
    made.as_raw(twin)
    with mounted(made.image, "--key-file", made.key, writable=True) as mount:
        assert_same(mount.disk, twin)
        assert_same(mount.snapshot("then"), then)
        write_to_both(mount.disk, twin, name, 14)
        assert_same(mount.disk, twin)
        assert_same(mount.snapshot("then"), then)
        assert all(text.endswith(LEGACY) for text in mount.take_complaints())
    made.assert_sound_and_same(twin)
    assert_same(made.as_raw(tmp_path / "again", "-l", "then"), then)


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_each_image_of_a_chain_has_its_own_passphrase(kind: str, tmp_path: Path) -> None:
    base = locked(tmp_path, "base", SIZE, "luks")
    base.fill(raw_file(tmp_path / "content", SIZE, "base"))
    made = locked(tmp_path, "top", SIZE, kind, backing_file=base.image, backing_fmt="qcow2")
    made = Locked(made.image, made.key, base)
    made.io("write -q -P 7 100 70001", f"write -q -z {MIB} 200000")
    twin = made.as_raw(tmp_path / "twin")
    keys = ("--key-file", made.key, "--key-file", f"base.qcow2={base.key}")
    with mounted(made.image, *keys, writable=True) as mount:
        assert_same(mount.disk, twin)
        write_to_both(mount.disk, twin, kind, 10)
        mount.take_complaints()
    made.assert_sound_and_same(twin)
    result = refusal(made.image, tmp_path / "here", "--key-file", made.key)
    assert result.returncode == 8
    assert f"{base.image} (backing file of {made.image}): the passphrase opens none" in result.stderr


def test_an_external_data_file_is_encrypted_too(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = locked(tmp_path, "a", SIZE, data_file=data)
    twin = raw_file(tmp_path / "twin", SIZE, "data file")
    made.fill(twin)
    options = ("--key-file", made.key, "--data-file", data)
    with mounted(made.image, *options, writable=True) as mount:
        write_to_both(mount.disk, twin, "data file", 10)
        assert_same(mount.disk, twin)
    made.assert_sound_and_same(twin)


def test_a_guests_file_system_in_luks_is_written(tmp_path: Path) -> None:
    made = locked(tmp_path, "guest", 24 * MIB)
    with mounted(made.image, "--key-file", made.key, writable=True) as mount:
        run("mkfs.ext4", "-q", mount.disk)
        with loop_mounted(mount.disk, tmp_path / "guest", writable=True) as root:
            for number in range(20):
                raw_file(root / f"file {number}", number * 9001, number)
    raw = made.as_raw(tmp_path / "raw")
    run("e2fsck", "-fn", raw)
    with loop_mounted(raw, tmp_path / "guest") as root:
        for number in range(20):
            assert_same(root / f"file {number}", raw_file(tmp_path / "expected", number * 9001, number))
    made.assert_sound_and_same(raw)


# -- passphrases


@pytest.mark.parametrize(
    ("content", "hint"),
    [(b"wrong", ""), (b"", ""), (PASSPHRASE + b"a\n", "; the newline at its end counts")],
)
def test_a_wrong_passphrase_is_one_clear_line(content: bytes, hint: str, tmp_path: Path) -> None:
    made = locked(tmp_path, "a", SIZE)
    wrong = tmp_path / "wrong"
    wrong.write_bytes(content)
    result = refusal(made.image, tmp_path / "here", "--key-file", wrong)
    text = f"qcowfs: {made.image}: the passphrase opens none of the image's key slots{hint}\n"
    assert (result.returncode, result.stderr) == (8, text)


@pytest.mark.parametrize(("kind", "name"), [("luks", "LUKS"), ("aes", "legacy AES")])
def test_without_a_passphrase_one_line_says_how_to_give_one(kind: str, name: str, tmp_path: Path) -> None:
    made = locked(tmp_path, "a", SIZE, kind)
    overlay = create(tmp_path / "overlay.qcow2", SIZE, "-u", "-b", made.image, "-F", "qcow2")
    advice = "give its passphrase by --key-file FILE, by --key-fd N, or as the systemd credential qcowfs.key"
    for image, shown in ((made.image, made.image), (overlay, f"{made.image} (backing file of {overlay})")):
        result = refusal(image, tmp_path / "here")
        assert (result.returncode, result.stderr) == (
            2,
            f"qcowfs: {shown}: is encrypted ({name}); {advice}\n",
        )


def test_a_descriptor_or_a_credential_may_hold_the_passphrase(tmp_path: Path) -> None:
    made = locked(tmp_path, "a", SIZE)
    (tmp_path / "here").mkdir()
    with made.key.open("rb") as file:
        words = ("mount", made.image, tmp_path / "here", "--key-fd", str(file.fileno()), "--dry-run")
        assert qcowfs(*words, pass_fds=(file.fileno(),)).returncode == 0
    rehearsal = ("mount", made.image, tmp_path / "here", "--dry-run")
    for name, code in (("qcowfs.key", 0), ("a.qcow2.key", 0), ("b.qcow2.key", 2)):
        folder = tmp_path / f"credentials-{name}"
        folder.mkdir()
        (folder / name).write_bytes(made.key.read_bytes())
        env = os.environ | {"CREDENTIALS_DIRECTORY": str(folder)}
        assert qcowfs(*rehearsal, env=env).returncode == code, name


@pytest.mark.parametrize("background", [False, True])
def test_the_terminal_is_asked_without_showing_what_is_typed(background: bool, tmp_path: Path) -> None:
    made = locked(tmp_path, "a", SIZE)
    folder = tmp_path / "here"
    folder.mkdir()
    pid, terminal = pty.fork()
    if pid == 0:
        words = [*QCOWFS, "mount", str(made.image), str(folder), *([] if background else ["--dry-run"])]
        os.execv(sys.executable, words)  # noqa: S606 - the child of a fork
    said = spoken(terminal, b": ")
    assert said.startswith(b"Passphrase of ")
    os.write(terminal, made.key.read_bytes() + b"\n")
    said = spoken(terminal, b"\n" if not background else b")\r\n")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    if background:
        run("umount", folder)
    assert (os.waitstatus_to_exitcode(status), PASSPHRASE in said) == (0, False)


def spoken(terminal: int, end: bytes) -> bytes:
    """What the terminal shows, up to an end."""
    said = b""
    while not said.endswith(end):
        assert select.select([terminal], [], [], 60)[0], said
        said += os.read(terminal, 1000)
    return said


def test_passphrases_show_neither_in_the_log_nor_among_the_processes(tmp_path: Path) -> None:
    made = locked(tmp_path, "a", SIZE)
    with mounted(made.image, "--key-file", made.key, "--debug", writable=True) as mount:
        raw_file(tmp_path / "raw", 64 * KIB, "secret")
        with mount.disk.open("r+b", buffering=0) as disk:
            disk.write((tmp_path / "raw").read_bytes())
            os.fsync(disk)
        seen = Path(f"/proc/{daemon_of(mount.folder)}/cmdline").read_bytes()
        seen += Path(f"/proc/{daemon_of(mount.folder)}/environ").read_bytes()
    seen += mount.log_file.read_bytes() + mount.errors.read_bytes()
    assert len(seen) > 0
    assert PASSPHRASE not in seen


def test_without_encryption_a_passphrase_is_not_needed_nor_in_the_way(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    (tmp_path / "key").write_bytes(b"key")
    with mounted(image, "--key-file", tmp_path / "key") as mount:
        assert_same(mount.disk, as_raw(image, tmp_path / "raw"))
        text = f"WARNING {image}: not encrypted; the passphrase given is not used"
        assert mount.take_complaints() == [text]
