"""The write-back side of the table cache: nothing dirty is lost, however it leaves memory or fails."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.format.words import TABLE_WORDS, Words
from qcowfs.geometry import Geometry
from qcowfs.metadata.cache import TableCache
from qcowfs.metadata.lru import BoundedStore
from qcowfs.testing import MemoryHostFile, Write

GEOMETRY = Geometry(9)
SLICE = 512


def cache_of(file: MemoryHostFile, limit: int = 1 << 20, words: Words = TABLE_WORDS) -> TableCache:
    return TableCache(file, GEOMETRY, BoundedStore(limit), words)


async def change(tables: TableCache, offset: int, value: int) -> None:
    """Set the first word of a slice."""
    words = await tables.load(offset)
    words[0] = value
    tables.mark_dirty(offset, words)


def first_words(file: MemoryHostFile, count: int) -> list[int]:
    return [int.from_bytes(file.data[n * SLICE : n * SLICE + 8], "big") for n in range(count)]


async def test_a_batch_holds_what_was_dirty_when_it_was_taken() -> None:
    file = MemoryHostFile(bytes(4 * SLICE))
    tables = cache_of(file)
    await change(tables, SLICE, 1)
    batch = tables.take_dirty()
    await change(tables, SLICE, 2)
    await change(tables, 0, 3)
    await tables.write(batch)
    assert first_words(file, 2) == [0, 1]
    tables.settle(batch)
    await tables.write(tables.take_dirty())
    assert first_words(file, 2) == [3, 2]


async def test_neighbours_are_written_together() -> None:
    file = MemoryHostFile(bytes(8 * SLICE))
    tables = cache_of(file)
    for number in (5, 2, 1, 3):
        await change(tables, number * SLICE, number)
    await tables.write(tables.take_dirty())
    written = [(e.offset, len(e.data)) for e in file.log if isinstance(e, Write)]
    assert written == [(SLICE, 3 * SLICE), (5 * SLICE, SLICE)]


async def test_what_is_given_back_is_dirty_again() -> None:
    tables = cache_of(MemoryHostFile(bytes(4 * SLICE)))
    await change(tables, 0, 1)
    batch = tables.take_dirty()
    assert not tables.dirty_bytes
    await change(tables, SLICE, 2)
    tables.give_back(batch)
    again = tables.take_dirty()
    assert {offset: data[7] for offset, data in again.slices.items()} == {0: 1, SLICE: 2}


async def test_a_slice_that_changed_since_is_given_back_as_it_is_now() -> None:
    tables = cache_of(MemoryHostFile(bytes(4 * SLICE)))
    await change(tables, 0, 1)
    batch = tables.take_dirty()
    await change(tables, 0, 9)
    tables.give_back(batch)
    assert {offset: data[7] for offset, data in tables.take_dirty().slices.items()} == {0: 9}


async def test_what_is_settled_is_clean() -> None:
    tables = cache_of(MemoryHostFile(bytes(4 * SLICE)))
    await change(tables, 0, 1)
    batch = tables.take_dirty()
    tables.settle(batch)
    tables.give_back(batch)
    assert not tables.take_dirty()


@pytest.mark.parametrize("state", ["dirty", "being written"])
async def test_what_is_not_on_disk_stays_whatever_the_bound(state: str) -> None:
    file = MemoryHostFile(bytes(64 * SLICE))
    tables = cache_of(file, limit=1)
    for number in range(20):
        await change(tables, number * SLICE, number + 1)
    if state == "being written":
        tables.take_dirty()
    for number in range(20, 64):
        await tables.load(number * SLICE)
    assert [(await tables.load(n * SLICE))[0] for n in range(20)] == list(range(1, 21))
    found = tables.get(0)
    assert found is not None
    assert found[0] == 1


async def test_fresh_slices_are_zeros_and_dirty_and_need_no_file() -> None:
    file = MemoryHostFile(b"")
    tables = cache_of(file)
    words = tables.put_zeros(7 * SLICE)
    assert words == array("Q", bytes(SLICE))
    assert tables.get(7 * SLICE) is words
    words[0] = 4
    await tables.write(tables.take_dirty())
    assert first_words(file, 8)[7] == 4


@pytest.mark.parametrize("bits", [1, 8, 64])
async def test_slices_are_packed_by_their_width(bits: int) -> None:
    file = MemoryHostFile(bytes(SLICE))
    tables = cache_of(file, words=Words(bits))
    words = await tables.load(0)
    assert len(words) == SLICE * 8 // bits
    words[0] = 1
    tables.mark_dirty(0, words)
    await tables.write(tables.take_dirty())
    assert file.data.index(1) == bits // 8 - (bits >= 8)


@given(
    st.lists(
        st.tuples(st.sampled_from(["change", "take", "write", "fail", "load"]), st.integers(0, 30)),
        max_size=60,
    )
)
async def test_nothing_is_lost_whatever_the_order(steps: list[tuple[str, int]]) -> None:
    file, model = MemoryHostFile(bytes(31 * SLICE)), [0] * 31
    tables, batch = cache_of(file, limit=3 * (SLICE + 400)), None
    for value, (step, number) in enumerate(steps, 1):
        if step == "change":
            await change(tables, number * SLICE, value)
            model[number] = value
        elif step == "take" and batch is None:
            batch = tables.take_dirty()
        elif step == "write" and batch is not None:
            await tables.write(batch)
            tables.settle(batch)
            batch = None
        elif step == "fail" and batch is not None:
            tables.give_back(batch)
            batch = None
        assert (await tables.load(number * SLICE))[0] == model[number]
    if batch is not None:
        tables.give_back(batch)
    await tables.write(tables.take_dirty())
    assert first_words(file, 31) == model
