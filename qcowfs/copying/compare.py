"""Whether two disks read the same, as `qemu-img compare` tells.

Owns the walk over both and what need not be read. Must not know how the answer is shown.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

from qcowfs.copying.direct import Layer, layers_of
from qcowfs.copying.workers import Turns, Workers
from qcowfs.data.zeros import first_data, first_difference
from qcowfs.disk.disks import Disk
from qcowfs.disk.extents import DiskExtent, disk_extents
from qcowfs.errors import CorruptImage
from qcowfs.host.waiting import checkpoint, run_in_loop

_PIECE = 1 << 19
"""Bytes of a range: both sides stay in the processor's cache until they are compared."""
Report = Callable[[int, int], None]
"""Called now and then with the bytes done and all bytes there are to do."""


@dataclass(frozen=True)
class Verdict:
    """How two disks compare; offsets and sizes are in bytes.

    Disks of unequal sizes are identical if the rest of the longer one is zeros. `offset` is the first
    sector that differs, `status_offset` where a strict comparison found one stored and the other not.
    """

    sizes: tuple[int, int]
    offset: int | None = None
    status_offset: int | None = None

    @property
    def identical(self) -> bool:
        """Whether both read the same, zeros beyond the end of the shorter one."""
        return self.offset is None and self.status_offset is None


async def compare(
    first: Disk, second: Disk, *, strict: bool = False, report: Report | None = None
) -> Verdict:
    """Compare two disks; with `strict` also how their bytes are kept.

    Raises `CorruptImage` for damage, `OSError` as the host does.
    """
    sizes = first.size, second.size
    if strict and sizes[0] != sizes[1]:
        return Verdict(sizes)
    comparison = _Comparison(first, second, strict=strict, report=report)
    workers = Workers(os.cpu_count() or 1, lambda: _Comparer(first, second, comparison).compare, Turns())
    await workers.run(comparison.ranges())
    return comparison.verdict()


def _status(extent: DiskExtent) -> tuple[bool, bool, bool]:
    return extent.present, extent.zero, extent.data


def _is_zero(extent: DiskExtent | None) -> bool:
    """Whether the extent, or what lies beyond the end of a disk, is known to read as zeros."""
    return extent is None or (extent.zero and not extent.damage)


class _Places:
    """The files of both disks' layers, in which equal places mean equal bytes."""

    def __init__(self, first: Disk, second: Disk) -> None:
        self._first, self._second = _files(first), _files(second)

    def same(self, one: DiskExtent | None, other: DiskExtent | None) -> bool:
        """Whether both extents are the very same bytes of one file, as those that a snapshot shares."""
        if one is None or other is None or one.offset is None or other.offset is None:
            return False
        if one.offset - one.start != other.offset - other.start or one.zero or other.zero:
            return False
        file = self._first[one.depth]
        return file is not None and file == self._second[other.depth]


def _files(disk: Disk) -> list[tuple[int, int] | None]:
    """Which file each layer of a disk is, as far as it can be read directly."""
    return [None if layer is None else layer.file.facts().identity for layer in layers_of(disk)]


async def _together(
    first: Disk, second: Disk
) -> AsyncIterator[tuple[int, int, DiskExtent | None, DiskExtent | None]]:
    """Ranges of at most one piece over which neither disk's extent changes; None is beyond its end."""
    walks = [disk_extents(first), disk_extents(second)]
    heads = [await anext(walk, None) for walk in walks]
    position = 0
    while any(head is not None for head in heads):
        end = min(position + _PIECE, *(head.start + head.length for head in heads if head is not None))
        yield position, end, heads[0], heads[1]
        for index, head in enumerate(heads):
            if head is not None and head.start + head.length == end:
                heads[index] = await anext(walks[index], None)
        position = end
        await checkpoint()


async def may_differ(first: Disk, second: Disk) -> AsyncIterator[tuple[int, int]]:
    """The ranges that one has to read to know whether two disks are equal there."""
    places = _Places(first, second)
    async for start, end, one, other in _together(first, second):
        if not places.same(one, other) and not (_is_zero(one) and _is_zero(other)):
            yield start, end


class _Range(NamedTuple):
    """Guest bytes that have to be read, and the extent that each disk has there."""

    start: int
    end: int
    extents: tuple[DiskExtent | None, DiskExtent | None]


class _Comparison:
    """What is read, and what was found; of several findings the one at the lowest offset counts.

    Ranges are handed out in order and all that were are compared, so that threads change no verdict.
    """

    def __init__(self, first: Disk, second: Disk, *, strict: bool, report: Report | None) -> None:
        self._disks = first, second
        self._sizes = first.size, second.size
        self._strict = strict
        self._report = report
        self._lock = threading.Lock()
        self._found: tuple[int, Verdict | Exception] | None = None

    def verdict(self) -> Verdict:
        """The verdict when all is compared; raises what came before any difference."""
        found = Verdict(self._sizes) if self._found is None else self._found[1]
        if isinstance(found, Exception):
            raise found
        return found

    def differ(self, start: int, offset: int) -> None:
        """Note that the range from `start` on differs at an offset. For any thread."""
        self.find(start, Verdict(self._sizes, offset))

    def find(self, start: int, what: Verdict | Exception) -> None:
        """Note what was found in the range from `start` on. For any thread."""
        with self._lock:
            if self._found is None or start < self._found[0]:
                self._found = (start, what)

    async def ranges(self) -> AsyncIterator[_Range]:
        """The ranges that have to be read, until anything is found."""
        places = _Places(*self._disks)
        async for start, end, one, other in _together(*self._disks):
            if self._found is not None:
                return
            if self._strict and one is not None and other is not None and _status(one) != _status(other):
                self.find(start, Verdict(self._sizes, status_offset=start))
                return
            if not places.same(one, other) and not (_is_zero(one) and _is_zero(other)):
                yield _Range(start, end, (one, other))
            if self._report is not None:
                self._report(min(end, max(self._sizes)), max(self._sizes))


class _Comparer:
    """Compares ranges in one worker thread, with two buffers of its own."""

    def __init__(self, first: Disk, second: Disk, comparison: _Comparison) -> None:
        self._sides = (first, layers_of(first)), (second, layers_of(second))
        self._comparison = comparison
        self._buffers = bytearray(_PIECE), bytearray(_PIECE)

    def compare(self, part: _Range) -> None:
        """Tell the comparison where a range differs first, or why that cannot be told."""
        try:
            found = self._first_difference(part)
        except Exception as error:  # raised again unless something comes before it
            self._comparison.find(part.start, error)
        else:
            if found is not None:
                self._comparison.differ(part.start, part.start + found)

    def _first_difference(self, part: _Range) -> int | None:
        """Where in a range the disks differ first; what is known to be zeros is not read."""
        length, read = part.end - part.start, []
        for (disk, layers), extent, buffer in zip(self._sides, part.extents, self._buffers, strict=True):
            if extent is None or _is_zero(extent):
                continue
            if extent.damage:
                raise CorruptImage(f"{disk.label}: guest offset {part.start:#x}: {extent.damage}")
            whole = buffer if length == _PIECE else bytearray(length)
            _read(disk, layers[extent.depth], extent, part.start, memoryview(whole))
            read.append(whole)
        return first_data(read[0]) if len(read) == 1 else first_difference(*read)


def _read(disk: Disk, layer: Layer | None, extent: DiskExtent, start: int, buffer: memoryview) -> None:
    """Fill the buffer from a part of an extent: past the engine if that is possible."""
    inside = start + len(buffer) <= disk.size  # what lies behind the end is the engine's business
    if layer is not None and inside and extent.offset is not None and layer.holds(extent):
        layer.file.read_here(extent.offset + start - extent.start, buffer)
    elif layer is None or not inside or not extent.compressed or not layer.read_compressed(start, buffer):
        run_in_loop(disk.reader.read_into, start, buffer)
