"""Counts of all host clusters, as narrow as the largest of them allows: mostly a byte each.

Owns how wide they are. Must not know what is counted.
"""

from __future__ import annotations

import numpy as np

from qcowfs.check.arrays import I64, Counts

MOST_COUNTED = (1 << 32) - 1
"""Where sums stop."""
_WIDTHS = (np.uint8, np.uint16, np.uint32, np.uint64)


class Tally:
    """A count for each cluster; `values` is another array once a count needs more room."""

    values: Counts

    def __init__(self, size: int) -> None:
        """All counts are 0, and take no memory yet."""
        self.values = np.zeros(size, np.uint8)

    def add_run(self, start: int, end: int, weight: int = 1) -> None:
        """Add to the counts of clusters in a row."""
        part = self.values[start:end]
        most = int(part.max(initial=0)) + weight
        if most > MOST_COUNTED:
            part[:] = np.minimum(part.astype(np.uint64) + np.uint64(weight), MOST_COUNTED)
            return
        self._make_room(most)
        self.values[start:end] += self.values.dtype.type(weight)

    def add(self, indices: I64, weight: int = 1) -> None:
        """Add for each index, which may repeat."""
        if not len(indices):
            return
        low, high = int(indices.min()), int(indices.max())
        if high - low < 4 * len(indices) + 1024:
            sums = np.bincount(indices - low, minlength=high - low + 1)
            self._add_to(slice(low, high + 1), sums * weight)
            return
        unique, times = np.unique(indices, return_counts=True)
        self._add_to(unique, times * weight)

    def _add_to(self, places: slice | I64, sums: I64) -> None:
        new = np.minimum(sums + self.values[places], MOST_COUNTED)
        self._make_room(int(new.max()))
        self.values[places] = new

    def put(self, row: int, counts: Counts) -> None:
        """Set the counts of the clusters that have the row of that number, among rows as long as this."""
        self._make_room(int(counts.max(initial=0)))
        self.values[row * len(counts) : (row + 1) * len(counts)] = counts

    def _make_room(self, most: int) -> None:
        if most > np.iinfo(self.values.dtype).max:
            wider = next(width for width in _WIDTHS if most <= np.iinfo(width).max)
            self.values = self.values.astype(wider)
