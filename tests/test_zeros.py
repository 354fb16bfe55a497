"""Zeros and differences are found where a look at every byte finds them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qcowfs.data.zeros import data_runs, first_data, first_difference, is_zero

UNIT = 1024
BUFFERS = st.builds(
    lambda size, places: bytes(1 if n in places else 0 for n in range(size)),
    st.integers(1, 4500),
    st.sets(st.integers(0, 4500), max_size=4),
)


@given(BUFFERS)
def test_data_is_found_by_units(buffer: bytes) -> None:
    covered = {n for start, end in data_runs(buffer, UNIT) for n in range(start, end)}
    wanted = [n // UNIT for n, byte in enumerate(buffer) if byte]
    assert covered == {n for n in range(len(buffer)) if n // UNIT in wanted}
    assert is_zero(buffer) == (not wanted)
    assert first_data(buffer) == min((n // 512 * 512 for n, b in enumerate(buffer) if b), default=None)


@given(BUFFERS)
def test_runs_are_as_long_as_can_be(buffer: bytes) -> None:
    runs = data_runs(memoryview(buffer), UNIT)
    assert all(earlier[1] < later[0] for earlier, later in pairwise(runs))


@given(BUFFERS, BUFFERS)
def test_the_first_difference_is_told_by_its_sector(one: bytes, other: bytes) -> None:
    size = min(len(one), len(other))
    expected = min((n // 512 * 512 for n in range(size) if one[n] != other[n]), default=None)
    assert first_difference(one[:size], bytearray(other[:size])) == expected
