"""Extended L2 entries: runs of subclusters within clusters of 16 KiB."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import COPIED, ImageBuilder
from tests.test_mapping import mapping_of, resolve, shown

BITS = 14
C = 1 << BITS
S = 512  # a subcluster
ALL = 0xFFFFFFFF


def extended(size: int = 8 * C) -> ImageBuilder:
    image = ImageBuilder(size, cluster_bits=BITS, extended_l2=True)
    image.l2_table(0)
    return image


async def test_whole_clusters_are_found_and_merged() -> None:
    image = extended()
    host = image.normal(0, b"x")
    image.normal(C, b"x")
    image.zero_plain(2 * C)
    image.zero_allocated(3 * C)
    assert await resolve(image, 0, 8 * C) == [
        ("data", 0, 2 * C, host), ("zero", 2 * C, 2 * C, 0), ("unallocated", 4 * C, 4 * C, 0),
    ]  # fmt: skip


async def test_a_cluster_that_qemu_wrote_is_split_into_its_subclusters() -> None:
    image = extended()
    host = image.subclusters(0, b"x", 0x0000001000000005)  # written: 0 and 2, zeroed: 4
    assert await resolve(image, 0, C) == [
        ("data", 0, S, host),
        ("unallocated", S, S, 0),
        ("data", 2 * S, S, host + 2 * S),
        ("unallocated", 3 * S, S, 0),
        ("zero", 4 * S, S, 0),
        ("unallocated", 5 * S, 27 * S, 0),
    ]


async def test_a_request_within_a_subcluster_stays_within_it() -> None:
    image = extended()
    host = image.subclusters(C, b"x", 0b10)
    assert await resolve(image, C + S + 5, 20) == [("data", C + S + 5, 20, host + S + 5)]
    assert await resolve(image, C + 2 * S - 1, 2) == [
        ("data", C + 2 * S - 1, 1, host + 2 * S - 1), ("unallocated", C + 2 * S, 1, 0),
    ]  # fmt: skip


async def test_runs_of_subclusters_are_merged_over_clusters() -> None:
    image = extended()
    host = image.subclusters(0, b"x", 1 << 31)
    image.subclusters(C, b"x", 1 | (ALL - 1) << 32)
    image.entry(2 * C, 0, ALL << 32)
    assert await resolve(image, 31 * S, 2 * C + S) == [
        ("data", 31 * S, 2 * S, host + 31 * S), ("zero", C + S, 2 * C - S, 0),
    ]  # fmt: skip


async def test_subclusters_may_be_zero_without_a_host_cluster() -> None:
    image = extended()
    image.entry(0, 0, 0b101 << 32)
    assert await resolve(image, 0, 3 * S) == [
        ("zero", 0, S, 0), ("unallocated", S, S, 0), ("zero", 2 * S, S, 0),
    ]  # fmt: skip


async def test_a_compressed_cluster_has_no_subclusters() -> None:
    image = extended()
    host = image.compressed(C, bytes(100))
    assert await resolve(image, C + 5, 2 * C) == [
        ("compressed", C + 5, C - 5, host), ("unallocated", 2 * C, C + 5, 0),
    ]  # fmt: skip


async def test_entries_on_both_sides_of_a_slice_are_found() -> None:
    boundary = 256 * C  # a slice is 4096 bytes of 16-byte entries
    image = extended(2 * boundary)
    host = image.normal(boundary - C, b"x")
    image.subclusters(boundary, b"x", 1)
    assert await resolve(image, boundary - C, C + 2 * S) == [
        ("data", boundary - C, C + S, host), ("unallocated", boundary + S, S, 0),
    ]  # fmt: skip


async def test_an_l2_table_covers_half_of_what_it_covers_without_subclusters() -> None:
    coverage = 1024 * C
    image = extended(2 * coverage)
    host = image.normal(coverage - C, b"x")
    image.set_l1(1, image.place(bytes(C)))
    image.entry(coverage, 0, 1 << 32)
    assert await resolve(image, coverage - C, C + 2 * S) == [
        ("data", coverage - C, C, host), ("zero", coverage, S, 0), ("unallocated", coverage + S, S, 0),
    ]  # fmt: skip


async def test_a_subcluster_that_is_both_allocated_and_zero_loses_its_cluster() -> None:
    image = extended()
    image.normal(0, b"x")
    image.subclusters(C, b"x", 0b10 | 0b10 << 32)
    [_, extent, after] = await mapping_of(image).resolve(0, 3 * C)
    at = image.entry_at(C)
    assert shown([extent, after]) == [("lost", C, C, at), ("unallocated", 2 * C, C, 0)]
    assert extent.damage == "L2 entry: a subcluster is marked both allocated and zero"


@pytest.mark.parametrize("word", [0, COPIED])
async def test_allocated_subclusters_without_an_offset_lose_their_cluster(word: int) -> None:
    image = extended()
    at = image.entry(C, word, 1)
    [extent] = await mapping_of(image).resolve(C, C)
    assert shown([extent]) == [("lost", C, C, at)]
    assert extent.damage == "L2 entry: subclusters are allocated but the cluster has no offset"


async def test_the_first_cluster_of_a_data_file_has_offset_0() -> None:
    image = extended()
    image.entry(0, COPIED, ALL)
    image.entry(C, C | COPIED, 1)
    extents = await mapping_of(image, has_data_file=True).resolve(0, 2 * C)
    assert shown(extents) == [("data", 0, C + S, 0), ("unallocated", C + S, C - S, 0)]


async def test_an_unaligned_offset_loses_only_the_allocated_subclusters() -> None:
    image = extended()
    at = image.entry(0, 0x10200 | COPIED, 1)
    [extent, rest] = await mapping_of(image).resolve(0, 2 * S)
    assert shown([extent, rest]) == [("lost", 0, S, at), ("unallocated", S, S, 0)]
    assert extent.damage == "L2 entry: cluster offset 0x10200 is not cluster aligned"


@given(
    st.lists(st.sampled_from(["data", "zero", "unallocated"]), min_size=32, max_size=32),
    st.integers(0, C - 1),
    st.integers(1, C),
)
async def test_any_pattern_of_subclusters_is_told_byte_by_byte(
    kinds: list[str], start: int, length: int
) -> None:
    image = extended()
    bits = [{"data": 1 << n, "zero": 1 << 32 + n, "unallocated": 0}[kind] for n, kind in enumerate(kinds)]
    image.subclusters(0, b"x", sum(bits))
    length = min(length, C - start)
    guest = start
    for kind, at, size, _ in await resolve(image, start, length):
        assert at == guest
        assert {kinds[offset // S] for offset in range(at, at + size)} == {kind}
        guest += size
    assert guest == start + length
