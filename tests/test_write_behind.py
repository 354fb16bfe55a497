"""The host is told to begin writing long runs out, and the disk to empty its cache; nothing else."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowfs.host import syscalls
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.write_behind import CHUNK, SYNC_EVERY, WriteBehind

STEP = 1 << 20


class Told:
    """What the host was told, in the place of the system call."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, int]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def begin_writing(self, fd: int, offset: int, length: int) -> None:
        self.go_on.wait(60)
        self.ranges.append((fd, offset, length))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(syscalls, "begin_writing", found.begin_writing)
    return found


def test_a_long_run_is_begun_once_enough_was_written(told: Told) -> None:
    behind = WriteBehind(7)
    for offset in range(0, CHUNK, STEP):
        assert told.ranges == []
        behind.note(offset, STEP)
    behind.close()
    assert told.ranges == [(7, 0, CHUNK)]


def test_nothing_waits_while_the_host_is_busy(told: Told) -> None:
    told.go_on.clear()
    behind = WriteBehind(7)
    for offset in range(0, 4 * CHUNK, STEP):
        behind.note(offset, STEP)
    assert told.ranges == []
    told.go_on.set()
    behind.close()
    assert told.ranges == [(7, 0, CHUNK)]


def test_writes_far_from_each_other_are_left_to_the_host(told: Told) -> None:
    behind = WriteBehind(7)
    for number in range(64):
        behind.note(number * (CHUNK << 3), STEP)
    behind.close()
    assert told.ranges == []


def test_a_run_after_a_jump_is_a_run_again(told: Told) -> None:
    behind = WriteBehind(7)
    behind.note(0, 4096)
    for offset in range(1 << 40, (1 << 40) + CHUNK, STEP):
        behind.note(offset, STEP)
    behind.close()
    assert told.ranges == [(7, 1 << 40, CHUNK)]


async def test_a_host_file_is_written_behind_and_holds_what_was_written(told: Told, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    file = OsHostFile.open(path, writable=True)
    fd = file.fd
    for offset in range(0, CHUNK, STEP):
        await file.write_from([(offset, os.urandom(1) * STEP)])
    await file.sync()
    file.close()
    assert told.ranges == [(fd, 0, CHUNK)]
    assert path.stat().st_size == CHUNK


def test_the_real_call_keeps_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * STEP)
    fd = os.open(path, os.O_RDWR)
    try:
        syscalls.begin_writing(fd, 0, STEP)
        syscalls.punch_hole(fd, 4096, 8192)
    finally:
        os.close(fd)
    data = path.read_bytes()
    assert data == b"x" * 4096 + bytes(8192) + b"x" * (STEP - 12288)


def test_a_write_goes_on_where_no_thread_is_to_be_had(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    behind = WriteBehind(7)
    behind.note(0, 2 * CHUNK)
    behind.close()
    assert told.ranges == []


def test_nothing_is_begun_where_nobody_will_sync(told: Told) -> None:
    behind = WriteBehind(7)
    behind.stop()
    behind.note(0, 2 * CHUNK)
    behind.close()
    assert told.ranges == []


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that were synced."""
    found: list[int] = []
    real = os.fdatasync

    def note(fd: int) -> None:
        found.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", note)
    return found


def note_until(behind: WriteBehind, wanted: Callable[[], object]) -> int:
    """Note a long run, chunk after chunk, until something has come of it; the bytes noted."""
    deadline = time.monotonic() + 60
    noted = 0
    while not wanted():
        assert time.monotonic() < deadline
        behind.note(noted, CHUNK)
        noted += CHUNK
    return noted


def test_the_disk_is_told_now_and_then_by_a_descriptor_of_its_own(synced: list[int], tmp_path: Path) -> None:
    """A failure that it met would else not be told to whoever syncs by the file's."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        behind = WriteBehind(fd)
        noted = note_until(behind, lambda: synced)
        assert noted >= SYNC_EVERY
        other = synced[0]
        assert other != fd
        assert os.path.sameopenfile(fd, other)
        behind.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other)
        os.fstat(fd)
    finally:
        os.close(fd)


def test_where_no_second_descriptor_is_to_be_had_runs_are_begun_all_the_same(told: Told) -> None:
    behind = WriteBehind(-1)
    note_until(behind, lambda: sum(length for _, _, length in told.ranges) > 2 * SYNC_EVERY)
    behind.close()
    assert all(fd == -1 for fd, _, _ in told.ranges)


async def test_a_failure_behind_is_final(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where only the disk's cache could not be emptied, nobody else would hear of it."""
    (tmp_path / "file").touch()
    file = OsHostFile.open(tmp_path / "file", writable=True)
    failed: list[int] = []
    real = os.fdatasync

    def fail_behind(fd: int) -> None:
        if fd == file.fd:
            real(fd)
        else:
            failed.append(fd)
            raise OSError(errno.EIO, "the disk's cache")

    monkeypatch.setattr(os, "fdatasync", fail_behind)
    deadline = time.monotonic() + 60
    while not failed:
        assert time.monotonic() < deadline
        await file.write_from([(0, bytes(CHUNK))])
    for why in ("Input/output error", "an earlier sync failed"):
        with pytest.raises(OSError, match=why):
            await file.sync()
    file.close()
