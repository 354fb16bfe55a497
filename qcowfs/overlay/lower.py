"""The file below an image, opened by itself: to compare with, or to write to.

Owns opening raw and qcow2 files alike under QEMU's locks. Must not know what is read or written.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from qcowfs.data.backing import (
    BackingReference,
    GuestReader,
    RawBacking,
)
from qcowfs.disk.image import Image, OpenOptions
from qcowfs.disk.states import resize
from qcowfs.errors import UsageError
from qcowfs.geometry import GuestOffset
from qcowfs.host import locks
from qcowfs.host.facts import identity_of
from qcowfs.host.hostfile import HostFile, OsHostFile
from qcowfs.metadata.mapping import UNALLOCATED, ZERO_KIND, Extent

PIECE = 1 << 20
"""Bytes that are copied or compared at a time."""
LOOK_AHEAD = 256 << 20
"""Bytes of a disk whose extents are looked up at a time."""
_ZEROS = bytes(PIECE)


Report = Callable[[int, int], None]
"""Called with the bytes of the disk that are done, and all there are."""
Reader = GuestReader | None
"""What an image falls through to, None for zeros."""


class Target(Protocol):
    """A disk that is written to."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""

    async def grow(self, size: int) -> None:
        """Make the disk at least that large."""

    async def write(self, guest: GuestOffset, data: bytes) -> None:
        """Write bytes within the disk."""

    async def zero(self, guest: GuestOffset, length: int) -> None:
        """Make a range read as zeros."""

    async def finish(self) -> None:
        """Return when everything is on disk."""

    def close(self) -> None:
        """Give the files back to the host."""


async def open_reader(reference: BackingReference, options: OpenOptions) -> Image | RawBacking:
    """What the reference names, for reading; raises as opening an image does."""
    path = reference.locate(options.backing)
    if reference.format == "qcow2":
        below = OpenOptions(
            backing=options.backing, open_host=options.open_host, keys=options.keys, is_below=True
        )  # fmt: skip
        return await Image.open(path, below)
    file = reference.open(path, options.open_host)
    _lock(file, locks.READER)
    options.keys.note(file.name, encrypted=False)
    return RawBacking(file, str(path))


async def open_target(reference: BackingReference, options: OpenOptions) -> Target:
    """What the reference names, for writing; raises as opening an image does."""
    path = reference.locate(options.backing)
    if reference.format == "qcow2":
        below = replace(options, writable=True, data_file=None, is_below=True)
        return ImageTarget(await Image.open(path, below))
    file = reference.open(path, options.open_writable)
    _lock(file, locks.WRITER)
    return RawTarget(file)


def _lock(file: HostFile, mode: locks.LockMode) -> None:
    if isinstance(file, OsHostFile):
        try:
            locks.acquire(file.fd, file.name, mode)
        except BaseException:
            file.close()
            raise


class RawTarget:
    """A raw file that is written to; it grows as needed."""

    def __init__(self, file: HostFile) -> None:
        """Write to `file`."""
        self._file = file

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.facts().size

    async def grow(self, size: int) -> None:
        """Make the file at least that long; raises `UsageError` for a device that is smaller."""
        if size > self.size:
            if not self._file.facts().regular:
                raise UsageError(f"{self._file.name}: is a device of {self.size} bytes, {size} are needed")
            await self._file.write_from([(size - 1, b"\0")])

    async def write(self, guest: GuestOffset, data: bytes) -> None:
        """Write bytes."""
        await self._file.write_from([(guest, data)])

    async def zero(self, guest: GuestOffset, length: int) -> None:
        """Write zeros where there are none yet."""
        for start in range(guest, guest + length, PIECE):
            buffer = bytearray(min(PIECE, guest + length - start))
            await self._file.read_into([(start, memoryview(buffer))])
            if buffer != _ZEROS[: len(buffer)]:
                await self._file.write_from([(start, _ZEROS[: len(buffer)])])

    async def finish(self) -> None:
        """Return when everything is on disk."""
        await self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ImageTarget:
    """The live disk of an image that is written to."""

    def __init__(self, image: Image) -> None:
        """Write to `image`, which is open for that."""
        if image.writer is None:
            raise UsageError(f"{image.label}: is not open for writing")
        self._image, self._writer = image, image.writer

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._image.size

    async def grow(self, size: int) -> None:
        """Make the disk at least that large; raises as `states.resize` does."""
        if size > self.size:
            await resize(self._image, size)

    async def write(self, guest: GuestOffset, data: bytes) -> None:
        """Write bytes within the disk."""
        await self._writer.write(guest, data)

    async def zero(self, guest: GuestOffset, length: int) -> None:
        """Make a range read as zeros, giving its clusters back."""
        await self._writer.zero(guest, length, unmap=True)

    async def finish(self) -> None:
        """Return when everything is on disk."""
        await self._writer.finish()

    def close(self) -> None:
        """Close the files."""
        self._image.close()


def is_same(file: HostFile, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        status = path.stat()
    except OSError:
        return False
    return file.facts().identity == identity_of(status)


async def is_zero(reader: Reader, guest: GuestOffset, length: int) -> bool:
    """Whether tables tell that a range reads as zeros; False where one has to look at the bytes."""
    if not isinstance(reader, Image):
        return reader is None
    length = min(length, reader.size - guest)
    if length <= 0:
        return True
    for extent in await reader.active.mapping.resolve(guest, length):
        if extent.kind is UNALLOCATED:
            if not await is_zero(reader.backing, extent.guest_offset, extent.length):
                return False
        elif extent.kind is not ZERO_KIND:
            return False
    return True


async def extents(image: Image, report: Report | None = None) -> AsyncIterator[Extent]:
    """The extents of the live disk in turn, looked up piece by piece; `report` hears when one is done."""
    for start in range(0, image.size, LOOK_AHEAD):
        for extent in await image.active.mapping.resolve(start, min(LOOK_AHEAD, image.size - start)):
            yield extent
            if report is not None:
                report(extent.guest_offset + extent.length, image.size)


async def read(reader: Reader, guest: GuestOffset, length: int) -> bytes:
    """Guest bytes; zeros beyond the reader's end, or where there is none."""
    buffer = bytearray(length)
    if reader is not None:
        await reader.read_into(guest, memoryview(buffer))
    return bytes(buffer)


def pieces(guest: GuestOffset, length: int) -> Iterator[tuple[GuestOffset, int]]:
    """A range in pieces that end where multiples of `PIECE` do."""
    end = guest + length
    while guest < end:
        stop = min(end, (guest // PIECE + 1) * PIECE)
        yield guest, stop - guest
        guest = stop
