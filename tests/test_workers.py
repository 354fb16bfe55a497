"""Workers end with the work, with a failure, or when they are called off; and turns keep their order."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from qcowfs.copying.workers import Turns, Workers


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def test_every_piece_is_done_once_and_passes_in_order() -> None:
    turns, passed = Turns(), []

    def make() -> Callable[[int], None]:
        def do(number: int) -> None:
            with turns.turn(number):
                passed.append(number)

        return do

    await Workers(3, make, turns).run(numbers(500))
    assert passed == list(range(500))


async def test_a_failure_ends_all_and_is_told_once() -> None:
    turns, threads = Turns(), threading.active_count()

    def do(number: int) -> None:
        with turns.turn(number):
            if number == 7:
                raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        await Workers(3, lambda: do, turns).run(numbers(100_000))
    assert threading.active_count() <= threads + 4  # the idle ones are kept for the next work


async def test_a_failing_source_ends_the_workers() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 0
        yield 2  # which waits for 1 in vain
        raise ValueError("source")

    turns = Turns()

    def do(number: int) -> None:
        with turns.turn(number):
            pass

    with pytest.raises(ExceptionGroup) as caught:
        await Workers(2, lambda: do, turns).run(broken())
    assert caught.group_contains(ValueError, match="source")


async def test_they_can_be_called_off() -> None:
    started = threading.Event()

    async def endless() -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1
            await trio.lowlevel.checkpoint()

    done = []

    def do(number: int) -> None:
        done.append(number)
        started.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Workers(2, lambda: do, Turns()).run, endless())
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()
    assert done
