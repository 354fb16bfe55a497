"""The request loop's short cut: requests that follow each other closely are served in one task step.

Owns the two things that pyfuse3's loop takes from trio for each request: the lock that lets one task wait for
the kernel, and the wait itself. Both normally go through the scheduler, which costs more than answering a
small read. Here neither does while requests are already waiting; the scheduler gets its turn every
`MAX_IN_A_ROW` requests, or rows of them that the compiled session answers, and as soon as a handler has to
wait, another task takes over the reading.
"""

from __future__ import annotations

import select
from collections.abc import Awaitable, Generator
from types import SimpleNamespace

import pyfuse3
import trio

MAX_IN_A_ROW = 4
_POLLS = 12
"""Looks before the scheduler is asked: some microseconds, about as long as a reader takes to come back."""


class _Done:
    """An awaitable that is already done."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        return _NOTHING


def _nothing() -> Generator[None, None, None]:
    yield from ()


_NOTHING = _nothing()
list(_NOTHING)  # an exhausted generator ends at once, however often it is awaited
_DONE = _Done()


class ReaderGate(trio.abc.Instrument):
    """A lock whose release wakes nobody: a waiter is woken when the releasing task's step has ended.

    So a task that comes back for the lock within its step finds it free.
    """

    def __init__(self) -> None:
        """Start free; hears of every task step until trio ends."""
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()
        trio.lowlevel.add_instrument(self)

    def __aenter__(self) -> Awaitable[None]:
        if self._held:
            return self._wait()
        self._held = True
        return _DONE

    async def _wait(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    def __aexit__(self, *_: object) -> Awaitable[None]:
        self._held = False
        return _DONE

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Let the next task read if the one that did is now busy with something else."""
        if not self._held and self._waiting:
            self._waiting.unpark()


class EagerWait:
    """`trio.lowlevel.wait_readable` that first looks whether there is anything to wait for."""

    def __init__(self) -> None:
        """Start without a descriptor: it is told with the first wait."""
        self._polls: dict[int, select.poll] = {}
        self._in_a_row = 0

    def __call__(self, fd: int) -> Awaitable[None]:
        """Wait until `fd` is readable."""
        if self._in_a_row < MAX_IN_A_ROW:
            poll = self._polls.get(fd) or self._register(fd)
            for _ in range(_POLLS):
                if poll.poll(0):
                    self._in_a_row += 1
                    return _DONE
        self._in_a_row = 0
        return trio.lowlevel.wait_readable(fd)  # noqa: ASYNC105 - pyfuse3 awaits it

    def _register(self, fd: int) -> select.poll:
        poll = self._polls[fd] = select.poll()
        poll.register(fd, select.POLLIN)
        return poll


def install() -> None:
    """Give pyfuse3 the short cut in place of trio, by the hook that its asyncio mode uses too."""
    lowlevel = SimpleNamespace(
        wait_readable=EagerWait(),
        notify_closing=trio.lowlevel.notify_closing,
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
    )
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        Lock=ReaderGate,
        ClosedResourceError=trio.ClosedResourceError,
        open_nursery=trio.open_nursery,
        from_thread=trio.from_thread,
        lowlevel=lowlevel,
    )
