"""Copying a disk into a new file.

Owns the workers and the choice of target. Must not know formats' details: what is copied is in `pieces`,
where it goes in `targets`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from qcowfs.codecs.compression import compressor
from qcowfs.copying.bitmaps import BitmapCopy, load_bitmaps
from qcowfs.copying.differing import Source, differing
from qcowfs.copying.fresh import FreshImage
from qcowfs.copying.pieces import Piece, data_pieces
from qcowfs.copying.targets import (
    CompressedTarget,
    Encrypt,
    ExistingTarget,
    ImageTarget,
    RawTarget,
    Target,
)
from qcowfs.copying.workers import Turns, Workers
from qcowfs.creation.create import round_up_to_sectors, store_luks_area
from qcowfs.creation.form import Creation
from qcowfs.disk.disks import Disk
from qcowfs.errors import UsageError
from qcowfs.geometry import sector_index
from qcowfs.host.existing import existing_file, make_blank
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.newfile import new_file
from qcowfs.text import printable

_MOST_THREADS = 64
Report = Callable[[int, int], None]
"""Called now and then with the bytes done and all bytes there are to do."""


@dataclass(frozen=True)
class Copying:
    """How a disk is copied: into an image of the form `image` or, where that is None, into a raw file.

    With `compress` an image's clusters are compressed, at `level` if that is given. `threads` copy at a
    time. `force` replaces a file that is there, `into` writes the disk into one, or into a block device.
    `passphrase` will open an encrypted image. `bitmaps` are taken along, and have to be in order
    unless broken ones are skipped.
    """

    image: Creation | None = None
    compress: bool = False
    level: int | None = None
    threads: int | None = None
    force: bool = False
    into: bool = False
    passphrase: bytes | None = field(default=None, repr=False)
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False

    def check(self) -> None:
        """Raise `UsageError` where these do not go together."""
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"{self.threads} threads: must be at least 1")
        if self.image is None and self.compress:
            raise UsageError("-c: raw files cannot be compressed; add -O qcow2")
        if self.image is None and self.bitmaps:
            raise UsageError("--bitmaps: raw files have none; add -O qcow2")
        if self.image is None:
            return
        if self.into:
            raise UsageError("-n: only a raw disk is written into what exists; --force replaces an image")
        if self.image.backing_file is not None and self.image.preallocation != "off":
            raise UsageError(f"preallocation={self.image.preallocation}: an overlay holds what differs only")
        if self.image.data_file is not None and self.compress:
            raise UsageError("-c: an external data file cannot hold compressed clusters")
        if self.image.preallocation != "off" and self.compress:
            raise UsageError(f"-c: preallocation={self.image.preallocation} does not go with it")

    @property
    def workers(self) -> int:
        """How many threads copy; more than the most would only hold memory."""
        return min(self.threads or os.cpu_count() or 1, _MOST_THREADS)


async def convert(
    disk: Disk, path: Path, copying: Copying, report: Report | None = None, backing: Disk | None = None
) -> None:
    """Copy a disk into the new file `path`, which appears when it is whole, or into one that exists.

    Where the new image has a backing file, that is open as `backing`, and only what differs is copied.

    Raises `CorruptImage` for damage in the source, other `QcowError`s with one line, and `OSError` as
    the host does.
    """
    copying.check()
    size, source = round_up_to_sectors(disk.size), Source(disk, backing)
    async with AsyncExitStack() as stack:
        turns = Turns()
        bitmaps: list[BitmapCopy] = []
        if copying.bitmaps and copying.image is not None:
            skip = copying.skip_broken_bitmaps
            bitmaps = await load_bitmaps(disk, copying.image.cluster_size, skip_broken=skip)
        target = await _make_target(stack, path, disk, copying, turns, bitmaps)
        workers = Workers(copying.workers, lambda: _copier(source, target, report), turns)
        within = None if backing is None else differing(disk, backing, target.unit)
        pieces = data_pieces(disk, target.unit, target.most, everything=target.everything, within=within)
        await workers.run(pieces)
        await target.finish()
    if report is not None:
        report(size, size)


async def _make_target(
    stack: AsyncExitStack, path: Path, disk: Disk, copying: Copying, turns: Turns, bitmaps: list[BitmapCopy]
) -> Target:
    size = round_up_to_sectors(disk.size)
    if copying.into:
        file = await stack.enter_async_context(existing_file(path, size))
        _refuse_own_files(file, disk)
        return ExistingTarget(file, size, blank=await make_blank(file, size))
    file = await stack.enter_async_context(new_file(path, force=copying.force, sync=False))
    form = copying.image
    if form is None:
        return RawTarget(file, size)
    image = FreshImage(form, size, bitmaps)
    encrypt = await _make_encrypt(file, form, copying.passphrase)
    if copying.compress:
        compress = compressor(form.compression_type, copying.level)
        return CompressedTarget(file, image, turns, compress, encrypt)
    data = None
    if form.data_file is not None:
        named = new_file(Path(form.data_file), force=copying.force, sync=False)
        data = await stack.enter_async_context(named)
    return ImageTarget(file, image, turns, data, encrypt)


def _refuse_own_files(file: OsHostFile, disk: Disk) -> None:
    """Raise `UsageError` where the disk itself would be overwritten: shared locks do not prevent it."""
    if any(own.facts().identity == file.facts().identity for own in disk.files()):
        raise UsageError(f"-n: {printable(os.fsencode(file.name))} is what {disk.label} is read from")


async def _make_encrypt(file: OsHostFile, form: Creation, passphrase: bytes | None) -> Encrypt | None:
    """How clusters are encrypted, with a new LUKS area in the file, if the form asks for that."""
    volume = await store_luks_area(file, form, passphrase)
    if volume is None:
        return None
    from qcowfs.codecs.encryption import make_cipher

    cipher = make_cipher(volume.header.cipher, volume.header.mode, volume.master_key)
    return lambda host, data: cipher.encrypt(data, sector_index(host))


def _copier(source: Source, target: Target, report: Report | None) -> Callable[[Piece], None]:
    """The function by which one worker copies pieces, with a buffer of its own."""
    # Page aligned: to and from any other the kernel takes half as long again to copy.
    buffer = memoryview(mmap.mmap(-1, target.most))

    def copy(piece: Piece) -> None:
        target.take(piece, buffer[: piece.length], source)
        if report is not None:
            report(piece.end, source.disk.size)

    return copy
