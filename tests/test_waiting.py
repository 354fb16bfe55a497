"""The engine waits in trio's loop or by blocking, and does the same either way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import pytest

from qcowfs.host import waiting
from qcowfs.host.interrupts import raise_interrupt
from qcowfs.host.waiting import (
    checkpoint,
    new_event,
    run_all,
    run_blocking,
    run_in_loop,
    run_in_thread,
    threads_beside,
)

MANY = 200


async def test_functions_run_in_another_thread() -> None:
    assert await run_in_thread(threading.get_ident) != threading.get_ident()
    assert await run_in_thread(divmod, 7, 2) == (3, 1)


def test_where_nothing_else_goes_on_they_run_in_this_one() -> None:
    async def work() -> tuple[int, tuple[int, int]]:
        return await run_in_thread(threading.get_ident), await run_in_thread(divmod, 7, 2)

    assert run_blocking(work) == (threading.get_ident(), (3, 1))


def test_what_it_raises_is_raised_and_the_next_one_runs() -> None:
    async def work(number: int) -> int:
        return await run_in_thread(lambda: 6 // number)

    with pytest.raises(ZeroDivisionError):
        run_blocking(work, 0)
    assert run_blocking(work, 2) == 3


def test_what_needs_a_loop_is_an_error_at_once() -> None:
    class Suspended:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def work() -> None:
        await Suspended()

    with pytest.raises(RuntimeError, match="needs an event loop"):
        run_blocking(work)


def test_works_that_go_beside_each_other_in_a_loop_are_done_in_a_row() -> None:
    done: list[int] = []

    async def note(number: int) -> None:
        await checkpoint()
        done.append(number)

    run_blocking(run_all, [partial(note, number) for number in range(5)])
    assert done == [0, 1, 2, 3, 4]


def nothing() -> None:
    """Nobody is to be called off."""


class Engine:
    """Something that only one thread may be in at a time, but while it waits."""

    def __init__(self) -> None:
        self.inside = 0
        self.entered = 0

    async def enter(self) -> None:
        self.inside += 1
        assert self.inside == 1
        self.entered += 1
        self.inside -= 1
        await run_in_thread(int)
        await checkpoint()


def test_threads_are_in_the_engine_one_after_the_other() -> None:
    engine = Engine()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(MANY):
                run_in_loop(engine.enter)
        except BaseException as error:
            failures.append(error)

    async def main() -> None:
        async with threads_beside(3, work, nothing):
            for _ in range(MANY):
                await engine.enter()

    run_blocking(main)
    assert (failures, engine.entered) == ([], 4 * MANY)


def test_one_thread_waits_for_what_another_does() -> None:
    seen: list[str] = []

    async def main() -> None:
        event = new_event()

        async def set_it() -> None:
            seen.append("set")
            event.set()

        async with threads_beside(1, lambda: run_in_loop(set_it), nothing):
            await event.wait()
            seen.append("heard of it")

    run_blocking(main)
    assert seen == ["set", "heard of it"]


@pytest.mark.parametrize("run", [run_blocking, None], ids=["blocking", "in a loop"])
def test_threads_are_called_off_where_the_body_fails(run: Callable[..., None] | None) -> None:
    import trio

    ended: list[bool] = []
    enough, begun = threading.Event(), threading.Barrier(3)

    def work() -> None:
        begun.wait(60)
        enough.wait(60)
        ended.append(True)

    async def main() -> None:
        async with threads_beside(2, work, enough.set):
            await run_in_thread(begun.wait, 60)
            raise ValueError("the body")

    with pytest.raises((ValueError, ExceptionGroup)):
        (run or trio.run)(main)
    assert ended == [True, True]


def interrupt() -> None:
    """As Ctrl-C does; the handler has run when this returns in the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_is_raised_after_what_it_interrupted() -> None:
    done: list[str] = []

    def write() -> None:
        interrupt()
        done.append("all written")

    async def main() -> None:
        await run_in_thread(write)
        done.append("gone on")

    with pytest.raises(KeyboardInterrupt):
        run_blocking(main)
    assert done == ["all written"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_ends_threads_that_ask_for_it() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                raise_interrupt()
        except KeyboardInterrupt as error:
            failures.append(error)

    async def main() -> None:
        async with threads_beside(1, work, nothing):
            await run_in_thread(lambda: None)
            interrupt()

    run_blocking(main)
    assert len(failures) == 1


def test_no_interrupt_is_left_for_the_next_one() -> None:
    async def noted() -> None:
        interrupt()

    async def main() -> None:
        await checkpoint()

    run_blocking(noted)
    run_blocking(main)


def test_blocking_ends_with_it() -> None:
    async def main() -> bool:
        return waiting._is_blocking()

    assert run_blocking(main)
    assert not waiting._is_blocking()


def test_copying_loads_no_event_loop(tmp_path: Path) -> None:
    """It would take half as long as copying a GiB."""
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * 100_000)
    words: list[str | Path] = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "qcowfs",
        "convert",
        source,
        tmp_path / "copy.qcow2",
    ]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "qcowfs.copying.convert" in loaded
    assert not {name for name in loaded if name.partition(".")[0] in ("trio", "numpy", "logging.handlers")}


@pytest.mark.parametrize("number", [2, 300])
def test_many_interrupts_at_once_are_one(number: int) -> None:
    async def main() -> None:
        for _ in range(number):
            interrupt()
        await checkpoint()

    with pytest.raises(KeyboardInterrupt):
        run_blocking(main)


def test_where_no_thread_is_to_be_had_the_others_are_called_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[threading.Thread] = []
    enough, real = threading.Event(), threading.Thread.start

    def work() -> None:
        enough.wait(60)

    def start(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        real(thread)

    async def main() -> None:
        async with threads_beside(3, work, enough.set):
            raise AssertionError("never reached")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="no more threads are to be had"):
        run_blocking(main)
    assert [thread.is_alive() for thread in begun] == [False, False]
