"""Requests that the session's compiled part hands over: begun at once, answered at once if nothing waits.

Owns the switch between the two ways: what has to wait is gone on with in pyfuse3's own task, whose buffer
holds the data until then. Must not know what a request does: that is `operations`.
"""

from __future__ import annotations

import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyfuse3
import trio

from qcowfs.daemon.changes import ChangingOperations
from qcowfs.daemon.control import Control
from qcowfs.daemon.operations import MAX_READ, Ownership

if TYPE_CHECKING:
    from qcowfs.daemon._session import Request
    from qcowfs.data.views import ImageView
    from qcowfs.disk.live import DiskWriter

T = TypeVar("T")


class Begun(Generic[T]):
    """A coroutine that ran up to its first wait, in the task that is now to go on with it."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], wait: object) -> None:
        """`wait` is what the coroutine yielded to the scheduler."""
        self._coroutine = coroutine
        self._wait = wait

    @types.coroutine
    def finish(self) -> Generator[Any, Any, T]:
        """Run the rest of the coroutine."""
        wait = self._wait
        while True:
            try:
                outcome = yield wait
            except BaseException as error:
                step = partial(self._coroutine.throw, error)
            else:
                step = partial(self._coroutine.send, outcome)
            try:
                wait = step()
            except StopIteration as done:
                result: T = done.value
                return result


class DirectOperations(ChangingOperations):
    """The handlers of one mount, with reads and writes begun as soon as they arrive."""

    def __init__(
        self, control: Control, ownership: Ownership, facts: dict[bytes, bytes],
        nursery: trio.Nursery, session: ModuleType,
    ) -> None:  # fmt: skip
        """As `ChangingOperations`; what pyfuse3 has no handlers for runs in tasks of `nursery`."""
        super().__init__(control, ownership, facts)
        self._nursery = nursery
        self._session = session
        session.set_handlers(
            self.begin_read, self.begin_write, self.note_written, self.begin_fsync, self.begin_flush,
            self.begin_fallocate, self.begin_lseek,
        )  # fmt: skip
        self._begun: Begun[Any] | None = None
        self._quick = memoryview(self._buffers.take())

    def begin_read(self, fh: int, off: int, size: int) -> memoryview | bytes | int | None:
        """The bytes, a negative errno, or None if pyfuse3's handler has to wait for them."""
        node = self._handles.get(fh)
        if node is not None and size <= MAX_READ and off + size <= node.view.size:
            try:
                found = node.view.read_now(off, self._quick[:size])
            except OSError:
                found = None  # answered, and logged, below
            if found is None:
                return self._begin(super().read_waiting(fh, off, size))
            self._permit(self._session.permit_reads, fh, node.view)
            return found
        return self._begin(super().read(fh, off, size))

    def begin_write(self, fh: int, off: int, data: memoryview) -> int | None:
        """How many bytes were written, a negative errno, or None if pyfuse3's handler has to wait."""
        node = self._handles.get(fh)
        if node is None or node.writer is None or off + len(data) > node.view.size:
            return self._begin(super().write(fh, off, data))
        try:
            done = node.writer.write_now(off, data)
        except OSError:
            done = False  # answered, and logged, below
        answer = len(data) if done else self._begin(super().write_waiting(fh, off, data))
        if answer is not None and answer > 0:
            node.written_ns = time.time_ns()
            self._permit(self._session.permit_writes, fh, node.writer)
        return answer

    def _permit(self, permit: Callable[..., None], fh: int, disk: ImageView | DiskWriter) -> None:
        """Let the compiled session do the next requests of this row that are like the one just done."""
        found = disk.in_place()
        if found is not None:
            permit(fh, *found)

    def note_written(self, count: int, length: int, low: int, high: int) -> None:
        """Hear that the compiled session made `count` writes of `length` bytes in a range of the file."""
        disk = self._tree.disk
        if disk.writer is not None:
            disk.writer.note_written(count, range(low, high), length)
            disk.written_ns = time.time_ns()

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> T | int | None:
        try:
            wait = coroutine.send(None)
        except StopIteration as done:
            result: T = done.value
            return result
        except pyfuse3.FUSEError as error:
            return -error.errno
        self._begun = Begun(coroutine, wait)
        return None

    def begin_fsync(self, fh: int, datasync: int) -> int | None:
        """0, a negative errno, or None if pyfuse3's handler has to wait for the disk."""
        return self._begin_sync(super().fsync(fh, bool(datasync)))

    def begin_flush(self, fh: int) -> int | None:
        """As `begin_fsync`, for a descriptor that is closed."""
        return self._begin_sync(super().flush(fh))

    def _begin_sync(self, work: Coroutine[Any, Any, None]) -> int | None:
        answer: int | None = self._begin(work)
        return 0 if answer is None and self._begun is None else answer

    def begin_fallocate(self, request: Request, inode: int, mode: int, off: int, length: int) -> None:
        """Answer a fallocate request, later."""
        self._nursery.start_soon(self._answer, request, self.fallocate(inode, mode, off, length))

    def begin_lseek(self, request: Request, inode: int, _fh: int, off: int, whence: int) -> None:
        """Answer an lseek request, later."""
        self._nursery.start_soon(self._answer, request, self.lseek(inode, off, whence))

    async def _answer(self, request: Request, work: Awaitable[int | None]) -> None:
        """Do the work and answer with the number that it gives, or with its error."""
        try:
            result = await work
        except pyfuse3.FUSEError as error:
            self._session.reply_error(request, error.errno)
        else:
            if result is None:
                self._session.reply_error(request, 0)
            else:
                self._session.reply_offset(request, result)

    async def read(  # type: ignore[override]  # any buffer will do, whatever the stub says
        self, fh: int, off: int, size: int
    ) -> memoryview | bytes:
        """Go on with the read that was begun."""
        return await self._finish(super().read(fh, off, size))

    async def write(self, fh: int, off: int, buf: bytes | memoryview) -> int:
        """Go on with the write that was begun."""
        return await self._finish(super().write(fh, off, buf))

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Go on with the sync that was begun."""
        await self._finish(super().fsync(fh, datasync))

    async def flush(self, fh: int) -> None:
        """Go on with the sync that was begun."""
        await self._finish(super().flush(fh))

    async def _finish(self, anew: Coroutine[Any, Any, T]) -> T:
        """Finish what was begun just now, else run the handler from its start."""
        begun, self._begun = self._begun, None
        if begun is None:
            return await anew
        anew.close()
        result: T = await begun.finish()
        return result
