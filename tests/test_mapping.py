"""Where guest offsets lie: each kind of L2 entry, merging, and the boundaries of tables and slices."""

from __future__ import annotations

import pytest

from qcowfs.format.words import TABLE_WORDS
from qcowfs.geometry import Geometry
from qcowfs.metadata.cache import TableCache
from qcowfs.metadata.lru import BoundedStore
from qcowfs.metadata.mapping import Extent, Mapping
from qcowfs.testing import MemoryHostFile
from tests.builders import COPIED, ImageBuilder

C = 512
KIB32 = 64 * C  # what one L2 table covers

Found = tuple[str, int, int, int]


def mapping_of(image: ImageBuilder, *, has_data_file: bool = False) -> Mapping:
    """The mapping of the built image's live disk."""
    geometry = Geometry(image.cluster_bits, image.extended_l2)
    tables = TableCache(MemoryHostFile(image.build()), geometry, BoundedStore(1 << 20), TABLE_WORDS)
    active = image.active
    return Mapping(
        tables, tables, geometry, active.offset, active.entries,
        version=image.version, has_data_file=has_data_file,
    )  # fmt: skip


def shown(extents: list[Extent]) -> list[Found]:
    """Each extent as (kind, guest offset, length, host offset)."""
    return [(e.kind.value, e.guest_offset, e.length, e.host_offset) for e in extents]


async def resolve(image: ImageBuilder, guest: int, length: int) -> list[Found]:
    return shown(await mapping_of(image).resolve(guest, length))


async def test_without_an_l2_table_everything_is_unallocated() -> None:
    assert await resolve(ImageBuilder(4 * KIB32), 0, 4 * KIB32) == [("unallocated", 0, 4 * KIB32, 0)]


async def test_nothing_is_asked_and_nothing_is_answered() -> None:
    assert await resolve(ImageBuilder(KIB32), 100, 0) == []


async def test_an_entry_of_zeros_is_unallocated() -> None:
    image = ImageBuilder(KIB32)
    image.l2_table(0)
    assert await resolve(image, 0, KIB32) == [("unallocated", 0, KIB32, 0)]


async def test_a_normal_cluster_is_data_at_its_host_offset() -> None:
    image = ImageBuilder(KIB32)
    host = image.normal(5 * C, b"x")
    assert await resolve(image, 5 * C, C) == [("data", 5 * C, C, host)]


async def test_a_request_within_a_cluster_starts_within_it_on_the_host() -> None:
    image = ImageBuilder(KIB32)
    host = image.normal(5 * C, b"x")
    assert await resolve(image, 5 * C + 7, 100) == [("data", 5 * C + 7, 100, host + 7)]


async def test_a_clear_copied_flag_makes_no_difference() -> None:
    image = ImageBuilder(KIB32)
    host = image.normal(0, b"x")
    image.entry(0, host)
    image.set_l1(0, image.l2_table(0))
    assert await resolve(image, 0, C) == [("data", 0, C, host)]


async def test_reserved_bits_of_entries_make_no_difference() -> None:
    image = ImageBuilder(KIB32)
    host = image.normal(0, b"x")
    image.entry(0, host | 0x3F00_0000_0000_01FE)
    image.set_l1(0, image.l2_table(0) | 0x7F00_0000_0000_01FF)
    assert await resolve(image, 0, C) == [("data", 0, C, host)]


async def test_zero_clusters_are_zeros_whether_they_have_a_host_cluster_or_not() -> None:
    image = ImageBuilder(KIB32)
    image.zero_plain(0)
    image.zero_allocated(C)
    assert await resolve(image, 0, 3 * C) == [("zero", 0, 2 * C, 0), ("unallocated", 2 * C, C, 0)]


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
async def test_a_compressed_cluster_tells_where_its_stored_bytes_may_lie(cluster_bits: int) -> None:
    size = 1 << cluster_bits
    image = ImageBuilder(3 * size, cluster_bits=cluster_bits)
    host = image.compressed(size, bytes(600 if size > 512 else 300))
    end = ((host + (600 if size > 512 else 300) - 1) // 512 + 1) * 512
    [extent] = await mapping_of(image).resolve(size + 9, 20)
    assert shown([extent]) == [("compressed", size + 9, 20, host)]
    assert extent.stored == end - host


async def test_each_compressed_cluster_is_an_extent_of_its_own() -> None:
    image = ImageBuilder(KIB32)
    hosts = [image.compressed(n * C, bytes(100)) for n in range(3)]
    expected = [("compressed", n * C, C, host) for n, host in enumerate(hosts)]
    assert await resolve(image, 0, 3 * C) == expected


async def test_clusters_that_follow_each_other_on_the_host_are_one_extent() -> None:
    image = ImageBuilder(KIB32)
    image.l2_table(0)
    hosts = [image.normal(n * C, b"x") for n in range(4)]
    assert await resolve(image, 100, 3 * C) == [("data", 100, 3 * C, hosts[0] + 100)]


async def test_clusters_in_another_order_on_the_host_are_not_merged() -> None:
    image = ImageBuilder(KIB32)
    image.l2_table(0)
    second, first = image.normal(C, b"x"), image.normal(0, b"x")
    assert await resolve(image, 0, 2 * C) == [("data", 0, C, first), ("data", C, C, second)]


async def test_data_on_both_sides_of_a_hole_is_not_merged() -> None:
    image = ImageBuilder(KIB32)
    image.l2_table(0)
    host = image.normal(0, b"x" * 3 * C)
    image.entry(2 * C, host + 2 * C)
    assert await resolve(image, 0, 3 * C) == [
        ("data", 0, C, host), ("unallocated", C, C, 0), ("data", 2 * C, C, host + 2 * C),
    ]  # fmt: skip


async def test_extents_are_merged_over_l2_tables() -> None:
    image = ImageBuilder(2 * KIB32)
    image.l2_table(0)
    image.l2_table(KIB32)
    host = image.normal(KIB32 - C, b"x")
    assert image.normal(KIB32, b"x") == host + C
    image.zero_plain(KIB32 + C)
    assert await resolve(image, KIB32 - C, 4 * C) == [
        ("data", KIB32 - C, 2 * C, host), ("zero", KIB32 + C, C, 0), ("unallocated", KIB32 + 2 * C, C, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("cluster_bits", [13, 16])
async def test_entries_on_both_sides_of_an_l2_slice_are_found(cluster_bits: int) -> None:
    size = 1 << cluster_bits
    boundary = 512 * size  # a slice is 4096 bytes of 8-byte entries
    image = ImageBuilder(2 * boundary, cluster_bits=cluster_bits)
    image.l2_table(0)
    host = image.normal(boundary - size, b"x")
    image.normal(boundary, b"x")
    assert await resolve(image, boundary - 2 * size, 4 * size) == [
        ("unallocated", boundary - 2 * size, size, 0),
        ("data", boundary - size, 2 * size, host),
        ("unallocated", boundary + size, size, 0),
    ]


async def test_entries_on_both_sides_of_an_l1_slice_are_found() -> None:
    boundary = 64 * KIB32  # a slice of the L1 table is a cluster of 64 entries here
    image = ImageBuilder(2 * boundary)
    last, first = image.normal(boundary - C, b"x"), image.normal(boundary, b"x")
    assert await resolve(image, boundary - C, 2 * C) == [
        ("data", boundary - C, C, last), ("data", boundary, C, first),
    ]  # fmt: skip


async def test_what_an_l1_table_is_too_short_for_is_unallocated() -> None:
    image = ImageBuilder(3 * KIB32, l1_size=1)
    image.set_word(image.active.offset + 8, 0x1234)  # belongs to no table
    image.zero_plain(KIB32 - C)
    assert await resolve(image, KIB32 - C, 2 * KIB32) == [
        ("zero", KIB32 - C, C, 0), ("unallocated", KIB32, 2 * KIB32 - C, 0),
    ]  # fmt: skip


async def test_host_offset_0_is_data_only_in_a_data_file() -> None:
    image = ImageBuilder(KIB32)
    image.entry(0, COPIED)
    assert await resolve(image, 0, C) == [("unallocated", 0, C, 0)]
    extents = await mapping_of(image, has_data_file=True).resolve(0, 2 * C)
    assert shown(extents) == [("data", 0, C, 0), ("unallocated", C, C, 0)]


async def test_the_clusters_of_a_data_file_lie_where_the_guest_has_them() -> None:
    image = ImageBuilder(KIB32)
    for n in range(3):
        image.entry(n * C, n * C | COPIED)
    extents = await mapping_of(image, has_data_file=True).resolve(10, 3 * C - 10)
    assert shown(extents) == [("data", 10, 3 * C - 10, 10)]
