"""Mounting without being root, by way of fusermount3."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import end, in_background, is_mounted, mounted
from tests.e2e.tools import MIB, QCOWFS, Result, Word, as_raw, attempt, create, qemu_io, run

NOBODY = 65534
AS_NOBODY = (
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
    # the interpreter may lie where only root gets; this lets it be read, and nothing else be done
    "--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search",
)  # fmt: skip
FUSE = Path("/dev/fuse")


@pytest.fixture
def fuse_mode() -> Iterator[None]:
    """Everybody may use FUSE, as on common distributions."""
    mode = FUSE.stat().st_mode & 0o7777
    FUSE.chmod(0o666)
    try:
        yield
    finally:
        FUSE.chmod(mode)


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that an ordinary user owns and gets at, which pytest's own are not."""
    home = Path(tempfile.mkdtemp(prefix="qcowfs-test-"))
    (home / "here").mkdir()
    image = create(home / "image.qcow2", MIB)
    qemu_io(image, "write -q -P 5 1234 70000")
    as_raw(image, home / "expected")
    for path in (home, *home.iterdir()):
        shutil.chown(path, NOBODY, NOBODY)
    try:
        yield home
    finally:
        if is_mounted(home / "here"):
            attempt("umount", "-l", home / "here")
        shutil.rmtree(home)


def as_nobody(*words: Word) -> Result:
    return attempt(*AS_NOBODY, *words)


@pytest.mark.usefixtures("fuse_mode")
def test_an_ordinary_user_mounts_reads_and_unmounts(home: Path) -> None:
    folder = home / "here"
    run(*AS_NOBODY, *QCOWFS, "mount", home / "image.qcow2", folder)
    try:
        seen = run(*AS_NOBODY, "stat", "--format", "%u %g %a %s", folder / "disk.raw").stdout
        assert seen == f"{NOBODY} {NOBODY} 600 {MIB}\n"
        run(*AS_NOBODY, "cmp", folder / "disk.raw", home / "expected")
        with pytest.raises(PermissionError):
            (folder / "disk.raw").stat()  # not even root may look in
    finally:
        result = as_nobody(*QCOWFS, "umount", folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert not is_mounted(folder)
    qemu_io(home / "image.qcow2", "write -q 0 1k")


@pytest.mark.usefixtures("fuse_mode")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_an_ended_daemon_of_an_ordinary_user_leaves_can_be_mounted_on_again(
    number: signal.Signals, home: Path
) -> None:
    folder, image = home / "here", home / "image.qcow2"
    said = run(*AS_NOBODY, *QCOWFS, "mount", image, folder).stdout
    end(int(said.rpartition("pid ")[2].removesuffix(")\n")), number)
    assert is_mounted(folder) == (number is signal.SIGKILL)
    run(*AS_NOBODY, *QCOWFS, "mount", image, folder)
    run(*AS_NOBODY, "cmp", folder / "disk.raw", home / "expected")
    run(*AS_NOBODY, *QCOWFS, "umount", folder)


@pytest.mark.usefixtures("fuse_mode")
def test_nobody_unmounts_what_somebody_else_mounted(home: Path) -> None:
    with mounted(home / "image.qcow2", at=home / "here") as mount:
        result = as_nobody(*QCOWFS, "umount", mount.folder)
        assert result.returncode == 7
        assert result.stderr.startswith("qcowfs: fusermount3: ")
        assert is_mounted(mount.folder)


def with_fuse_config(home: Path, config: str, script: str) -> Result:
    """Run a shell script where /etc/fuse.conf says just that; nothing of it outlives the call."""
    (home / "fuse.conf").write_text(config)
    whole = f"mount --bind {home}/fuse.conf /etc/fuse.conf\n{script}"
    namespace = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    return attempt(*namespace, "sh", "-ec", whole, cwd=home)


MOUNT_FOR_ALL = " ".join([*AS_NOBODY, *QCOWFS, "mount --allow-other --mode 444 image.qcow2 here"])


@pytest.mark.usefixtures("fuse_mode")
@pytest.mark.parametrize("config", ["", "#user_allow_other\n", "user_allow_others\n"])
def test_letting_others_in_is_refused_with_what_to_change(config: str, home: Path) -> None:
    result = with_fuse_config(home, config, MOUNT_FOR_ALL)
    assert result.returncode == 7
    assert result.stderr == (
        "qcowfs: allow_other is not permitted to ordinary users here; put a line user_allow_other into "
        "/etc/fuse.conf, or mount as root\n"
    )


@pytest.mark.usefixtures("fuse_mode")
def test_letting_others_in_works_where_it_is_permitted(home: Path) -> None:
    script = f"{MOUNT_FOR_ALL}\ncmp here/disk.raw expected\nstat --format %a here/disk.raw\numount here"
    result = with_fuse_config(home, "mount_max = 100\n user_allow_other \n", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n444\n")


def test_root_lets_others_in_as_the_mode_says(home: Path) -> None:
    folder = home / "here"
    with in_background(folder, *QCOWFS, "mount", "-o", "allow_other", home / "image.qcow2", folder):
        denied = attempt("setpriv", f"--reuid={NOBODY}", "--clear-groups", "ls", folder)
        assert denied.returncode == 2
    words: list[Word] = ["mount", "--allow-other", "--mode=444", home / "image.qcow2", folder]
    with in_background(folder, *QCOWFS, *words):
        run("setpriv", f"--reuid={NOBODY}", "--clear-groups", "cmp", folder / "disk.raw", home / "expected")


def test_a_fuse_device_that_the_user_may_not_open_is_named(home: Path) -> None:
    mode = FUSE.stat().st_mode & 0o7777
    FUSE.chmod(0o600)
    try:
        result = as_nobody(*QCOWFS, "mount", home / "image.qcow2", home / "here")
    finally:
        FUSE.chmod(mode)
    assert result.returncode == 7
    assert f"{FUSE}: Permission denied" in result.stderr


def test_a_missing_fusermount_is_named(home: Path) -> None:
    command = (*AS_NOBODY, "env", "PATH=/nowhere", *QCOWFS)
    result = attempt(*command, "mount", home / "image.qcow2", home / "here")
    assert result.returncode == 7
    assert result.stderr == (
        "qcowfs: fusermount3 is missing, which mounts for ordinary users; install fuse3\n"
    )


@pytest.mark.usefixtures("fuse_mode")
def test_an_image_that_the_user_may_not_write_is_mounted_read_only_or_not_at_all(home: Path) -> None:
    image, folder = home / "image.qcow2", home / "here"
    image.chmod(0o444)
    result = as_nobody(*QCOWFS, "mount", image, folder)
    message = f"qcowfs: {image}: Permission denied for writing; --read-only needs less\n"
    assert (result.returncode, result.stderr) == (2, message)
    assert not is_mounted(folder)
    run(*AS_NOBODY, *QCOWFS, "mount", "--read-only", image, folder)
    run(*AS_NOBODY, "cmp", folder / "disk.raw", home / "expected")
    run(*AS_NOBODY, *QCOWFS, "umount", folder)


@pytest.mark.usefixtures("fuse_mode")
def test_an_ordinary_user_writes(home: Path) -> None:
    image, folder = home / "image.qcow2", home / "here"
    run(*AS_NOBODY, *QCOWFS, "mount", image, folder)
    words = (f"if={home}/expected", f"of={folder}/disk.raw", "bs=3000", "seek=7", "count=100", "conv=notrunc")
    run(*AS_NOBODY, "dd", *words)
    run(*AS_NOBODY, *QCOWFS, "umount", folder)
    after = as_raw(image, home / "after").read_bytes()
    assert after[21_000:321_000] == (home / "expected").read_bytes()[:300_000]
    assert after[:21_000] == (home / "expected").read_bytes()[:21_000]
    run("qemu-img", "check", image)
