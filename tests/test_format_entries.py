"""Bits of table entries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.format import entries


def test_the_masks_are_those_of_the_format() -> None:
    assert sum(1 << bit for bit in range(9, 56)) == entries.OFFSET_MASK
    assert sum(1 << bit for bit in range(9, 64)) == entries.REFCOUNT_TABLE_OFFSET_MASK
    assert (entries.COPIED, entries.COMPRESSED, entries.ZERO) == (1 << 63, 1 << 62, 1)


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_the_lower_half_of_a_bitmap_allocates_and_the_upper_half_zeroes(low: int, high: int) -> None:
    assert entries.subcluster_bitmaps(high << 32 | low) == (low, high)


def test_a_bitmap_that_qemu_wrote_is_read() -> None:
    # subclusters 0 and 2 were written, subcluster 4 was zeroed
    assert entries.subcluster_bitmaps(0x0000001000000005) == (1 << 0 | 1 << 2, 1 << 4)


@given(st.integers(0, (1 << 32) - 1), st.integers(0, 31), st.integers(1, 32))
def test_a_run_is_as_long_as_the_bits_stay_the_same(bits: int, start: int, limit: int) -> None:
    limit = max(limit, start + 1)
    expected = 1
    while start + expected < limit and bits >> start + expected & 1 == bits >> start & 1:
        expected += 1
    assert entries.run_length(bits, start, limit) == expected


@pytest.mark.parametrize(
    ("bits", "start", "run"), [(0, 0, 32), (0xFFFFFFFF, 0, 32), (0xFFFFFFFF, 31, 1), (0x80000000, 0, 31)]
)
def test_a_run_ends_with_the_cluster(bits: int, start: int, run: int) -> None:
    assert entries.run_length(bits, start, 32) == run
