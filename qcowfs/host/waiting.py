"""How the engine waits: in trio's event loop, or by blocking the thread.

Owns the two ways. A program that does several things at a time runs the engine in trio. A command that does
one runs it by `run_blocking`, since loading trio takes half as long as copying a GiB: then every await ends
where it began, other threads join in by `run_in_loop`, and one turn goes round so that they never are in the
engine together. Must not know what is waited for.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qcowfs.host.interrupts import interrupts_noted, raise_interrupt

if TYPE_CHECKING:
    import trio

T = TypeVar("T")

_turn = threading.Lock()
_here = threading.local()


def _is_blocking() -> bool:
    return getattr(_here, "is_blocking", False)


@contextmanager
def _blocking() -> Iterator[None]:
    """Let this thread block where others await."""
    _here.is_blocking = True
    try:
        yield
    finally:
        _here.is_blocking = False


@contextmanager
def _out_of_turn() -> Iterator[None]:
    """Let other threads into the engine meanwhile."""
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()


def run_blocking(function: Callable[..., Coroutine[Any, Any, T]], *args: object) -> T:
    """Run an asynchronous function of the engine to its end, without an event loop."""
    with interrupts_noted(), _blocking(), _turn:
        return _finish(function(*args))


def _finish(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("something waits that needs an event loop")


async def run_in_thread(
    function: Callable[..., T], *args: object, limiter: trio.CapacityLimiter | None = None
) -> T:
    """Run a blocking or long-computing function in a worker thread, as soon as the limiter has one free."""
    if _is_blocking():
        with _out_of_turn():
            result = function(*args)
        raise_interrupt()
        return result
    import trio

    return await trio.to_thread.run_sync(function, *args, limiter=limiter)


def run_in_loop(function: Callable[..., Coroutine[Any, Any, T]], *args: object) -> T:
    """From a function that runs in a worker thread: await something of the engine."""
    if _is_blocking():
        with _turn:
            return _finish(function(*args))
    import trio

    return trio.from_thread.run(function, *args)


async def checkpoint() -> None:
    """Let others go on, now and then in a long loop."""
    if _is_blocking():
        with _out_of_turn():
            raise_interrupt()
        return
    import trio

    await trio.lowlevel.checkpoint()


class Event(Protocol):
    """What happens once, and may be waited for."""

    def set(self) -> object:
        """It has happened."""

    async def wait(self) -> object:
        """Return once it has happened."""


class _BlockingEvent:
    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        with _out_of_turn():
            self._event.wait()


def new_event() -> Event:
    """An event that has not happened."""
    if _is_blocking():
        return _BlockingEvent()
    import trio

    return trio.Event()


def new_lock() -> trio.Lock:
    """A lock that nobody holds; only an event loop can hold it."""
    import trio

    return trio.Lock()


def new_limiter(most: int) -> trio.CapacityLimiter | None:
    """What limits the threads of `run_in_thread`; nothing where they are the caller's own."""
    if _is_blocking():
        return None
    import trio

    return trio.CapacityLimiter(most)


async def run_all(works: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all of them, beside each other in an event loop. Raises a group of what they raised, or one."""
    if _is_blocking():
        for work in works:
            await work()
        return
    import trio

    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(work)


@asynccontextmanager
async def threads_beside(
    count: int, work: Callable[[], None], call_off: Callable[[], None]
) -> AsyncIterator[None]:
    """Run `work` in so many threads meanwhile, and return when all have ended.

    Where the body ends by an exception, or the waiting does, `call_off` has to end them. Work that takes
    long calls `raise_interrupt` now and then.
    """
    if not _is_blocking():
        import trio

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(run_in_thread, work)
            with _called_off(call_off):
                yield
        return
    threads: list[threading.Thread] = []
    try:
        with _called_off(call_off):
            for _ in range(count):  # those that began are waited for, whatever becomes of the next
                threads.append(_start(partial(_work_blocking, work)))  # noqa: PERF401
            yield
    finally:
        with _out_of_turn():
            for thread in threads:
                thread.join()


def _start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    try:
        thread.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no more threads are to be had; ask for fewer by --threads") from None
    return thread


@contextmanager
def _called_off(call_off: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        call_off()
        raise


def _work_blocking(work: Callable[[], None]) -> None:
    with _blocking():
        work()
