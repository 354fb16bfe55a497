"""Whether two disks read the same, as `qemu-img compare` tells.

Owns the walk over both and what need not be read. Must not know how the answer is shown.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from qcowfs.disks import Disk
from qcowfs.errors import CorruptImage
from qcowfs.extents import DiskExtent, disk_extents
from qcowfs.hostfile import run_in_thread
from qcowfs.zeros import first_data, first_difference

_PIECE = 2 << 20
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
    both = _same_file(first, second)
    async for start, end, one, other in _together(first, second):
        if strict and one is not None and other is not None and _status(one) != _status(other):
            return Verdict(sizes, status_offset=start)
        if not (both and _is_same_place(one, other)) and not (_is_zero(one) and _is_zero(other)):
            offset = await _compare_range(first, second, start, end, one, other)
            if offset is not None:
                return Verdict(sizes, offset)
        if report is not None:
            report(min(end, max(sizes)), max(sizes))
    return Verdict(sizes)


def _status(extent: DiskExtent) -> tuple[bool, bool, bool]:
    return extent.present, extent.zero, extent.data


def _is_zero(extent: DiskExtent | None) -> bool:
    """Whether the extent, or what lies beyond the end of a disk, is known to read as zeros."""
    return extent is None or (extent.zero and not extent.damage)


def _same_file(first: Disk, second: Disk) -> bool:
    """Whether equal host offsets of both top layers mean equal bytes."""
    if first.image is None or second.image is None:
        return False
    return first.image.data_file.facts().identity == second.image.data_file.facts().identity


def _is_same_place(one: DiskExtent | None, other: DiskExtent | None) -> bool:
    """Whether both extents are the very same clusters, as those that a snapshot shares."""
    if one is None or other is None or one.offset is None or other.offset is None:
        return False
    return one.depth == other.depth == 0 and one.offset - one.start == other.offset - other.start


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
        await trio.lowlevel.checkpoint()


async def _compare_range(
    first: Disk, second: Disk, start: int, end: int, one: DiskExtent | None, other: DiskExtent | None
) -> int | None:
    """Where a range differs first; what is known to be zeros is not read."""
    for disk, extent in ((first, one), (second, other)):
        if extent is not None and extent.damage:
            raise CorruptImage(f"{disk.label}: guest offset {start:#x}: {extent.damage}")
    read: list[bytearray] = []
    async with trio.open_nursery() as nursery:
        for disk, extent in ((first, one), (second, other)):
            if not _is_zero(extent):
                read.append(bytearray(end - start))
                nursery.start_soon(disk.reader.read_into, start, memoryview(read[-1]))
    if len(read) == 1:
        found = await run_in_thread(first_data, read[0])
    else:
        found = await run_in_thread(first_difference, *read)
    return None if found is None else start + found
