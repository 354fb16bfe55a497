"""The only door to host I/O: one open file of the host, and the worker threads.

Owns file descriptors, what blocks and what does not, and the host's errno. Must not know qcow2. Everything
here is either plain and immediate or awaits a thread; nothing blocks the event loop.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from qcowfs.errors import UsageError
from qcowfs.host import syscalls
from qcowfs.host.batches import batches
from qcowfs.host.facts import FileFacts, facts_of
from qcowfs.host.reserving import Reserver
from qcowfs.host.waiting import run_in_thread
from qcowfs.host.write_behind import WriteBehind

log = logging.getLogger(__name__)

T = TypeVar("T")

ReadRequest = tuple[int, memoryview]
"""A host offset and the buffer to fill from there."""
WriteRequest = tuple[int, bytes | bytearray | memoryview]
"""A host offset and the bytes to write there."""
Stretch = tuple[int, int, bool]
"""Where a part of a file starts and ends, and whether it holds data."""

SLOW_WRITE = 0.05
SLOW_WRITE_PAUSE = 0.25
"""Seconds: a write slower than the first makes all others avoid the event loop for the second."""
QUICK_SYNC = 0.001
LITTLE = 1 << 18
"""Seconds and bytes: a sync is taken to be quick after one that was, with no more than this to write."""
_WRITERS = 2
"""Threads that write at a time: the host lets one into a file, the next is there at once, more only wait."""
LOST_BY_SYNC = "an earlier sync failed, so the host may have lost what was written before it"
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("qQQQ")
_CANNOT_CLONE = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ETXTBSY)
_CANNOT_COPY = (*_CANNOT_CLONE, errno.ENOSYS, errno.EBADF)
_WOULD_BLOCK = (errno.EAGAIN, errno.EOPNOTSUPP)


class HostFile(Protocol):
    """What the engine needs of a file; `OsHostFile` and `testing.MemoryHostFile` are such."""

    @property
    def name(self) -> str:
        """How messages call the file."""

    def facts(self) -> FileFacts:
        """Size, time and identity as of now."""

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer if that takes no waiting; whether it was filled."""

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer; bytes past the end of the file become zeros."""

    async def data_and_holes(self, start: int, end: int) -> list[Stretch]:
        """The range in stretches that hold data and stretches that the host knows to be zeros."""

    def write_now(self, offset: int, data: bytes | memoryview) -> bool:
        """Write the whole buffer if that takes no waiting; whether it was written."""

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        """Write every buffer whole, in order; the file grows as needed."""

    def descriptor_now(self) -> int | None:
        """The descriptor, if others may read and overwrite by it until the next await; who does notes it."""

    def note_written(self, where: range, length: int) -> None:
        """Note that so many bytes were written somewhere in a range by the descriptor."""

    async def find_next(self, offset: int, *, data: bool) -> int | None:
        """The first offset from `offset` on with data, or in a hole, as far as the host tells."""

    async def punch_hole(self, offset: int, length: int) -> None:
        """Give the host's blocks of a range back, where the host can; the range then reads as zeros or not.

        Nobody may count on either.
        """

    async def sync(self) -> None:
        """Return when everything written so far is on disk."""

    def close(self) -> None:
        """Give the file back to the host; further calls are errors."""


class OsHostFile:
    """A file of the operating system, read at once from the page cache, else by a thread."""

    def __init__(self, path: str | os.PathLike[str], fd: int) -> None:
        """Take over the descriptor `fd` that was opened from `path`."""
        self.path = Path(path)
        self._fd = fd
        self._inline_writes_after = 0.0
        self._unsynced = 0
        self._last_sync = math.inf
        self._sync_error = 0
        self._nowait = hasattr(os, "RWF_NOWAIT")
        self._write_behind = WriteBehind(fd)
        self._writers = threading.Semaphore(_WRITERS)
        self._copying = threading.Lock()
        self._reserver: Reserver | None = None
        self._punch: Callable[[int, int, int], None] | None = syscalls.punch_hole

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False, alone: bool = False) -> OsHostFile:
        """Open a regular file or block device, `alone` if a device must not be in use; others are refused.

        Raises `OSError` as the host does and `UsageError` for a FIFO, socket or other device.
        """
        access = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_EXCL if alone else 0))
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            raise UsageError(f"{path}: is {_kind_of(mode)}, neither a regular file nor a block device")
        return cls(path, fd)

    @classmethod
    def create(cls, path: str | os.PathLike[str], flags: int = os.O_EXCL) -> OsHostFile:
        """A new empty file, never one that exists; with `os.O_TMPFILE` one without a name in that folder."""
        access = os.O_RDWR | os.O_CLOEXEC | (flags if flags & os.O_TMPFILE else flags | os.O_CREAT)
        return cls(path, os.open(path, access, 0o644))

    @property
    def name(self) -> str:
        """The path that the file was opened from."""
        return str(self.path)

    @property
    def fd(self) -> int:
        """The descriptor, for locks."""
        return self._fd

    def facts(self) -> FileFacts:
        """Size, time and identity as of now."""
        return facts_of(self._fd)

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer: inline where the page cache has it all, the rest in one thread.

        Raises `OSError` as the host does. Bytes past the end of the file become zeros.
        """
        waiting = [r for r in requests if not self.read_cached(*r)]
        if waiting:
            await run_in_thread(self._read_blocking, waiting)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer from the page cache, and with zeros past the end; False if that takes waiting."""
        if not self._nowait:
            return False
        try:
            got = os.preadv(self._fd, (buffer,), offset, os.RWF_NOWAIT)
            return got == len(buffer) or self._ends_within(offset + got, buffer[got:])
        except OSError as error:
            if error.errno not in _WOULD_BLOCK:
                raise
            self._nowait = error.errno == errno.EAGAIN
            return False

    def _ends_within(self, offset: int, rest: memoryview) -> bool:
        """Fill what is left of a buffer with zeros if the file ends where it begins."""
        if offset < self.facts().size:
            return False
        rest[:] = bytes(len(rest))
        return True

    async def data_and_holes(self, start: int, end: int) -> list[Stretch]:
        """The range in stretches of data and holes; all data where the host does not tell."""
        return await run_in_thread(self._data_and_holes, start, end)

    def _data_and_holes(self, start: int, end: int) -> list[Stretch]:
        found: list[Stretch] = []
        while start < end:
            data = self._seek(start, os.SEEK_DATA, end)
            if data > start:
                found.append((start, data, False))
            start = self._seek(data, os.SEEK_HOLE, end) if data < end else end
            if start > data:
                found.append((data, start, True))
        return found

    def _seek(self, start: int, whence: int, end: int) -> int:
        """Where data or a hole comes next, at most `end`."""
        try:
            return min(os.lseek(self._fd, start, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # past the end of the file, or only a hole up to there
                return end
            if error.errno != errno.EINVAL:
                raise
            return start if whence == os.SEEK_DATA else end

    def _read_blocking(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            done = 0
            while done < len(buffer):
                got = os.preadv(self._fd, (buffer[done:],), offset + done)
                if not got:
                    buffer[done:] = bytes(len(buffer) - done)
                    break
                done += got

    def write_now(self, offset: int, data: bytes | memoryview) -> bool:
        """Write into the page cache, unless the host holds writers back: see `write_from`."""
        start = time.monotonic()
        if start < self._inline_writes_after:
            return False
        self._write_blocking([(offset, data)])
        self._note_duration(start)
        return True

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        """Write every buffer whole: inline, since the page cache takes it, or in a thread.

        The thread is for a host that holds writers back: one slow write sends the next ones there.
        Raises `OSError` as the host does.
        """
        start = time.monotonic()
        if start < self._inline_writes_after:
            await run_in_thread(self._write_blocking, requests)
            return
        self._write_blocking(requests)
        self._note_duration(start)

    def descriptor_now(self) -> int | None:
        """The descriptor, unless the page cache cannot be asked or the host holds writers back."""
        if not self._nowait or time.monotonic() < self._inline_writes_after:
            return None
        return self._fd

    def note_written(self, where: range, length: int) -> None:
        """Note what a sync has to wait for, and what may be sent to the disk early."""
        self._unsynced += length
        if len(where) <= length:
            self._write_behind.note(where.start, length)

    def _note_duration(self, start: float) -> None:
        end = time.monotonic()
        if end - start > SLOW_WRITE:
            self._inline_writes_after = end + SLOW_WRITE_PAUSE

    def _write_blocking(self, requests: Sequence[WriteRequest]) -> None:
        for offset, data in requests:
            done = os.pwrite(self._fd, data, offset)
            while done < len(data):
                done += os.pwrite(self._fd, memoryview(data)[done:], offset + done)
            self.note_written(range(offset, offset + len(data)), len(data))

    async def find_next(self, offset: int, *, data: bool) -> int | None:
        """The first offset from `offset` on with data, or in a hole; the end of the file is one."""
        whence = os.SEEK_DATA if data else os.SEEK_HOLE
        try:
            return await run_in_thread(os.lseek, self._fd, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    async def punch_hole(self, offset: int, length: int) -> None:
        """Give the host's blocks of a range back; the first refusal ends all further tries."""
        if self._punch is None:
            return
        try:
            await run_in_thread(self._punch, self._fd, offset, length)
        except OSError as error:
            self._punch = None
            log.info("%s: the host does not take space back (%s)", self.name, error.strerror)

    async def sync(self) -> None:
        """Return when everything written so far is on disk. Raises `OSError` as the host does.

        Once one has failed all later ones do: the host has dropped what it could not write, and the next
        would succeed without it. Where the last sync was quick and little was written since, a thread
        would cost more than it.
        """
        quick = self._last_sync < QUICK_SYNC and self._unsynced <= LITTLE and not self._write_behind.is_busy
        self._unsynced = 0
        start = time.monotonic()
        if self._sync_error:
            raise OSError(self._sync_error, LOST_BY_SYNC, self.name)
        try:
            if quick:
                self._sync_blocking()
            else:
                await run_in_thread(self._sync_blocking)
        except OSError as error:
            self._sync_error = error.errno or errno.EIO
            raise
        self._last_sync = time.monotonic() - start

    def _sync_blocking(self) -> None:
        self._write_behind.settle()
        os.fdatasync(self._fd)

    @property
    def lies_elsewhere(self) -> bool:
        """Whether its file system is on no device of this host, which then may copy without moving bytes."""
        return os.major(os.fstat(self._fd).st_dev) == 0

    # -- for functions that run in a worker thread already

    def read_here(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer, waiting for the host; bytes past the end of the file become zeros."""
        self._read_blocking([(offset, buffer)])

    def peek_here(self, offset: int, length: int) -> bytes:
        """A few bytes, fewer where the file ends."""
        return os.pread(self._fd, length, offset)

    def leave_to_host(self) -> None:
        """Have nothing written out early, as nobody will sync."""
        self._write_behind.stop()

    def expect_growth(self) -> None:
        """Set blocks aside for long writes that follow, if the host is quicker then."""
        self._reserver = Reserver(self._fd)

    def write_here(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Write the parts one after the other from `offset` on, waiting for the host."""
        for some in batches(parts):
            length = sum(map(len, some))
            with self._writers:
                if self._reserver is not None:
                    self._reserver.reserve(offset, length)
                done = os.pwritev(self._fd, some, offset)
                self._unsynced += done
                self._write_behind.note(offset, done)
                if done < length:
                    rest = memoryview(b"".join(some))[done:]
                    self._write_blocking([(offset + done, rest)])
            offset += length

    def copy_here(self, source: OsHostFile, start: int, length: int, offset: int) -> int:
        """Let the host copy a range of another file; how many bytes of it are there, none where it cannot."""
        done = 0
        with self._copying:  # a second thread would only wait for the first, busily
            while done < length:
                try:
                    got = os.copy_file_range(source.fd, self._fd, length - done, start + done, offset + done)
                except OSError as error:
                    if error.errno not in _CANNOT_COPY:
                        raise
                    got = 0
                if not got:  # as well where the source ends
                    break
                done += got
            self._unsynced += done
            self._write_behind.note(offset, done)
        return done

    def clone_here(self, source: OsHostFile, start: int, length: int, offset: int) -> bool:
        """Let a range share its blocks with a range of another file; False where the host cannot."""
        request = _CLONE_RANGE.pack(source.fd, start, length, offset)
        try:
            fcntl.ioctl(self._fd, _FICLONERANGE, request)
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
            return False
        return True

    async def truncate(self, size: int) -> None:
        """Make the file that long; what is added reads as zeros and takes no space."""
        await run_in_thread(os.ftruncate, self._fd, size)

    async def allocate(self, offset: int, length: int) -> None:
        """Have the host set space aside for a range. Raises `OSError` as the host does."""
        await run_in_thread(os.posix_fallocate, self._fd, offset, length)

    def close(self) -> None:
        """Give the descriptor back; locks on it end with it."""
        if self._fd >= 0:
            self._write_behind.close()
            os.close(self._fd)
            self._fd = -1


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a character device")
