"""The set of granules that were written to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qcowfs.metadata.granules import CHUNK_BYTES, Granules

RANGES = st.lists(st.tuples(st.integers(0, 9_000_000), st.integers(0, 5_000_000)), max_size=6)


def dirty(granules: Granules) -> set[int]:
    """The numbers of the granules that are set."""
    return {
        offset * 8 + index * 8 + bit
        for offset, bits in granules.pieces()
        for index, byte in enumerate(bits)
        for bit in range(8)
        if byte >> bit & 1
    }


@given(RANGES, st.sampled_from([512, 4096, 65536]))
def test_every_granule_that_a_range_touches_is_in_it(ranges: list[tuple[int, int]], size: int) -> None:
    granules = Granules(size)
    for guest, length in ranges:
        granules.add(guest, length)
    expected: set[int] = set()
    for guest, length in ranges:
        expected |= set(range(guest // size, (guest + length - 1) // size + 1)) if length else set()
    assert dirty(granules) == expected
    assert bool(granules) == bool(expected)


def test_memory_is_taken_only_for_what_was_touched() -> None:
    granules = Granules(512)
    granules.add(1 << 50, 1)
    granules.add(0, 512)
    assert [(offset, len(bits)) for offset, bits in granules.pieces()] == [
        (0, CHUNK_BYTES),
        ((1 << 50) // 512 // 8, CHUNK_BYTES),
    ]
