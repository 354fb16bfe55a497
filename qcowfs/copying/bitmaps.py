"""Persistent bitmaps taken along into a new image.

Owns which can be, and their bits in clusters of the new image's size. Must not know where those go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from qcowfs.disk.disks import Disk
from qcowfs.disk.image import Image
from qcowfs.errors import CorruptImage, UsageError
from qcowfs.format.bitmaps import FLAG_AUTO, TABLE_ALL_ONES, BitmapEntry
from qcowfs.format.entries import OFFSET_MASK
from qcowfs.metadata.bitmaps import is_in_order, load_entries, load_table
from qcowfs.text import quoted

MAX_BITS_BYTES = 512 << 20
"""Bytes of clusters with bits, over all bitmaps: they are kept in memory until their places are known."""


@dataclass(frozen=True)
class BitmapCopy:
    """A bitmap; `bits` are those clusters of it that have any set, by number, `clusters` how many it has."""

    name: bytes
    granularity: int
    flags: int
    clusters: int
    bits: dict[int, bytearray]


async def load_bitmaps(disk: Disk, cluster_size: int, *, skip_broken: bool = False) -> list[BitmapCopy]:
    """The bitmaps of an image's live disk, for clusters of that size.

    Raises `UsageError` where there can be none, and `CorruptImage` for one that cannot be trusted unless
    those are to be skipped.
    """
    image = disk.image
    if image is None or disk.view is not image.active:
        raise UsageError(f"{disk.label}: --bitmaps: only the live disk of a qcow2 image has any")
    copies: list[BitmapCopy] = []
    _, entries = await load_entries(image.file, image.header)
    for entry in entries:
        if is_in_order(image.header, entry):
            copies.append(await _load(image, entry, cluster_size))
        elif not skip_broken:
            raise CorruptImage(
                f"{disk.label}: bitmap {quoted(entry.name)} was not stored cleanly and cannot be trusted; "
                "--skip-broken-bitmaps leaves it out"
            )
        if sum(len(copy.bits) for copy in copies) * cluster_size > MAX_BITS_BYTES:
            raise CorruptImage(f"{disk.label}: its bitmaps have more than {MAX_BITS_BYTES} bytes of bits")
    return copies


async def _load(image: Image, entry: BitmapEntry, cluster_size: int) -> BitmapCopy:
    granules = -(-image.header.virtual_size // entry.granularity)
    length = -(-granules // 8)
    bits: dict[int, bytearray] = {}
    async for start, data in _stored(image, entry):
        position, end = start, min(start + len(data), length)
        while position < end:
            stop = min(end, (position // cluster_size + 1) * cluster_size)
            _put(bits, position, data[position - start : stop - start], cluster_size)
            position = stop
            if len(bits) * cluster_size > MAX_BITS_BYTES:
                raise CorruptImage(f"{image.label}: bitmap {quoted(entry.name)} has too many bits")
    if granules % 8 and (length - 1) // cluster_size in bits:
        bits[(length - 1) // cluster_size][(length - 1) % cluster_size] &= (1 << granules % 8) - 1
    flags, clusters = entry.flags & FLAG_AUTO, -(-length // cluster_size)
    return BitmapCopy(entry.name, entry.granularity, flags, clusters, bits)


async def _stored(image: Image, entry: BitmapEntry) -> AsyncIterator[tuple[int, bytes]]:
    """The clusters of bits that are not all clear, each with where it starts."""
    size = image.geometry.cluster_size
    for index, word in enumerate(await load_table(image.file, image.header, entry)):
        if word & OFFSET_MASK:
            data = bytearray(size)
            await image.file.read_into([(word & OFFSET_MASK, memoryview(data))])
            yield index * size, bytes(data)
        elif word & TABLE_ALL_ONES:
            yield index * size, b"\xff" * size


def _put(bits: dict[int, bytearray], start: int, data: bytes, cluster_size: int) -> None:
    """Set bits from a byte of the bitmap on, within one cluster."""
    index, within = divmod(start, cluster_size)
    if any(data):
        cluster = bits.setdefault(index, bytearray(cluster_size))
        cluster[within : within + len(data)] = data
