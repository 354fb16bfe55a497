"""Putting an overlay on another backing file, with the same content afterwards.

Owns what is copied into the overlay, and when the header changes. Must not know tables. Wherever the overlay
falls through and the two backing files differ, it gets the old content; when that is on disk, the header
names the new file. A crash before leaves an overlay of the old file that reads the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qcowfs.data.backing import BackingReference
from qcowfs.disk.amend import Amendments, amend, with_backing
from qcowfs.disk.image import Image, OpenOptions, read_header
from qcowfs.disk.live import DiskWriter
from qcowfs.errors import BackingFileError, UsageError
from qcowfs.geometry import GuestOffset
from qcowfs.metadata.header_store import store_header
from qcowfs.metadata.mapping import UNALLOCATED
from qcowfs.overlay.lower import Reader, Report, extents, is_same, is_zero, open_reader, pieces, read


@dataclass(frozen=True)
class NewBacking:
    """What the overlay is to stand on: a name as its header will have it, empty for nothing."""

    name: bytes
    format: str | None


async def rebase_unsafely(path: Path, new: NewBacking) -> None:
    """Only change the name in the header; the user knows that the contents are the same."""
    await amend(path, Amendments(backing_name=new.name, backing_format=new.format))


async def rebase(path: Path, new: NewBacking, options: OpenOptions, report: Report | None = None) -> int:
    """Put the overlay at `path` on another backing file; returns the bytes that it got from the old one.

    `report` hears how far it is.

    Raises `UsageError` for an image with snapshots, which read through the backing file as well,
    `BackingFileError` where a file cannot be used, and whatever reading and writing raise.
    """
    image = await Image.open(path, options)
    try:
        writer = image.writer
        if writer is None:
            raise UsageError(f"{image.label}: is not open for writing")
        _refuse_snapshots(image)
        reader = await _open_new(image, path, new, options)
        try:
            options.keys.check_use()
            copied = await _copy_differences(image, writer, reader, report)
        finally:
            if reader is not None:
                reader.close()
        await writer.finish()
        header = await read_header(image.file, image.label)
        wanted = Amendments(backing_name=new.name, backing_format=new.format)
        await store_header(image.file, header, with_backing(header, wanted))
        return copied
    finally:
        await image.aclose()


def _refuse_snapshots(image: Image) -> None:
    if image.snapshots:
        raise UsageError(
            f"{image.label}: has snapshots, whose content would change with the backing file; delete them "
            "first, or only change the name with --unsafe where both files have the same content"
        )


async def _open_new(image: Image, path: Path, new: NewBacking, options: OpenOptions) -> Reader:
    if not new.name:
        return None
    reference = BackingReference(image.label, path, new.name, new.format)
    located = reference.locate(options.backing)
    if is_same(image.file, located):
        raise BackingFileError(f"{image.label}: cannot be its own backing file")
    return await open_reader(reference, options)


async def _copy_differences(image: Image, writer: DiskWriter, reader: Reader, report: Report | None) -> int:
    """Write the old content wherever the overlay falls through and the new file has another."""
    copied = 0
    async for extent in extents(image, report):
        if extent.kind is not UNALLOCATED:
            continue
        guest, length = extent.guest_offset, extent.length
        if await is_zero(image.backing, guest, length) and await is_zero(reader, guest, length):
            continue
        for start, size in pieces(guest, length):
            copied += await _copy_piece(image, writer, reader, start, size)
    return copied


async def _copy_piece(
    image: Image, writer: DiskWriter, reader: Reader, guest: GuestOffset, length: int
) -> int:
    """Copy those clusters of a piece that differ, neighbours together; how many bytes that were."""
    old, new = await read(image.backing, guest, length), await read(reader, guest, length)
    if old == new:
        return 0
    copied = 0
    for start, end in _different(old, new, image.geometry.cluster_size, guest):
        part = old[start:end]
        if any(part):
            await writer.write(guest + start, part)
        else:
            await writer.zero(guest + start, len(part), unmap=True)
        copied += len(part)
    return copied


def _different(old: bytes, new: bytes, size: int, guest: GuestOffset) -> list[tuple[int, int]]:
    """(start, end) of the runs of clusters that differ, within a piece that starts at `guest`."""
    runs: list[tuple[int, int]] = []
    start = 0
    while start < len(old):
        end = min(len(old), start + size - (guest + start) % size)
        if old[start:end] != new[start:end]:
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        start = end
    return runs
