"""Who may use which bytes of a data file together, and who waits for whom."""

from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from qcowfs.data.sector_locks import Range, SectorLocks

RANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda r: (r[0], r[0] + r[1])),
    min_size=1,
    max_size=3,
)


class Users:
    """Tasks that hold ranges until they are told to stop."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.locks = SectorLocks()
        self.nursery = nursery
        self.holding: list[str] = []
        self.stop: dict[str, trio.Event] = {}

    async def start(self, name: str, *ranges: Range, shared: bool) -> trio.CancelScope:
        scope = trio.CancelScope()
        self.stop[name] = trio.Event()
        self.nursery.start_soon(self._use, name, ranges, shared, scope)
        await wait_all_tasks_blocked()
        return scope

    async def _use(self, name: str, ranges: tuple[Range, ...], shared: bool, scope: trio.CancelScope) -> None:
        with scope:
            use = await self.locks.hold(ranges, shared=shared)
            self.holding.append(name)
            await self.stop[name].wait()
            self.locks.release(use)
            self.holding.remove(name)

    async def end(self, *names: str) -> None:
        for name in names:
            self.stop[name].set()
            await wait_all_tasks_blocked()


async def test_readers_go_together_and_a_writer_alone(nursery: trio.Nursery) -> None:
    users = Users(nursery)
    await users.start("reader", (0, 10), shared=True)
    await users.start("another", (5, 15), shared=True)
    await users.start("writer", (9, 11), shared=False)
    assert users.holding == ["reader", "another"]
    await users.end("reader")
    assert users.holding == ["another"]
    await users.end("another")
    assert users.holding == ["writer"]
    await users.end("writer")
    assert users.locks.is_free(0, 100, shared=False)


async def test_a_writer_that_waits_is_not_passed_by_for_ever(nursery: trio.Nursery) -> None:
    users = Users(nursery)
    await users.start("reader", (0, 10), shared=True)
    await users.start("writer", (0, 10), shared=False)
    await users.start("late reader", (0, 10), shared=True)
    await users.start("elsewhere", (10, 20), shared=False)
    assert users.holding == ["reader", "elsewhere"]
    await users.end("reader")
    assert users.holding == ["elsewhere", "writer"]
    await users.end("writer", "elsewhere")
    assert users.holding == ["late reader"]
    await users.end("late reader")


async def test_who_gives_up_waiting_is_in_nobodys_way(nursery: trio.Nursery) -> None:
    users = Users(nursery)
    await users.start("reader", (0, 10), shared=True)
    writer = await users.start("writer", (0, 10), shared=False)
    await users.start("late reader", (0, 10), shared=True)
    writer.cancel()
    await wait_all_tasks_blocked()
    assert users.holding == ["reader", "late reader"]
    await users.end("reader", "late reader")
    assert users.locks.is_free(0, 100, shared=False)


async def test_what_needs_no_waiting_asks_whether_bytes_are_free(nursery: trio.Nursery) -> None:
    users = Users(nursery)
    await users.start("reader", (0, 10), (20, 30), shared=True)
    assert users.locks.is_free(25, 26, shared=True)
    assert not users.locks.is_free(25, 26, shared=False)
    assert users.locks.is_free(10, 20, shared=False)
    await users.end("reader")
    await users.start("writer", (0, 10), shared=False)
    assert not users.locks.is_free(9, 10, shared=True)
    await users.end("writer")


@given(st.lists(st.tuples(RANGES, st.booleans()), max_size=8))
def test_nobody_shares_bytes_with_a_writer_and_everybody_has_his_turn(
    wanted: list[tuple[list[Range], bool]],
) -> None:
    trio.run(all_have_their_turn, wanted)


async def all_have_their_turn(wanted: list[tuple[list[Range], bool]]) -> None:
    locks = SectorLocks()
    users: dict[int, tuple[int, int]] = {}
    done: list[int] = []

    def note(ranges: list[Range], shared: bool, change: int) -> None:
        for byte in {byte for start, end in ranges for byte in range(start, end)}:
            readers, writers = users.get(byte, (0, 0))
            users[byte] = (readers + change, writers) if shared else (readers, writers + change)
            assert users[byte] in ((0, 0), (0, 1)) or not users[byte][1]

    async def use(number: int, ranges: list[Range], shared: bool) -> None:
        held = await locks.hold(ranges, shared=shared)
        note(ranges, shared, 1)
        for _ in range(number % 3):
            await trio.lowlevel.checkpoint()
        note(ranges, shared, -1)
        locks.release(held)
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number, (ranges, shared) in enumerate(wanted):
            nursery.start_soon(use, number, ranges, shared)
    assert sorted(done) == list(range(len(wanted)))
    assert locks.is_free(0, 100, shared=False)
