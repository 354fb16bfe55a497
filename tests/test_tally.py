"""Counts of clusters: right however large they become, and a byte each as long as that is enough."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qcowfs.check.tally import MOST_COUNTED, Tally


def test_counts_take_a_byte_until_one_of_them_needs_more() -> None:
    tally = Tally(1000)
    tally.add_run(10, 20, 255)
    assert tally.values.itemsize == 1
    tally.add_run(15, 16)
    assert tally.values.itemsize == 2
    assert tally.values[9:21].tolist() == [0, *[255] * 5, 256, *[255] * 4, 0]
    tally.put(3, np.array([1 << 40, 7], np.uint64))
    assert tally.values[5:9].tolist() == [0, 1 << 40, 7, 0]


@pytest.mark.parametrize("spread", [50, 100_000])
def test_indices_may_repeat(spread: int) -> None:
    rng = random.Random(spread)
    tally, model = Tally(spread), [0] * spread
    for _ in range(30):
        indices = [rng.randrange(spread) for _ in range(rng.randrange(40))]
        weight = rng.choice([1, 1, 7, 300, 70_000])
        tally.add(np.array(indices, np.int64), weight)
        for index in indices:
            model[index] += weight
        start = rng.randrange(spread)
        tally.add_run(start, start + 5, weight)
        model[start : start + 5] = [count + weight for count in model[start : start + 5]]
    assert tally.values.tolist() == model


def test_sums_stop_where_they_no_longer_matter() -> None:
    tally = Tally(10)
    for _ in range(2):
        tally.add_run(0, 5, MOST_COUNTED - 1)
        tally.add(np.array([4, 4, 9], np.int64), MOST_COUNTED - 1)
    assert tally.values.tolist() == [MOST_COUNTED] * 5 + [0] * 4 + [MOST_COUNTED]
