"""Worker threads that share out numbered pieces of work and pass, one after the other, through a narrow part.

Owns the threads' lives: they end when the work does, when one fails, or when it is called off. Must not know
what the work is.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from qcowfs.host.interrupts import raise_interrupt
from qcowfs.host.waiting import run_in_thread, threads_beside

T = TypeVar("T")
_WAITING = 64
_TOGETHER = 32
"""Pieces that there is no room for and that are handed over together: a thread for each took long."""


class CalledOff(Exception):
    """The work ended early, for a reason that is told elsewhere."""


class Turns:
    """The narrow part: threads pass it in the order of their pieces' numbers."""

    def __init__(self) -> None:
        """Number 0 goes first."""
        self._next = 0
        self._off = False
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Hold the narrow part, after all lower numbers. Raises `CalledOff` where they will not come."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number or self._off)
            if self._off:
                raise CalledOff
            yield
            self._next += 1
            self._changed.notify_all()

    def call_off(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._off = True
            self._changed.notify_all()


class Workers(Generic[T]):
    """Threads that take pieces from an asynchronous source until there are no more."""

    def __init__(self, count: int, make: Callable[[], Callable[[T], None]], turns: Turns) -> None:
        """`make` is called in each of `count` threads and gives the function that does a piece."""
        self._count = count
        self._make = make
        self._turns = turns
        self._queue: queue.Queue[T | None] = queue.Queue(max(_WAITING, count))
        self._failure: list[BaseException] = []
        self._off = False

    async def run(self, pieces: AsyncIterator[T]) -> None:
        """Return when every piece is done; raises what the first failing thread raised."""
        async with threads_beside(self._count, self._work, self._call_off):
            waiting: deque[T | None] = deque()
            async for piece in pieces:
                waiting.append(piece)
                self._put_some(waiting)
                if len(waiting) >= _TOGETHER:
                    await run_in_thread(self._put_all, waiting)
                if self._off:
                    break
            waiting.extend([None] * self._count)
            self._put_some(waiting)
            await run_in_thread(self._put_all, waiting)
        if self._failure:
            raise self._failure[0]

    def _put_some(self, waiting: deque[T | None]) -> None:
        """Hand over the pieces that there is room for."""
        with suppress(queue.Full):
            while waiting:
                self._queue.put_nowait(waiting[0])
                waiting.popleft()

    def _put_all(self, waiting: deque[T | None]) -> None:
        """In a thread: hand over all pieces, waiting for room."""
        while waiting:
            self._queue.put(waiting.popleft())

    def _call_off(self) -> None:
        """Have the threads end soon, whatever waits in the queue."""
        self._off = True
        self._turns.call_off()
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in range(self._count):
            self._queue.put_nowait(None)

    def _work(self) -> None:
        """In a thread: do pieces; after a failure anywhere, only take them from the queue."""
        do: Callable[[T], None] | None = None
        while (piece := self._queue.get()) is not None:
            if self._off:
                continue
            try:
                do = do or self._make()
                do(piece)
                raise_interrupt()
            except BaseException as error:
                if not isinstance(error, CalledOff):
                    self._failure.append(error)
                self._off = True
                self._turns.call_off()
