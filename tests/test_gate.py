"""Many pass the gate at a time, or one alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfs.disk.gate import Gate


@asynccontextmanager
async def passing(gate: Gate) -> AsyncIterator[None]:
    await gate.enter()
    try:
        yield
    finally:
        gate.leave()


class Visit:
    """A task that passes the gate, and stays until it is told to leave."""

    def __init__(self, gate: Gate, log: list[str], name: str, *, alone: bool) -> None:
        self.gate, self.log, self.name, self.alone = gate, log, name, alone
        self.leave = trio.Event()
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            async with self.gate.alone() if self.alone else passing(self.gate):
                self.log.append(f"{self.name} in")
                await self.leave.wait()
                self.log.append(f"{self.name} out")


async def test_many_pass_beside_each_other(nursery: trio.Nursery) -> None:
    gate, log = Gate(), list[str]()
    visits = [Visit(gate, log, name, alone=False) for name in "ab"]
    for visit in visits:
        nursery.start_soon(visit.run)
    await wait_all_tasks_blocked()
    assert sorted(log) == ["a in", "b in"]
    assert gate.is_open
    for visit in visits:
        visit.leave.set()


async def test_one_alone_waits_for_those_inside_and_keeps_new_ones_out(nursery: trio.Nursery) -> None:
    gate, log = Gate(), list[str]()
    first, lone, late = (Visit(gate, log, n, alone=n == "lone") for n in ("first", "lone", "late"))
    for visit in (first, lone, late):
        nursery.start_soon(visit.run)
        await wait_all_tasks_blocked()
    assert log == ["first in"]
    assert not gate.is_open
    first.leave.set()
    await wait_all_tasks_blocked()
    assert log == ["first in", "first out", "lone in"]
    lone.leave.set()
    late.leave.set()
    await wait_all_tasks_blocked()
    assert log[3:] == ["lone out", "late in", "late out"]
    assert gate.is_open


async def test_those_who_want_to_be_alone_take_turns(nursery: trio.Nursery) -> None:
    gate, log = Gate(), list[str]()
    visits = [Visit(gate, log, name, alone=True) for name in "ab"]
    for visit in visits:
        nursery.start_soon(visit.run)
        await wait_all_tasks_blocked()
    assert log == ["a in"]
    visits[0].leave.set()
    await wait_all_tasks_blocked()
    assert log == ["a in", "a out", "b in"]
    visits[1].leave.set()
    await wait_all_tasks_blocked()
    assert gate.is_open


@pytest.mark.parametrize("who", ["waiting alone", "passing", "late"])
async def test_one_who_gives_up_holds_nobody_back(who: str, nursery: trio.Nursery) -> None:
    gate, log = Gate(), list[str]()
    passing, lone, late = (Visit(gate, log, n, alone=n == "lone") for n in ("passing", "lone", "late"))
    for visit in (passing, lone, late):
        nursery.start_soon(visit.run)
        await wait_all_tasks_blocked()
    {"waiting alone": lone, "passing": passing, "late": late}[who].scope.cancel()
    for visit in (passing, lone, late):
        await wait_all_tasks_blocked()
        visit.leave.set()
    await wait_all_tasks_blocked()
    left = {"waiting alone": {"passing", "late"}, "passing": {"lone", "late"}, "late": {"passing", "lone"}}
    assert {line.split()[0] for line in log if line.endswith("out")} == left[who]
    assert gate.is_open


async def test_a_failure_inside_opens_the_gate_again() -> None:
    gate = Gate()
    for door in (gate.alone, lambda: passing(gate)):
        with pytest.raises(RuntimeError, match="inside"):
            async with door():
                raise RuntimeError("inside")
        assert gate.is_open
    async with gate.alone():
        assert not gate.is_open
