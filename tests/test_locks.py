"""QEMU's image locks, against real QEMU programs that hold or want them."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs.disk.image import Image, OpenOptions
from qcowfs.errors import ImageInUse
from qcowfs.host import locks
from qcowfs.host.hostfile import OsHostFile
from tests.asserting import raises_exactly

ADVICE = "stop it first, or read beside it with --force-share"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    return path


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the file, whose locks end with it."""
    file = OsHostFile.open(path)
    try:
        yield file.fd
    finally:
        file.close()


@contextmanager
def running(command: list[str], ask: bytes, sign: bytes) -> Iterator[int]:
    """A program that has answered what it was asked on its standard input; its pid."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(ask)
            process.stdin.flush()
            assert sign in process.stdout.readline()
            yield process.pid
        finally:
            process.terminate()


@contextmanager
def qemu_io(path: Path, *options: str) -> Iterator[int]:
    """A qemu-io that has the image open; its pid."""
    with running(["qemu-io", *options, str(path)], b"length\n", b"1 MiB") as pid:
        yield pid


@contextmanager
def storage_daemon(path: Path) -> Iterator[int]:
    """A qemu-storage-daemon that exports the image for writing; its pid."""
    command = [
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={path}",
        "--nbd-server", f"addr.type=unix,addr.path={path.with_name('nbd.sock')}",
        "--export", "type=nbd,id=e,node-name=f,writable=on",
        "--chardev", "stdio,id=m", "--monitor", "chardev=m",
    ]  # fmt: skip
    with running(command, b"", b"QMP") as pid:  # its greeting comes once all options are done
        yield pid


def qemu_writes(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["qemu-io", "-c", "write 0 512", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def held(fd: int) -> set[int]:
    """The bytes that the open file itself has locked, as the kernel tells it."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    ranges = [line.split()[-2:] for line in text.splitlines() if line.startswith("lock:")]
    return {byte for first, last in ranges for byte in range(int(first), int(last) + 1)}


@pytest.mark.parametrize(
    ("mode", "expected"), [(locks.READER, {100, 201, 203}), (locks.SHARED_READER, {100})]
)
def test_a_reader_holds_the_bytes_that_qemus_readers_hold(
    path: Path, mode: locks.LockMode, expected: set[int]
) -> None:
    with opened(path) as fd:
        locks.acquire(fd, str(path), mode)
        assert held(fd) == expected
        locks.release(fd)
        assert held(fd) == set()


def test_two_readers_of_one_process_coexist(path: Path) -> None:
    with opened(path) as first, opened(path) as second:
        locks.acquire(first, str(path), locks.READER)
        locks.acquire(second, str(path), locks.READER)
        assert held(first) == held(second) == {100, 201, 203}


def test_a_reader_coexists_with_a_reader_of_qemu(path: Path) -> None:
    with qemu_io(path, "-r"), opened(path) as fd:
        locks.acquire(fd, str(path), locks.READER)
        assert held(fd) == {100, 201, 203}


def test_a_writer_of_qemu_is_refused_while_a_reader_is_there(path: Path) -> None:
    with opened(path) as fd:
        locks.acquire(fd, str(path), locks.READER)
        result = qemu_writes(path)
        assert result.returncode
        assert 'Failed to get "write" lock' in result.stderr
    assert qemu_writes(path).returncode == 0


def test_a_writer_of_qemu_may_come_once_the_locks_are_released(path: Path) -> None:
    with opened(path) as fd:
        locks.acquire(fd, str(path), locks.READER)
        locks.release(fd)
        assert qemu_writes(path).returncode == 0


def test_a_reader_is_refused_beside_a_writer_that_is_named(path: Path) -> None:
    with qemu_io(path) as pid, opened(path) as fd:
        who = f"pid {pid} (qemu-io) has it open for 'write'"
        with raises_exactly(ImageInUse, f"{path}: in use: {who}; {ADVICE}"):
            locks.acquire(fd, str(path), locks.READER)
        assert held(fd) == set()


def test_a_reader_is_refused_beside_a_storage_daemon_that_is_named(path: Path) -> None:
    with storage_daemon(path) as pid, opened(path) as fd:
        who = f"pid {pid} (qemu-storage-da) has it open for 'write'"  # the kernel keeps 15 letters
        with raises_exactly(ImageInUse, f"{path}: in use: {who}; {ADVICE}"):
            locks.acquire(fd, str(path), locks.READER)


def test_a_shared_reader_is_let_in_beside_a_writer(path: Path) -> None:
    with qemu_io(path), opened(path) as fd:
        locks.acquire(fd, str(path), locks.SHARED_READER)
        assert held(fd) == {100}


def test_a_writer_of_qemu_may_come_beside_a_shared_reader(path: Path) -> None:
    with opened(path) as fd:
        locks.acquire(fd, str(path), locks.SHARED_READER)
        assert qemu_writes(path).returncode == 0


def lock(fd: int, byte: int, kind: int = fcntl.F_RDLCK, length: int = 1) -> None:
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, length, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)


@pytest.mark.parametrize(
    ("byte", "does"),
    [
        (200, "denies others 'consistent read'"),
        (101, "has it open for 'write'"),
        (103, "has it open for 'resize'"),
    ],
)
def test_each_conflict_is_told_by_its_permission(path: Path, byte: int, does: str) -> None:
    with opened(path) as other, opened(path) as fd:
        lock(other, byte)
        own = Path("/proc/self/comm").read_text().strip()
        text = f"{path}: in use: pid {os.getpid()} ({own}) {does}; {ADVICE}"
        with raises_exactly(ImageInUse, text):
            locks.acquire(fd, str(path), locks.READER)


@pytest.mark.parametrize("byte", [0, 99, 100, 102, 104, 201, 202, 203, 204])
def test_other_bytes_are_no_conflict_for_a_reader(path: Path, byte: int) -> None:
    with opened(path) as other, opened(path) as fd:
        lock(other, byte)
        locks.acquire(fd, str(path), locks.READER)
        assert held(fd) == {100, 201, 203}


def test_a_lock_over_the_whole_file_that_excludes_all_others_is_a_conflict(path: Path) -> None:
    writable = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lock(writable, 0, fcntl.F_WRLCK, 0)
        with opened(path) as fd, pytest.raises(ImageInUse, match=re.escape(f"{path}: in use: ")):
            locks.acquire(fd, str(path), locks.READER)
    finally:
        os.close(writable)


def test_every_holder_of_a_byte_is_found(path: Path) -> None:
    with qemu_io(path, "-r") as first, qemu_io(path, "-r") as second, opened(path) as fd:
        assert sorted(locks.find_holders(fd, 201)) == sorted([(first, "qemu-io"), (second, "qemu-io")])
        assert list(locks.find_holders(fd, 101)) == []


def overlay_of(path: Path) -> Path:
    overlay = path.with_name("overlay.qcow2")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", path.name, "-F", "qcow2", str(overlay)]
    subprocess.run(command, check=True)
    return overlay


each_way = pytest.mark.parametrize("of", [lambda path: path, overlay_of], ids=["image", "backing file"])


@each_way
async def test_an_open_image_keeps_writers_of_qemu_out(path: Path, of: Callable[[Path], Path]) -> None:
    image = await Image.open(of(path))
    try:
        assert 'Failed to get "write" lock' in qemu_writes(path).stderr
    finally:
        image.close()
    assert qemu_writes(path).returncode == 0


@each_way
async def test_an_image_that_is_written_is_opened_only_by_force(
    path: Path, of: Callable[[Path], Path]
) -> None:
    wanted = of(path)
    with qemu_io(path):
        with pytest.raises(ImageInUse, match=re.escape(f"{path}: in use: pid ")):
            await Image.open(wanted)
        image = await Image.open(wanted, OpenOptions(force_share=True))
        assert image.size == 1 << 20
        image.close()
