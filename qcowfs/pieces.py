"""The bytes of a disk that are worth copying, in pieces for several workers.

Owns which ranges hold data, how they are rounded to the target's units, and from which file they are read
directly. Must not know where they go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from qcowfs.disks import Disk
from qcowfs.extents import DiskExtent, disk_extents, layer_files
from qcowfs.geometry import GuestOffset, HostOffset
from qcowfs.hostfile import HostFile, OsHostFile, run_in_loop


class Span(NamedTuple):
    """Guest bytes, and the file and offset to read them from directly; None is by way of the engine."""

    guest: GuestOffset
    length: int
    file: OsHostFile | None
    host: HostOffset


@dataclass
class Piece:
    """Spans that one worker copies at once; `number` counts the pieces of a disk."""

    number: int
    spans: list[Span] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Bytes of all its spans."""
        return sum(span.length for span in self.spans)

    @property
    def end(self) -> GuestOffset:
        """Where its last span ends."""
        return self.spans[-1].guest + self.spans[-1].length

    def read(self, disk: Disk, buffer: memoryview) -> None:
        """Fill the buffer with the spans, one behind the other. For worker threads."""
        position = 0
        for span in self.spans:
            part = buffer[position : position + span.length]
            if span.file is None:
                run_in_loop(disk.reader.read_into, span.guest, part)
            else:
                span.file.read_here(span.host, part)
            position += span.length


async def data_pieces(disk: Disk, unit: int, most: int, *, everything: bool = False) -> AsyncIterator[Piece]:
    """Pieces of at most `most` bytes that cover all that may not be zeros, in whole units of the target.

    With `everything` they cover the whole disk.
    """
    piece = Piece(0)
    async for span in _spans(disk, unit, everything=everything):
        position = 0
        while position < span.length:
            room = most - piece.length
            part = min(span.length - position, room)
            piece.spans.append(Span(span.guest + position, part, span.file, span.host + position))
            position += part
            if part == room:
                yield piece
                piece = Piece(piece.number + 1)
    if piece.spans:
        yield piece


async def _spans(disk: Disk, unit: int, *, everything: bool) -> AsyncIterator[Span]:
    """Units that hold any data, in runs that are read the same way."""
    files, covered = layer_files(disk), 0
    end_of_disk = _up(disk.size, unit)
    async for extent in disk_extents(disk):
        if extent.zero and not extent.damage and not everything:
            continue
        start = max(_down(extent.start, unit), covered)
        end = min(_up(extent.start + extent.length, unit), end_of_disk)
        if start >= end:
            continue
        for span in _split(disk, files, extent, start, end, unit):
            if span.length:
                yield span
        covered = end


def _split(
    disk: Disk, files: list[HostFile], extent: DiskExtent, start: int, end: int, unit: int
) -> list[Span]:
    """The range of an extent: what of it is read directly, and what it shares with its neighbours."""
    if disk.image is None and isinstance(disk.file, OsHostFile):
        return [Span(start, end - start, disk.file, start)]
    last = extent.start + extent.length
    inner, inner_end = max(_up(extent.start, unit), start), end if last >= disk.size else _down(last, unit)
    file = files[extent.depth]
    if (
        extent.offset is None
        or extent.zero
        or extent.damage
        or inner >= inner_end
        or not isinstance(file, OsHostFile)
    ):
        return [Span(start, end - start, None, 0)]
    host = (extent.offset or 0) + inner - extent.start
    if host + inner_end - inner > _up(file.facts().size, unit):
        return [Span(start, end - start, None, 0)]  # past the end of the file: the engine says what is wrong
    return [
        Span(start, inner - start, None, 0),
        Span(inner, inner_end - inner, file, host),
        Span(inner_end, end - inner_end, None, 0),
    ]


def _down(offset: int, unit: int) -> int:
    return offset // unit * unit


def _up(offset: int, unit: int) -> int:
    return -(-offset // unit) * unit
