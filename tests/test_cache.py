"""The table cache: each slice is read once, whoever asks, and kept within the bound."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from qcowfs.errors import CorruptImage
from qcowfs.format.words import TABLE_WORDS
from qcowfs.geometry import Geometry
from qcowfs.host.hostfile import ReadRequest
from qcowfs.metadata.cache import SliceStore, TableCache
from qcowfs.metadata.lru import BoundedStore
from tests.asserting import raises_exactly
from tests.memory import CountedFile

GEOMETRY = Geometry(16)
SLICE = 4096


class SlowFile(CountedFile):
    """A file whose reads wait until they are let go; the first ones may fail."""

    def __init__(self, data: bytes, failures: int = 0) -> None:
        super().__init__(data)
        self.let_go = trio.Event()
        self.failures = failures

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        await self.let_go.wait()
        await super().read_into(requests)
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "injected")


def cache_of(file: CountedFile, limit: int = 1 << 20) -> TableCache:
    return TableCache(file, GEOMETRY, BoundedStore(limit), TABLE_WORDS)


def words(count: int, first: int = 0) -> bytes:
    return b"".join(n.to_bytes(8, "big") for n in range(first, first + count))


async def test_a_slice_holds_the_words_of_its_place() -> None:
    tables = cache_of(CountedFile(words(3 * 512)))
    assert tables.get(SLICE) is None
    loaded = await tables.load(SLICE)
    assert loaded == array("Q", range(512, 1024))
    assert tables.get(SLICE) is loaded


async def test_large_words_are_unsigned() -> None:
    tables = cache_of(CountedFile(b"\xff" * SLICE))
    assert (await tables.load(0))[0] == (1 << 64) - 1


async def test_a_slice_in_memory_is_not_read_again() -> None:
    file = CountedFile(words(512))
    tables = cache_of(file)
    assert await tables.load(0) is await tables.load(0)
    assert file.reads == [[(0, SLICE)]]


async def test_two_readers_of_one_missing_slice_load_it_once() -> None:
    file = SlowFile(words(512))
    tables = cache_of(file)
    found: list[array[int]] = []

    async def reader() -> None:
        found.append(await tables.load(0))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        file.let_go.set()
    assert file.reads == [[(0, SLICE)]]
    assert found[0] is found[1] is found[2]


async def test_readers_of_different_slices_do_not_wait_for_each_other() -> None:
    file = SlowFile(words(1024))
    tables = cache_of(file)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tables.load, 0)
        nursery.start_soon(tables.load, SLICE)
        await trio.testing.wait_all_tasks_blocked()
        file.let_go.set()
    assert sorted(file.reads) == [[(0, SLICE)], [(SLICE, SLICE)]]


async def test_a_waiting_reader_tries_again_where_the_first_one_failed() -> None:
    file = SlowFile(words(512), failures=1)
    tables = cache_of(file)
    outcomes: list[str] = []

    async def reader() -> None:
        try:
            await tables.load(0)
        except OSError as error:
            outcomes.append(str(error.errno))
        else:
            outcomes.append("found")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        file.let_go.set()
    assert sorted(outcomes) == sorted([str(errno.EIO), "found"])
    assert len(file.reads) == 2


async def test_a_cancelled_reader_leaves_the_slice_to_the_next_one() -> None:
    file = SlowFile(words(512))
    tables = cache_of(file)
    with trio.CancelScope() as scope:
        scope.cancel()
        await tables.load(0)
    assert scope.cancelled_caught
    file.let_go.set()
    assert (await tables.load(0))[1] == 1


async def test_a_table_in_the_last_cluster_is_zeros_beyond_the_end_of_the_file() -> None:
    tables = cache_of(CountedFile(words(3)))
    assert list(await tables.load(0)) == [0, 1, 2, *[0] * 509]
    assert list(await tables.load(2 * SLICE)) == [0] * 512


@pytest.mark.parametrize("offset", [1 << 16, (1 << 16) + SLICE, 1 << 55])
async def test_a_cluster_wholly_past_the_end_holds_no_table(offset: int) -> None:
    tables = cache_of(CountedFile(bytes(1 << 16)))
    with raises_exactly(CorruptImage, "the table lies past the end of the file (65536 bytes)"):
        await tables.load(offset)
    assert tables.get(offset) is None


async def test_slices_beyond_the_bound_are_dropped_and_read_again() -> None:
    file = CountedFile(words(512 * 4))
    tables = cache_of(file, limit=2 * (SLICE + 400))
    for offset in (0, SLICE, 2 * SLICE, SLICE, 0):
        await tables.load(offset)
    assert [reads[0][0] for reads in file.reads] == [0, SLICE, 2 * SLICE, 0]


async def test_caches_that_share_a_store_share_its_bound_but_not_their_slices() -> None:
    store: SliceStore = BoundedStore(3 * (SLICE + 400))
    first = TableCache(CountedFile(words(512)), GEOMETRY, store, TABLE_WORDS)
    second = TableCache(CountedFile(words(512, 7)), GEOMETRY, store, TABLE_WORDS)
    assert (await first.load(0))[0] == 0
    assert (await second.load(0))[0] == 7
    assert first.get(0) != second.get(0)
    assert store.bytes_used == 2 * (SLICE + 400)
