"""The life of a daemon: how it starts, what ends it, and that the image is free afterwards."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.mounts import Daemon, in_background, is_mounted, mounted
from tests.e2e.tools import (
    MIB,
    QCOWFS,
    Word,
    as_raw,
    assert_same,
    attempt,
    create,
    qcowfs,
    qemu_io,
    run,
)

SCRIPT = Path(sys.executable).parent / "qcowfs"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_io(image, "write -q -P 7 100000 300000")
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def assert_free(image: Path) -> None:
    """Fail unless QEMU gets the image to write."""
    qemu_io(image, "write -q -P 8 0 1k")


@pytest.mark.parametrize("command", [QCOWFS, (SCRIPT,)], ids=["python -m qcowfs", "qcowfs"])
def test_the_command_returns_when_the_mount_is_live(
    command: tuple[Word, ...], image: Path, folder: Path, tmp_path: Path
) -> None:
    with in_background(folder, *command, "mount", image, folder) as daemon:
        assert daemon.said == f"{image} is mounted on {folder} (pid {daemon.pid})\n"
        assert_same(daemon.disk, as_raw(image, tmp_path / "raw"))
        assert os.getsid(daemon.pid) == daemon.pid
    assert_free(image)


def test_both_ways_to_call_the_command_are_the_same() -> None:
    assert run(SCRIPT, "--version").stdout == run(*QCOWFS, "--version").stdout
    assert run(SCRIPT, "mount", "--help").stdout == run(*QCOWFS, "mount", "--help").stdout


def test_a_background_daemon_gives_up_the_terminal_and_the_folder_it_started_in(
    image: Path, folder: Path
) -> None:
    with in_background(folder, *QCOWFS, "mount", image, folder, cwd=image.parent) as daemon:
        process = Path("/proc") / str(daemon.pid)
        assert [os.readlink(process / "fd" / n) for n in "012"] == ["/dev/null"] * 3  # noqa: PTH115
        assert (process / "cwd").readlink() == Path("/")


def test_relative_paths_are_those_of_the_folder_it_was_started_in(image: Path, folder: Path) -> None:
    words = ("mount", "image.qcow2", "here", "--log-file", "sub/../here.log")
    (image.parent / "sub").mkdir()
    with in_background(folder, *QCOWFS, *words, cwd=image.parent) as daemon:
        assert daemon.said.startswith(f"{image} is mounted on {folder} ")
        assert (image.parent / "here.log").exists()
        result = qcowfs("umount", "here", cwd=image.parent)
        assert (result.returncode, result.stderr) == (0, "")
        assert daemon.has_ended()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_in_good_order(number: signal.Signals, image: Path, tmp_path: Path) -> None:
    with mounted(image) as mount:
        mount.process.send_signal(number)
        assert mount.wait() == 0
        assert not is_mounted(mount.folder)
        assert f"INFO ending on {number.name}" in mount.log_file.read_text()
        assert_free(image)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_daemon_in_the_background(number: signal.Signals, image: Path, folder: Path) -> None:
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        signal.pidfd_send_signal(daemon.process, number)
        daemon.wait()
        assert not is_mounted(folder)
        assert_free(image)


def test_a_signal_ends_the_daemon_even_while_a_file_is_open(image: Path) -> None:
    with mounted(image) as mount:
        disk = os.open(mount.disk, os.O_RDONLY)
        mount.process.send_signal(signal.SIGTERM)
        assert mount.wait() == 0
        assert_free(image)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.close(disk)  # the kernel closes it, but nobody is there to hear of it


@pytest.mark.parametrize("command", [["umount"], ["fusermount3", "-u"], ["umount", "-l"]], ids=" ".join)
def test_the_systems_own_tools_end_the_daemon(command: list[str], image: Path, folder: Path) -> None:
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        run(*command, folder)
        daemon.wait()
        assert_free(image)


@pytest.mark.parametrize("options", [[], ["--lazy"]], ids=["plain", "lazy"])
def test_umount_returns_when_the_image_is_free(options: list[str], image: Path, folder: Path) -> None:
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        result = qcowfs("umount", *options, folder)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert daemon.has_ended()
        assert_free(image)


def test_umount_finds_a_mount_through_a_symbolic_link_and_odd_spellings(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with space, comma\\ and ü"
    (tmp_path / "link").symlink_to(tmp_path)
    with in_background(folder, *QCOWFS, "mount", image, folder):
        result = qcowfs("umount", f"{tmp_path}/link/../{tmp_path.name}/./{folder.name}/")
        assert (result.returncode, result.stderr) == (0, "")
        assert_free(image)


def test_umount_refuses_what_is_no_mount_of_ours(folder: Path) -> None:
    for path in (folder, Path("/proc"), folder / "missing"):
        result = qcowfs("umount", path)
        assert (result.returncode, result.stderr) == (2, f"qcowfs: {path}: no image is mounted there\n")


def test_umount_names_the_loop_device_that_uses_the_mount(image: Path) -> None:
    with mounted(image) as mount:
        device = run("losetup", "--find", "--show", "--read-only", mount.disk).stdout.strip()
        try:
            result = qcowfs("umount", mount.folder)
            assert result.returncode == 7
            assert result.stderr.startswith("qcowfs: ")
            assert result.stderr.endswith(f"; in use by {device}\n")
        finally:
            run("losetup", "-d", device)
        assert is_mounted(mount.folder)


def test_umount_names_the_process_that_uses_the_mount(image: Path) -> None:
    name = Path("/proc/self/comm").read_text().strip()
    with mounted(image) as mount:
        with mount.disk.open("rb"):
            result = qcowfs("umount", mount.folder)
        assert result.returncode == 7
        assert result.stderr.endswith(f"; in use by pid {os.getpid()} ({name})\n")


def test_the_mount_of_a_killed_daemon_is_cleared_by_the_next_one(image: Path, folder: Path) -> None:
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        assert folder.stat().st_ino == 1  # the kernel keeps this answer for long after the daemon's death
        signal.pidfd_send_signal(daemon.process, signal.SIGKILL)
        daemon.wait()
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOTCONN))):
            daemon.disk.read_bytes()
        with in_background(folder, *QCOWFS, "mount", image, folder) as next_one:
            assert next_one.disk.stat().st_size == MIB
        assert not is_mounted(folder)


def test_umount_clears_the_mount_of_a_killed_daemon(image: Path, folder: Path) -> None:
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        signal.pidfd_send_signal(daemon.process, signal.SIGKILL)
        daemon.wait()
        result = qcowfs("umount", folder)
        assert (result.returncode, result.stderr) == (0, "")
        assert not is_mounted(folder)


def test_one_image_can_be_mounted_twice_at_once(image: Path, tmp_path: Path) -> None:
    with mounted(image, at=tmp_path / "one") as one, mounted(image, at=tmp_path / "two") as two:
        assert_same(one.disk, two.disk)
        one.unmount()
        assert two.disk.stat().st_size == MIB
        result = attempt("qemu-io", "-c", "write 0 1k", image)
        assert result.returncode != 0


def test_opening_and_reading_again_and_again_leaks_neither_descriptors_nor_memory(image: Path) -> None:

    def facts(daemon: Daemon) -> tuple[int, int]:
        process = Path("/proc") / str(daemon.pid)
        pages = int((process / "statm").read_text().split()[1])
        return len(os.listdir(process / "fd")), pages  # noqa: PTH208

    folder = image.parent / "here"
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        for _ in range(200):
            daemon.disk.read_bytes()
        descriptors, pages = facts(daemon)
        for _ in range(2000):
            fd = os.open(daemon.disk, os.O_RDONLY | os.O_DIRECT)
            os.pread(fd, 70_000, 90_000)
            os.close(fd)
        later = facts(daemon)
    assert later[0] <= descriptors + 2
    assert later[1] - pages < 512
