"""How much space views take: every L2 entry that names a cluster counts one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.geometry import Geometry
from qcowfs.metadata.usage import Usage
from qcowfs.testing import MemoryHostFile
from tests.asserting import little_memory
from tests.builders import BACKING_FORMAT, COPIED, ImageBuilder, deflate, extension, snapshot_record
from tests.memory import MemoryFolder, open_bytes

C = 512


async def allocated(image: ImageBuilder) -> int:
    return await (await open_bytes(image.build())).allocated_bytes()


async def test_an_empty_disk_takes_nothing() -> None:
    assert await allocated(ImageBuilder(1 << 20)) == 0


async def test_a_disk_without_size_takes_nothing() -> None:
    assert await allocated(ImageBuilder(0)) == 0


async def test_only_entries_that_name_a_cluster_count() -> None:
    image = ImageBuilder(64 * C)
    image.normal(0, b"x")
    image.zero_allocated(C)
    image.compressed(2 * C, deflate(b"x" * C))
    image.zero_plain(3 * C)
    image.entry(4 * C, 0)
    assert await allocated(image) == 3 * C


async def test_subclusters_count_as_their_whole_cluster() -> None:
    size = 1 << 14
    image = ImageBuilder(8 * size, cluster_bits=14, extended_l2=True)
    image.subclusters(0, b"x", 0b1)
    image.zero_allocated(size)
    image.zero_plain(2 * size)
    image.compressed(3 * size, deflate(bytes(size)))
    assert await allocated(image) == 3 * size


async def test_the_first_cluster_of_a_data_file_counts() -> None:
    image = ImageBuilder(4 * C)
    image.entry(0, COPIED)
    usage = Usage(MemoryHostFile(image.build()), Geometry(9), image.active.offset, 1)
    assert await usage.allocated_bytes() == C


@given(st.sets(st.integers(0, 999), max_size=60))
async def test_the_count_is_that_of_the_clusters_over_many_tables(numbers: set[int]) -> None:
    image = ImageBuilder(1000 * C)
    for number in numbers:
        image.normal(number * C, b"x")
    assert await allocated(image) == len(numbers) * C


async def test_tables_that_are_lost_count_nothing() -> None:
    image = ImageBuilder(128 * C)
    image.normal(0, b"x")
    image.set_l1(1, 1 << 50)
    assert await allocated(image) == C


async def test_tables_over_more_than_one_chunk_are_counted() -> None:
    # 3000 tables of 512 bytes are more than the MiB that is read at once
    image = ImageBuilder(3000 * 64 * C)
    chosen = random.Random(7).sample(range(3000), 2500)
    for index in chosen:
        image.entry(index * 64 * C, 0x10000 | COPIED)
    assert await allocated(image) == 2500 * C


async def test_counting_many_tables_costs_little() -> None:
    size = 1 << 16
    image = ImageBuilder(400 * size * size // 8, cluster_bits=16)
    table = image.l2_table(0)
    image.normal(0, b"x")
    for index in range(1, 400):
        image.set_l1(index, table)  # all share it, as a hostile image may have it
    file = MemoryHostFile(image.build())
    with little_memory():
        assert await Usage(file, Geometry(16), image.active.offset, 400).allocated_bytes() == 400 * size


async def test_a_snapshot_counts_its_own_clusters_without_the_vm_state() -> None:
    image = ImageBuilder(64 * C)
    tree = image.new_tree(2)
    for guest in (0, 5 * C):
        image.normal(guest, b"x", tree)
    image.normal(64 * C, b"VM state", tree)
    extra = bytes(8) + (64 * C).to_bytes(8, "big")
    image.snapshots.append(snapshot_record(b"1", b"s", l1_offset=tree.offset, l1_size=2, extra=extra))
    disk = await open_bytes(image.build())
    assert await disk.snapshot_view(disk.snapshots[0]).allocated_bytes() == 2 * C
    assert await disk.allocated_bytes() == 0


@pytest.mark.parametrize(("below", "expected"), [(0, C), (100, C + 100), (3 * C, 4 * C), (500 * C, 64 * C)])
async def test_a_chain_takes_at_most_the_whole_disk(below: int, expected: int) -> None:
    image = ImageBuilder(64 * C, backing_name=b"b", extensions=extension(BACKING_FORMAT, b"raw"))
    image.normal(0, b"x")
    disk = await MemoryFolder({"a": image.build(), "b": bytes(below)}).image("a")
    assert await disk.allocated_bytes() == expected


@pytest.mark.parametrize(("tables", "quick"), [(1, True), (256, True), (257, False)])
async def test_small_disks_are_counted_quickly(tables: int, quick: bool) -> None:
    disk = await open_bytes(ImageBuilder(tables * 64 * C).build())
    assert disk.active.counts_quickly is quick
    assert disk.active.cluster_size == C


async def test_an_error_of_the_host_passes() -> None:
    image = ImageBuilder(64 * C)
    image.normal(0, b"x")
    file = MemoryHostFile(image.build())
    file.fail_reads(image.l2_table(0), 1)
    with pytest.raises(OSError, match="Input/output error"):
        await Usage(file, Geometry(9), image.active.offset, 1).allocated_bytes()
