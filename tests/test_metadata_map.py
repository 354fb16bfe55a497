"""Which clusters are protected from guest data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.metadata.metadata_map import MetadataMap

C = 512


@pytest.mark.parametrize(
    ("offset", "size", "touches"),
    [
        (0, C, False),
        (4 * C, C, True),
        (4 * C - 1, 1, False),
        (4 * C - 1, 2, True),
        (6 * C - 1, 1, True),
        (6 * C, 9 * C, False),
        (0, 100 * C, True),
        (1 << 50, C, False),
    ],
)
def test_a_range_overlaps_if_it_touches_a_protected_cluster(offset: int, size: int, touches: bool) -> None:
    metadata = MetadataMap(9)
    metadata.add(4 * C + 5, C)
    assert metadata.overlaps(offset, size) is touches


def test_a_cluster_that_was_given_up_is_free_again() -> None:
    metadata = MetadataMap(9)
    metadata.add(0, C)
    metadata.add(8 * C, 2 * C)
    metadata.remove(8 * C)
    metadata.remove(5000 * C)
    assert [metadata.overlaps(n * C, C) for n in (0, 8, 9, 10)] == [True, False, True, False]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 5)), max_size=20))
def test_the_map_is_a_set_of_clusters(changes: list[tuple[bool, int, int]]) -> None:
    metadata, model = MetadataMap(9), set[int]()
    for add, first, count in changes:
        if add:
            metadata.add(first * C, count * C)
            model |= set(range(first, first + count))
        else:
            metadata.remove(first * C)
            model -= {first}
    assert {n for n in range(50) if metadata.overlaps(n * C, C)} == model
