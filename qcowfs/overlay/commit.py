"""Committing an overlay: its content goes into its backing file, then the overlay is emptied.

Owns the order of the two. Must not know how bytes find their clusters. The overlay is emptied when everything
is on disk in the backing file; until then it reads the same whatever happens, and so it does meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qcowfs.check.checker import inspect
from qcowfs.check.recount import Recount, leaked_ranges
from qcowfs.data.backing import BackingReference
from qcowfs.disk.amend import inspect_sound
from qcowfs.disk.image import Image, OpenOptions, lock, shown
from qcowfs.errors import UsageError
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.mapping import UNALLOCATED, ZERO_KIND
from qcowfs.overlay.lower import Report, Target, extents, open_target, pieces, read

_L1_PIECE = 1 << 20


async def commit(
    path: Path, options: OpenOptions, *, keep: bool = False, report: Report | None = None
) -> int:
    """Write what the overlay at `path` holds to its backing file, then empty it unless `keep`.

    Returns the bytes that were written; `report` hears how far it is. Raises `UsageError` where there
    is no backing file or it is too small, `ImageInUse` where somebody has either file open, `BadPassphrase`
    before anything is written, `CorruptImage` for damage.
    """
    with _opened(path, options) as file:
        header = (await inspect_sound(file)).subject.header
        label = shown(path)
        if header.backing_name is None:
            raise UsageError(f"{label}: has no backing file to commit to")
        reference = BackingReference(label, path, header.backing_name, header.backing_format)
        image = await Image.open(path, replace(options, writable=False, force_share=True))
        try:
            options.keys.check_use()
            target = await open_target(reference, options)
            try:
                written = await _copy(image, target, report)
                await target.finish()
            finally:
                target.close()
        finally:
            image.close()
        if not keep:
            await empty(file)
        return written


@contextmanager
def _opened(path: Path, options: OpenOptions) -> Iterator[HostFile]:
    """The overlay's file, locked as a writer's."""
    file = options.open_writable(path)
    try:
        lock(file, replace(options, writable=True), top=True)
        yield file
    finally:
        file.close()


async def _copy(image: Image, target: Target, report: Report | None) -> int:
    """Write every extent of the overlay to the target."""
    await target.grow(image.size)
    written = 0
    async for extent in extents(image, report):
        if extent.kind is UNALLOCATED:
            continue
        written += extent.length
        if extent.kind is ZERO_KIND:
            await target.zero(extent.guest_offset, extent.length)
            continue
        for guest, length in pieces(extent.guest_offset, extent.length):
            await target.write(guest, await read(image, guest, length))
    return written


async def empty(file: HostFile) -> None:
    """Let the live disk name no cluster, then lower the counts of those that nothing else names."""
    header = (await inspect(file)).subject.header
    end = header.l1_table_offset + header.l1_size * 8
    for start in range(header.l1_table_offset, end, _L1_PIECE):
        await file.write_from([(start, bytes(min(_L1_PIECE, end - start)))])
    await file.sync()
    subject = (await inspect(file)).subject
    await Recount(subject, may_raise=False, may_free=True).write(file)
    for offset, length in leaked_ranges(subject):
        await file.punch_hole(offset, length)
