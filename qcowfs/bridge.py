"""From plain calls to the asynchronous engine: a thread for each open disk, in which trio runs.

Owns that thread, the lock that lets one call at a time through, and the refusal to work after a fork. Must
not know what is called.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

import trio

from qcowfs.disk.disks import Disk
from qcowfs.errors import UsageError

T = TypeVar("T")


class _Job(Generic[T]):
    """One call on its way through the engine."""

    def __init__(self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> None:
        self._call = (function, args)
        self._done = threading.Event()
        self._result: list[T] = []
        self._failure: BaseException | None = None

    async def run(self) -> None:
        """In the engine's thread: call, and keep what comes of it."""
        function, args = self._call
        try:
            self._result.append(await function(*args))
        except Exception as error:
            self._failure = error
        finally:
            self._done.set()

    def wait(self) -> T:
        """In the caller's thread: what the call returned or raised.

        An interrupt waits until the call is over, since its buffers are the caller's and since the
        engine must rest when the lock is given back; a second one does not.
        """
        try:
            self._done.wait()
        except BaseException:
            self._done.wait()
            raise
        if self._failure is not None:
            raise self._failure
        return self._result[0]


class Engine:
    """A thread in which trio runs for as long as a disk is open.

    `lock` is held by whoever calls into the engine. While it is held and no `run` is under way, the
    engine rests, so that its plain functions may be called from the holder's thread.
    """

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[Disk]]) -> None:
        """Start the thread and open the disk; raises what opening raises."""
        self.lock = threading.RLock()
        self.disk: Disk
        self._opened = opened
        self._pid = os.getpid()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._end: trio.Event
        self._thread = threading.Thread(target=self._serve, name="qcowfs", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def run(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run an asynchronous function in the engine and wait for its result."""
        with self.lock:
            job = _Job(function, args)
            self._token.run_sync_soon(self._nursery.start_soon, job.run)
            return job.wait()

    def check_process(self) -> None:
        """Raise `UsageError` in a process that was forked off: threads do not come along."""
        if os.getpid() != self._pid:
            raise UsageError("the disk was opened before this process was forked; open it anew here")

    def stop(self) -> None:
        """Write everything back, close the files and end the thread; raises what that raises."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return
        with self.lock:
            self._token.run_sync_soon(self._end.set)
            self._thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _serve(self) -> None:
        try:
            trio.run(self._hold_open)
        except BaseException as error:
            self._failure = _single(error)
        finally:
            self._ready.set()

    async def _hold_open(self) -> None:
        self._token, self._end = trio.lowlevel.current_trio_token(), trio.Event()
        async with self._opened() as self.disk, trio.open_nursery() as self._nursery:
            self._ready.set()
            await self._end.wait()


def _single(error: BaseException) -> BaseException:
    """The first plain exception of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
