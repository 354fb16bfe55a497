"""Long runs of data sent to the disk while more are still coming, so that the sync at their end is short.

Owns when the host is told to begin writing its page cache out, and the disk its own, and the thread that
tells them. Must not know what is written. It only starts what would be done later; nobody may take anything
to be on disk before a sync of his own.
"""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from qcowfs.host import syscalls

CHUNK = 8 << 20
"""Bytes written close to each other before the host is told: enough for the disk to be busy with."""
SYNC_EVERY = 32 << 20
"""Bytes after which the disk is told to empty its cache, which else takes as long as the writing did."""
_SPARSEST = 2
"""How much larger than what was written the range may be: random writes may well come again."""


class WriteBehind:
    """Watches what is written to one file descriptor."""

    def __init__(self, fd: int) -> None:
        """Watch from now on; the descriptor stays the caller's."""
        self._fd = fd
        self._lock = threading.Lock()
        self._start = self._end = self._written = 0
        self._pool: ThreadPoolExecutor | None = None
        self._started: Future[None] | None = None
        self._stopped = False
        self._other_fd: int | None = None
        self._unsynced = 0
        self._error = 0

    def note(self, offset: int, length: int) -> None:
        """Note that bytes were written; may be called from any thread, and never waits for the disk."""
        if self._stopped:
            return
        with self._lock:
            self._written += length
            self._start, self._end = min(self._start, offset), max(self._end, offset + length)
            size = self._end - self._start
            if size > _SPARSEST * max(self._written, CHUNK):
                self._start, self._end, self._written = offset, offset + length, length
            elif self._written >= CHUNK and not self.is_busy:
                self._begin(self._start, size)
                self._start, self._written = self._end, 0

    def _begin(self, start: int, length: int) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, "write-behind")
        try:
            self._started = self._pool.submit(self._send, start, length)
        except RuntimeError:  # no thread is to be had; the host writes all the same, only later
            self._stopped = True

    def _send(self, start: int, length: int) -> None:
        """In the thread: have a range written out, and now and then all."""
        syscalls.begin_writing(self._fd, start, length)
        self._unsynced += length
        if self._unsynced < SYNC_EVERY:
            return
        self._unsynced = 0
        if self._other_fd is None:
            with suppress(OSError):
                self._other_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        if self._other_fd is not None:
            self._sync(self._other_fd)

    def _sync(self, fd: int) -> None:
        """Sync by a descriptor of its own: the host tells a failed write to each of them once."""
        try:
            os.fdatasync(fd)
        except OSError as error:
            self._error = error.errno or errno.EIO

    @property
    def is_busy(self) -> bool:
        """Whether the thread has something to do."""
        return self._started is not None and not self._started.done()

    def settle(self) -> None:
        """Wait until what was begun is done. Raises `OSError` if a sync ever failed: no other may know."""
        if self._started is not None:
            self._started.result()
        if self._error:
            raise OSError(self._error, os.strerror(self._error))

    def stop(self) -> None:
        """Leave all that is written from now on to the host."""
        self._stopped = True

    def close(self) -> None:
        """Wait until the thread no longer uses the descriptor."""
        if self._pool is not None:
            self._pool.shutdown()
        if self._other_fd is not None:
            os.close(self._other_fd)
            self._other_fd = None
