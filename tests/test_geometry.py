"""Shifts, masks and rounding, against the plain arithmetic of the format's description."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.geometry import Geometry

GEOMETRIES = st.builds(Geometry, st.integers(9, 21)) | st.builds(
    Geometry, st.integers(14, 21), extended_l2=st.just(True)
)
OFFSETS = st.integers(0, (1 << 63) - 1)


@pytest.mark.parametrize(
    ("bits", "extended", "entries", "coverage", "slice_coverage", "subcluster"),
    [
        (9, False, 64, 32 << 10, 32 << 10, 512),
        (12, False, 512, 2 << 20, 2 << 20, 4096),
        (13, False, 1024, 8 << 20, 4 << 20, 8192),
        (16, False, 8192, 512 << 20, 32 << 20, 65536),
        (21, False, 262144, 512 << 30, 1 << 30, 2 << 20),
        (14, True, 1024, 16 << 20, 4 << 20, 512),
        (16, True, 4096, 256 << 20, 16 << 20, 2048),
    ],
)
def test_sizes_follow_from_the_cluster_size(
    bits: int, extended: bool, entries: int, coverage: int, slice_coverage: int, subcluster: int
) -> None:
    g = Geometry(bits, extended)
    assert g.cluster_size == 1 << bits
    assert (g.l2_entries, g.l2_coverage) == (entries, coverage)
    assert (g.slice_size, g.slice_words) == (min(4096, 1 << bits), min(4096, 1 << bits) // 8)
    assert (g.slice_coverage, g.subcluster_size) == (slice_coverage, subcluster)


@given(GEOMETRIES, OFFSETS)
def test_clusters_are_found_by_division(g: Geometry, offset: int) -> None:
    size = g.cluster_size
    assert g.in_cluster(offset) == offset % size
    assert g.cluster_start(offset) == offset // size * size
    assert g.cluster_round_up(offset) == -(-offset // size) * size
    assert g.is_cluster_aligned(offset) == (offset % size == 0)


@given(GEOMETRIES, OFFSETS)
def test_the_l1_entry_is_the_one_of_the_format(g: Geometry, guest: int) -> None:
    index = (guest // g.cluster_size) // g.l2_entries
    assert g.l1_index(guest) == index
    start, within = g.l1_slice(guest)
    assert (start % g.slice_size, start + within * 8) == (0, index * 8)
    assert 0 <= within < g.slice_words


@given(GEOMETRIES, OFFSETS)
def test_the_l2_entry_is_the_one_of_the_format(g: Geometry, guest: int) -> None:
    index = (guest // g.cluster_size) % g.l2_entries
    start, within = g.l2_slice(guest)
    assert (start % g.slice_size, start + within * g.l2_entry_size) == (0, index * g.l2_entry_size)
    assert 0 <= within * g.l2_entry_size < g.slice_size


@given(GEOMETRIES, OFFSETS)
def test_a_slice_ends_where_another_begins(g: Geometry, guest: int) -> None:
    end = g.slice_end(guest)
    assert guest < end <= g.l2_coverage_end(guest)
    assert g.l2_slice(end)[1] == 0
    assert g.l2_slice(end - 1)[0] == g.l2_slice(guest)[0]
    assert g.l1_index(end - 1) == g.l1_index(guest)


@given(GEOMETRIES, OFFSETS)
def test_an_l2_table_ends_where_another_begins(g: Geometry, guest: int) -> None:
    end = g.l2_coverage_end(guest)
    assert guest < end <= guest + g.l2_coverage
    assert g.l1_index(end - 1) == g.l1_index(guest) == g.l1_index(end) - 1


@given(GEOMETRIES, OFFSETS)
def test_a_disk_needs_as_many_l1_entries_as_reach_its_last_byte(g: Geometry, size: int) -> None:
    assert g.l1_entries_for(size) == (g.l1_index(size - 1) + 1 if size else 0)


@given(st.integers(9, 21), st.data())
def test_a_compressed_descriptor_is_taken_apart_as_the_format_says(bits: int, data: st.DataObject) -> None:
    x = 62 - (bits - 8)
    offset = data.draw(st.integers(0, (1 << min(x, 56)) - 1))
    sectors = data.draw(st.integers(0, (1 << 62 - x) - 1))
    descriptor = 1 << 62 | sectors << x | offset
    expected = (offset, (sectors + 1) * 512 - offset % 512)
    assert Geometry(bits).compressed_location(descriptor) == expected
    assert Geometry(bits).compressed_location(descriptor | 1 << 63) == expected


@given(st.integers(14, 21), OFFSETS)
def test_a_cluster_has_32_subclusters(bits: int, guest: int) -> None:
    g = Geometry(bits, extended_l2=True)
    assert g.subcluster_index(guest) == guest % g.cluster_size * 32 // g.cluster_size
    assert g.subcluster_size * 32 == g.cluster_size
