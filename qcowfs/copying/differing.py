"""What an overlay has to hold to read as a disk: the units in which that differs from the backing file.

Owns where the two may differ, and which units do. Must not know where they go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from qcowfs.copying.compare import may_differ
from qcowfs.copying.direct import layers_of
from qcowfs.copying.pieces import Range, Span, read_span
from qcowfs.data.views import fill_zeros
from qcowfs.data.zeros import data_runs, is_zero
from qcowfs.disk.disks import Disk
from qcowfs.geometry import GuestOffset

Found = tuple[int, int, bool]
"""Where units start and end within a span, and whether all of them are zeros."""


class Source:
    """The disk that is copied, and the one that lies below the copy, if one does. For worker threads."""

    def __init__(self, disk: Disk, backing: Disk | None = None) -> None:
        """Read these, which stay the caller's."""
        self.disk = disk
        self._backing = backing
        self._layer = None if backing is None or backing.image is not None else layers_of(backing)[0]

    def read(self, span: Span, part: memoryview) -> None:
        """Fill a buffer with a span."""
        read_span(span, self.disk, part)

    def find(self, span: Span, part: memoryview, unit: int) -> Iterator[Found]:
        """Fill a buffer with a span; tells the units that the copy has to hold."""
        self.read(span, part)
        if self._backing is None:
            yield from ((start, end, False) for start, end in data_runs(part, unit))
            return
        below = bytearray(len(part))
        self._read_below(self._backing, span.guest, memoryview(below))
        for start in range(0, len(part), unit):
            own = part[start : start + unit]
            if below[start : start + unit] != own:
                yield start, start + len(own), is_zero(own)

    def _read_below(self, backing: Disk, guest: GuestOffset, part: memoryview) -> None:
        """Fill a buffer from the backing disk, behind whose end there are zeros."""
        length = min(len(part), max(0, backing.size - guest))
        if length:
            host = None if self._layer is None else guest
            read_span(Span(guest, length, self._layer, host), backing, part[:length])
        fill_zeros(part[length:])


async def differing(disk: Disk, backing: Disk, unit: int) -> AsyncIterator[Range]:
    """The ranges, in whole units, in which the disks may read differently."""
    start = end = 0
    async for low, high in may_differ(disk, backing):
        first = low // unit * unit
        if first > end:
            if end > start:
                yield start, end
            start = first
        end = -(-high // unit) * unit
    if end > start:
        yield start, end
