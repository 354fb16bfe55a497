"""A disk's extents summed up: how much there is of each kind, in all and in each of many equal parts.

Owns the kinds that a picture tells apart. Must not know how it is painted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcowfs.disk.disks import Disk
from qcowfs.disk.extents import DiskExtent, Report, disk_extents

KINDS = ("data", "shared", "compressed", "backing", "zero", "unallocated", "damaged")
"""Own data; data that a snapshot has too; compressed; what a backing file has; zeros that are noted;
nothing, which reads as zeros; what cannot be read."""


@dataclass(frozen=True)
class Survey:
    """What a disk consists of, in bytes.

    `parts[k, n]` is how much of part `n` is of kind `k`, and `breaks[n]` how often the file has to be
    continued elsewhere within it. `stored` is what compressed clusters take.
    """

    size: int
    totals: dict[str, int]
    parts: NDArray[np.float64]
    breaks: NDArray[np.int64]
    stored: int
    fragments: int

    @property
    def part_size(self) -> float:
        """Bytes of one part."""
        return self.size / max(1, len(self.breaks))


def kind_of(extent: DiskExtent) -> str:
    """Which of the kinds an extent is."""
    if extent.damage:
        return "damaged"
    if not extent.present:
        return "unallocated"
    if extent.zero:
        return "zero"
    if extent.depth:
        return "backing"
    if extent.compressed:
        return "compressed"
    return "shared" if extent.shared else "data"


async def survey(disk: Disk, parts: int, report: Report | None = None) -> Survey:
    """Sum up a disk in so many equal parts; `report` hears how far that is.

    Raises `OSError` as the host does.
    """
    edges, kinds, breaks = [0], [], []
    stored = fragments = 0
    place: int | None = None
    async for extent in disk_extents(disk, sharing=True, report=report):
        edges.append(extent.start + extent.length)
        kinds.append(KINDS.index(kind_of(extent)))
        stored += 0 if extent.depth else extent.stored
        if extent.data and not extent.depth and extent.offset is not None:
            if extent.offset != place:
                breaks.append(extent.start)
            fragments += extent.offset != place
            place = extent.offset + extent.length
    size = edges[-1]
    of_kind = np.array(kinds, np.int64)[None, :] == np.arange(len(KINDS))[:, None]
    lengths = np.diff(np.array(edges, np.float64))
    below = np.concatenate((np.zeros((len(KINDS), 1)), np.cumsum(of_kind * lengths, axis=1)), axis=1)
    bounds = np.linspace(0, size, parts + 1)
    shares = np.array([np.diff(np.interp(bounds, edges, row)) for row in below])
    counted = np.histogram(breaks[1:], parts, (0, max(1, size)))[0]
    totals = {kind: int(total) for kind, total in zip(KINDS, below[:, -1].tolist(), strict=True)}
    return Survey(size, totals, shares, counted.astype(np.int64), stored, fragments)
