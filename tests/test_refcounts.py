"""The allocator: counts of every width, runs, reuse, growth, and what it refuses before anything changes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qcowfs.errors import CorruptImage, MetadataOverlap, UsageError
from qcowfs.format.header import Header
from qcowfs.format.words import Words
from qcowfs.metadata.cache import SliceStore, TableCache
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.metadata.refcounts import Refcounts
from qcowfs.testing import MemoryHostFile
from tests.asserting import raises_exactly
from tests.host_files import poke_word, word
from tests.shapes import DISK, Shape, make

C = 512
WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@dataclass
class Allocator:
    """Refcounts of an image in memory, with what belongs to them."""

    file: MemoryHostFile
    blocks: TableCache
    metadata: MetadataMap
    refcounts: Refcounts

    async def flush(self) -> None:
        """Write the counts, the table and its place, as a flush does."""
        blocks, change = self.blocks.take_dirty(), self.refcounts.take_change()
        await self.blocks.write(blocks)
        self.blocks.settle(blocks)
        if change is not None:
            await self.file.write_from(list(change.pieces.items()))
            if change.moved_to is not None:
                poke_word(self.file.data, 48, change.moved_to[0])
                poke_word(self.file.data, 56, change.moved_to[1], 4)

    async def reopened(self) -> Allocator:
        return await allocator(bytes(self.file.data))

    async def counts(self, clusters: range) -> list[int]:
        return [await self.refcounts.get(cluster) for cluster in clusters]


def empty(bits: int = 16, cluster_size: int = C) -> bytes:
    return make(Shape(cluster_size, 100 << 10, 3, bits, filled=False)).files[DISK]


async def allocator(data: bytes) -> Allocator:
    file = MemoryHostFile(data)
    header = Header.unpack(data[: 1 << 16])
    store = SliceStore(1 << 20, 16)
    blocks = TableCache(file, header.geometry, store, Words(1 << header.refcount_order))
    metadata = MetadataMap(header.cluster_bits)
    refcounts = Refcounts(header, blocks, metadata)
    await refcounts.load(file)
    return Allocator(file, blocks, metadata, refcounts)


@pytest.mark.parametrize("bits", WIDTHS)
async def test_counts_of_every_width_are_kept(bits: int) -> None:
    it = await allocator(empty(bits))
    offset, count = await it.refcounts.allocate(5)
    first = offset // C
    most = min(it.refcounts.maximum, 9)
    await it.refcounts.change(first, most - 1)
    await it.refcounts.change(first + 1, -1)
    await it.flush()
    again = await it.reopened()
    assert await again.counts(range(first, first + 6)) == [most, 0, 1, 1, 1, 0]
    assert count == 5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
async def test_an_overflow_is_refused_before_anything_changes(bits: int) -> None:
    it = await allocator(empty(bits))
    offset, _ = await it.refcounts.allocate(1)
    most = it.refcounts.maximum
    await it.refcounts.change(offset // C, most - 1)
    await it.flush()
    text = (
        f"host offset {offset:#x} would have {most + 1} references, refcounts of {bits} bits hold {most}; "
        "widen them with qcowfs amend -o refcount_bits=16"
    )
    with raises_exactly(UsageError, text):
        await it.refcounts.change(offset // C, 1)
    assert await it.refcounts.get(offset // C) == most
    assert not it.blocks.dirty_bytes


async def test_a_count_below_zero_is_refused() -> None:
    it = await allocator(empty())
    offset, _ = await it.refcounts.allocate(1)
    await it.refcounts.change(offset // C, -1)
    with raises_exactly(CorruptImage, f"refcount of host offset {offset:#x} is 0 but it is in use"):
        await it.refcounts.change(offset // C, -1)
    with raises_exactly(CorruptImage, f"refcount of host offset {1_000_000 * C:#x} is 0 but it is in use"):
        await it.refcounts.change(1_000_000, -1)
    assert await it.refcounts.get(1_000_000) == 0


async def test_runs_follow_each_other() -> None:
    it = await allocator(empty())
    first, count = await it.refcounts.allocate(7)
    assert count == 7
    assert await it.refcounts.allocate(3) == (first + 7 * C, 3)


async def test_freed_clusters_are_found_again_lowest_first() -> None:
    it = await allocator(empty())
    first, _ = await it.refcounts.allocate(20)
    for number in (12, 4, 5):
        await it.refcounts.change(first // C + number, -1)
    assert await it.refcounts.allocate(9) == (first + 4 * C, 2)
    assert await it.refcounts.allocate(9) == (first + 12 * C, 1)
    assert await it.refcounts.allocate(9) == (first + 20 * C, 9)


async def test_a_released_allocation_is_free_again() -> None:
    it = await allocator(empty())
    first, count = await it.refcounts.allocate(4)
    await it.refcounts.release(first, count)
    assert await it.refcounts.allocate(4) == (first, 4)


@pytest.mark.parametrize("bits", WIDTHS)
async def test_blocks_are_added_where_the_old_ones_end(bits: int) -> None:
    it = await allocator(empty(bits))
    taken = await take(it, 2 * (C * 8 // bits) + 3)
    assert len(it.refcounts.blocks) == 3
    await it.flush()
    again = await it.reopened()
    blocks = {offset // C for offset in again.refcounts.blocks}
    assert len(blocks) == 3
    assert not blocks & taken
    assert {await again.refcounts.get(cluster) for cluster in taken | blocks} == {1}
    assert sum(it.metadata.overlaps(offset, C) for offset in it.refcounts.blocks) == 2  # the new ones


@pytest.mark.parametrize("flushes", [False, True])
async def test_a_table_that_is_full_moves_even_twice(flushes: bool) -> None:
    it = await allocator(empty(64))
    old = it.refcounts.table_extent
    extents, taken = {old}, set[int]()
    while len(extents) < 3:
        taken |= await take(it, 64)
        if flushes:
            await it.flush()
        extents.add(it.refcounts.table_extent)
    assert old == (C, C)
    assert it.metadata.overlaps(it.refcounts.table_extent[0], C)
    await it.flush()
    again = await it.reopened()
    assert again.refcounts.table_extent == it.refcounts.table_extent
    start, size = again.refcounts.table_extent
    own = set(range(start // C, (start + size) // C)) | {offset // C for offset in again.refcounts.blocks}
    assert not own & taken
    assert {await again.refcounts.get(cluster) for cluster in taken | own} == {1}


async def take(it: Allocator, wanted: int) -> set[int]:
    """Allocate so many clusters; none is handed out twice."""
    taken: set[int] = set()
    while len(taken) < wanted:
        offset, count = await it.refcounts.allocate(wanted - len(taken))
        new = set(range(offset // C, offset // C + count))
        assert not new & taken
        taken |= new
    return taken


async def test_a_change_that_was_given_back_is_taken_again() -> None:
    it = await allocator(empty(64))
    await take(it, 64 * 64)
    change = it.refcounts.take_change()
    assert change is not None
    assert change.moved_to is not None
    assert it.refcounts.take_change() is None
    it.refcounts.give_back(change)
    assert it.refcounts.take_change() == change


async def test_counts_that_call_metadata_free_are_refused() -> None:
    it = await allocator(empty())
    offset, _ = await it.refcounts.allocate(1)
    it.metadata.add(offset + C, C)
    text = f"host offset {offset + C:#x}: the refcounts call a cluster of metadata free"
    with raises_exactly(MetadataOverlap, text):
        await it.refcounts.allocate(3)
    assert await it.refcounts.get(offset // C + 1) == 0


async def test_a_run_ends_before_metadata() -> None:
    it = await allocator(empty())
    offset, _ = await it.refcounts.allocate(1)
    it.metadata.add(offset + 4 * C, C)
    assert await it.refcounts.allocate(9) == (offset + C, 3)
    assert await it.counts(range(offset // C + 1, offset // C + 6)) == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("within", range(3))
async def test_a_table_that_would_move_onto_metadata_stays_where_it_is(within: int) -> None:
    it = await allocator(empty(64))
    end = 64 * 64
    it.metadata.add((end + within) * C, C)
    extent = it.refcounts.table_extent
    with pytest.raises(MetadataOverlap, match="call a cluster of metadata free"):
        await take(it, end)
    assert it.refcounts.table_extent == extent
    change = it.refcounts.take_change()
    assert change is None or change.moved_to is None


async def test_an_entry_that_is_not_aligned_is_refused() -> None:
    data = bytearray(make(Shape(4096, 100 << 10, filled=False)).files[DISK])
    poke_word(data, word(data, 48) + 8, 0x1200)
    with raises_exactly(CorruptImage, "refcount table entry 1: block 0x1200 is not cluster aligned"):
        await allocator(bytes(data))


async def test_a_block_past_the_end_of_the_file_is_named() -> None:
    data = bytearray(empty())
    poke_word(data, word(data, 48), 0x70000)
    it = await allocator(bytes(data))
    size = len(data)
    text = f"refcount block at 0x70000: the table lies past the end of the file ({size} bytes)"
    with raises_exactly(CorruptImage, text):
        await it.refcounts.allocate(1)
