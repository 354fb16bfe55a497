"""The door to the host: what may be opened, what is read at once, and what a thread reads."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs.errors import UsageError
from qcowfs.host.hostfile import OsHostFile
from tests.asserting import raises_exactly

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OsHostFile]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    opened = OsHostFile.open(path)
    try:
        yield opened
    finally:
        opened.close()


async def read_at(file: OsHostFile, *places: tuple[int, int]) -> list[bytes]:
    buffers = [bytearray(b"\xa5" * length) for _, length in places]
    await file.read_into([(at, memoryview(b)) for (at, _), b in zip(places, buffers, strict=True)])
    return [bytes(b) for b in buffers]


async def test_every_request_is_filled(file: OsHostFile) -> None:
    assert await read_at(file, (0, 10), (5000, 300), (3, 0)) == [CONTENT[:10], CONTENT[5000:5300], b""]


@pytest.mark.parametrize(("start", "length"), [(10200, 100), (10240, 10), (1 << 40, 5000), (0, 20000)])
async def test_bytes_past_the_end_are_zeros(file: OsHostFile, start: int, length: int) -> None:
    expected = CONTENT[start : start + length].ljust(length, b"\0")
    assert await read_at(file, (start, length)) == [expected]


async def test_what_the_page_cache_does_not_hold_is_read_by_a_thread(file: OsHostFile) -> None:
    os.fsync(file.fd)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert await read_at(file, (0, len(CONTENT)), (7, 7)) == [CONTENT, CONTENT[7:14]]


async def test_a_file_system_without_reads_that_do_not_wait_is_read_by_threads() -> None:
    status = OsHostFile.open("/proc/self/status")
    try:
        [start] = await read_at(status, (0, 5))
    finally:
        status.close()
    assert start == b"Name:"


async def test_an_error_of_the_host_has_its_errno(file: OsHostFile) -> None:
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        await read_at(file, (0, 1))
    assert caught.value.errno == errno.EBADF


def test_facts_are_those_of_the_host(file: OsHostFile) -> None:
    os.utime(file.path, ns=(1, 1_234_567_890_123_456_789))
    status = file.path.stat()
    facts = file.facts()
    assert (facts.size, facts.allocated, facts.regular) == (len(CONTENT), status.st_blocks * 512, True)
    assert facts.mtime_ns == 1_234_567_890_123_456_789
    assert facts.identity == (status.st_dev, status.st_ino)
    assert file.name == str(file.path)


def test_the_size_is_that_of_the_moment(file: OsHostFile) -> None:
    os.truncate(file.path, 5)
    assert file.facts().size == 5


def test_two_names_of_one_file_have_one_identity(file: OsHostFile) -> None:
    other = file.path.with_name("link")
    other.symlink_to(file.path)
    second = OsHostFile.open(other)
    try:
        assert second.facts().identity == file.facts().identity
    finally:
        second.close()


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "disk"
    path.write_bytes(b"d" * 8192)
    attach = ["losetup", "--find", "--show", "--read-only", str(path)]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


async def test_a_block_device_is_read_and_has_its_size(block_device: str) -> None:
    file = OsHostFile.open(block_device)
    try:
        facts = file.facts()
        assert await read_at(file, (8190, 4)) == [b"dd\0\0"]
    finally:
        file.close()
    assert (facts.size, facts.regular) == (8192, False)


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with raises_exactly(UsageError, f"{fifo}: is a FIFO, neither a regular file nor a block device"):
        OsHostFile.open(fifo)


@pytest.mark.parametrize(
    ("path", "kind"), [("/proc/self", "a directory"), ("/dev/null", "a character device")]
)
def test_other_kinds_of_file_are_refused_and_closed(path: str, kind: str) -> None:
    before = open_descriptors()
    with raises_exactly(UsageError, f"{path}: is {kind}, neither a regular file nor a block device"):
        OsHostFile.open(path)
    assert open_descriptors() == before


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_missing_file_is_the_hosts_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        OsHostFile.open(tmp_path / "gone")
    assert caught.value.filename == str(tmp_path / "gone")


def test_closing_twice_closes_once(file: OsHostFile) -> None:
    before = open_descriptors()
    file.close()
    file.close()
    assert open_descriptors() == before - 1


def test_the_descriptor_is_not_inherited_by_programs(file: OsHostFile) -> None:
    assert not os.get_inheritable(file.fd)
