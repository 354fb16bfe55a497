"""The bytes of a disk that are worth copying, in pieces for several workers.

Owns which ranges hold data, how they are rounded to the target's units, and from which file they are read
directly. Must not know where they go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from qcowfs.copying.direct import Layer, layers_of
from qcowfs.data.views import fill_zeros
from qcowfs.data.zeros import is_zero
from qcowfs.disk.disks import Disk
from qcowfs.disk.extents import DiskExtent, disk_extents
from qcowfs.geometry import GuestOffset, HostOffset
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.waiting import run_in_loop

Range = tuple[GuestOffset, GuestOffset]
"""Guest bytes: where they start and end."""
_LOOK = 8
"""Bytes of a unit that are looked at first: data rarely begins with that many zeros."""


class Span(NamedTuple):
    """Guest bytes and how to read them: from that offset of a layer's file, or inflated from the layer.

    `layer` is None where the engine has to read them, `host` is None where they are compressed.
    """

    guest: GuestOffset
    length: int
    layer: Layer | None = None
    host: HostOffset | None = None

    def part(self, start: int, length: int) -> Span:
        """Some of the span."""
        host = None if self.host is None else self.host + start
        return Span(self.guest + start, length, self.layer, host)

    @property
    def file(self) -> OsHostFile | None:
        """The file that holds the bytes as they are, if one does."""
        return None if self.layer is None or self.host is None else self.layer.file


@dataclass
class Piece:
    """Spans that one worker copies at once; `number` counts the pieces of a disk of `size` bytes."""

    number: int
    size: int
    spans: list[Span] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Bytes of all its spans."""
        return sum(span.length for span in self.spans)

    @property
    def end(self) -> GuestOffset:
        """Where its last span ends."""
        return self.spans[-1].guest + self.spans[-1].length

    def is_plain(self, span: Span) -> bool:
        """Whether the span's bytes can be taken from its file; those behind the disk's end are not zeros."""
        return span.file is not None and span.guest + span.length <= self.size


def read_span(span: Span, disk: Disk, part: memoryview) -> None:
    """Fill a buffer with a span. For worker threads."""
    _read(span, disk, part)
    if span.guest + span.length > disk.size:  # what lies behind the end is nobody's business
        fill_zeros(part[max(0, disk.size - span.guest) :])


def look_for_data(
    file: OsHostFile, offset: HostOffset, buffer: memoryview, unit: int
) -> list[tuple[int, int]]:
    """Which units of a file's range are not all zeros: where they start and end within it.

    The range is as long as the buffer, which holds nothing of use afterwards. Most units are not read. For
    worker threads.
    """
    runs: list[tuple[int, int]] = []
    for start in range(0, len(buffer), unit):
        part = buffer[start : start + unit]
        if not any(file.peek_here(offset + start, _LOOK)):
            file.read_here(offset + start, part)
            if is_zero(part):
                continue
        joined = runs.pop()[0] if runs and runs[-1][1] == start else start
        runs.append((joined, start + len(part)))
    return runs


def _read(span: Span, disk: Disk, part: memoryview) -> None:
    if span.layer is not None and span.host is not None:
        span.layer.file.read_here(span.host, part)
    elif span.layer is None or not span.layer.read_compressed(span.guest, part):
        run_in_loop(disk.reader.read_into, span.guest, part)


async def data_pieces(
    disk: Disk, unit: int, most: int, *, everything: bool = False, within: AsyncIterator[Range] | None = None
) -> AsyncIterator[Piece]:
    """Pieces of at most `most` bytes that cover all that may not be zeros, in whole units of the target.

    With `everything` they cover the whole disk, or what lies `within` ranges of whole units, in order.
    """
    piece = Piece(0, disk.size)
    spans = _spans(disk, unit, everything=everything or within is not None)
    async for span in spans if within is None else _clipped(spans, within):
        position = 0
        while position < span.length:
            room = most - piece.length
            part = min(span.length - position, room)
            piece.spans.append(span.part(position, part))
            position += part
            if part == room:
                yield piece
                piece = Piece(piece.number + 1, disk.size)
    if piece.spans:
        yield piece


async def _spans(disk: Disk, unit: int, *, everything: bool) -> AsyncIterator[Span]:
    """Units that hold any data, in runs that are read the same way."""
    layers, covered = layers_of(disk), 0
    end_of_disk = _up(disk.size, unit)
    async for extent in disk_extents(disk):
        if extent.zero and not extent.damage and not everything:
            continue
        start = max(_down(extent.start, unit), covered)
        end = min(_up(extent.start + extent.length, unit), end_of_disk)
        if start >= end:
            continue
        if disk.image is None and layers[0] is not None:
            yield Span(start, end - start, layers[0], start)
        else:
            for span in _split(extent, layers[extent.depth], start, end, unit):
                if span.length:
                    yield span
        covered = end


async def _clipped(spans: AsyncIterator[Span], ranges: AsyncIterator[Range]) -> AsyncIterator[Span]:
    """What of the spans lies within the ranges."""
    current = await anext(ranges, None)
    async for span in spans:
        end = span.guest + span.length
        while current is not None and current[0] < end:
            low, high = max(current[0], span.guest), min(current[1], end)
            if low < high:
                yield span.part(low - span.guest, high - low)
            if current[1] > end:
                break
            current = await anext(ranges, None)


def _split(extent: DiskExtent, layer: Layer | None, start: int, end: int, unit: int) -> list[Span]:
    """The range of an extent: what of it is read directly, and what it shares with its neighbours."""
    inner = max(_up(extent.start, unit), start)
    inner_end = _down(extent.start + extent.length, unit)
    direct = layer is not None and (extent.compressed or layer.holds(extent))
    if not direct or extent.damage or inner >= inner_end:
        return [Span(start, end - start)]
    host = None if extent.offset is None else extent.offset + inner - extent.start
    return [
        Span(start, inner - start),
        Span(inner, inner_end - inner, layer, host),
        Span(inner_end, end - inner_end),
    ]


def _down(offset: int, unit: int) -> int:
    return offset // unit * unit


def _up(offset: int, unit: int) -> int:
    return -(-offset // unit) * unit
