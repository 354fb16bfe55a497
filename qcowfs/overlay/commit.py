"""Committing an overlay: its content goes into a file below it, then the overlay is emptied.

Owns the order of the two. Must not know how bytes find their clusters. The overlay is emptied when everything
is on disk in the file below; until then it reads the same whatever happens, and so it does meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qcowfs.check.checker import inspect
from qcowfs.check.recount import Recount, leaked_ranges
from qcowfs.data.backing import BackingReference, GuestReader
from qcowfs.disk.amend import inspect_sound
from qcowfs.disk.image import Image, OpenOptions, lock, shown
from qcowfs.errors import UsageError
from qcowfs.geometry import GuestOffset
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.mapping import UNALLOCATED, ZERO_KIND
from qcowfs.overlay.lower import LOOK_AHEAD, Reader, Report, Target, is_same, open_target, pieces, read

_L1_PIECE = 1 << 20


@dataclass(frozen=True)
class Committing:
    """What is committed where: to `base` of the chain, by default the overlay's backing file.

    `keep` leaves the overlay as it is, and so does a `base`, since images between would read wrongly
    through it. `unsafe` commits although there are snapshots, which read through the base as well.
    """

    base: Path | None = None
    keep: bool = False
    unsafe: bool = False


async def commit(path: Path, options: OpenOptions, wanted: Committing, report: Report | None = None) -> int:
    """Write what the overlay at `path` holds, and all above the base, to the base; then empty the overlay.

    Returns the bytes that were written; `report` hears how far it is. Raises `UsageError` where there is no
    such base, it is too small, or snapshots lie above it, `ImageInUse` where somebody has one of the files
    open, `BadPassphrase` before anything is written, `CorruptImage` for damage.
    """
    with _opened(path, replace(options, writable=True)) as file:
        header = (await inspect_sound(file)).subject.header
        if header.backing_name is None:
            raise UsageError(f"{shown(path)}: has no backing file to commit to")
        image = await Image.open(path, replace(options, writable=False, force_share=True))
        try:
            options.keys.check_use()
            written = await _commit(image, options, wanted, report)
        finally:
            image.close()
        if not wanted.keep and wanted.base is None:
            await empty(file)
            if options.data_file is not None:
                await _punch_all(options.data_file, options)
        return written


@contextmanager
def _opened(path: Path, options: OpenOptions) -> Iterator[HostFile]:
    """A file, locked as a writer's or a reader's."""
    file = options.open_writable(path) if options.writable else options.open_host(path)
    try:
        lock(file, options, top=True)
        yield file
    finally:
        file.close()


async def _commit(image: Image, options: OpenOptions, wanted: Committing, report: Report | None) -> int:
    """Write to the base while nobody changes what lies between."""
    layers = _layers_above(image, wanted.base)
    if not wanted.unsafe:
        _refuse_snapshots(layers)
    with ExitStack() as stack:
        for layer in layers[1:]:
            await inspect_sound(stack.enter_context(_opened(Path(layer.file.name), options)))
        lowest = layers[-1]
        name, kind = lowest.header.backing_name or b"", lowest.header.backing_format
        reference = BackingReference(lowest.label, Path(lowest.file.name), name, kind)
        target = await open_target(reference, replace(options, data_file=None))
        try:
            written = await _copy(image, lowest.backing, target, report)
            await target.finish()
        finally:
            target.close()
    return written


def _refuse_snapshots(layers: list[Image]) -> None:
    for layer in layers:
        if layer.snapshots:
            raise UsageError(
                f"{layer.label}: has snapshots, which read through its backing file and would change; "
                "delete them first, or commit all the same with --unsafe"
            )


def _layers_above(image: Image, base: Path | None) -> list[Image]:
    """The images of the chain above the base, from the overlay on; raises `UsageError` if it is not there."""
    layers = [image]
    while (below := layers[-1].backing) is not None:
        if base is None or _is_base(layers[-1], below, base):
            return layers
        if not isinstance(below, Image):
            break
        layers.append(below)
    raise UsageError(f"{image.label}: {shown(base or Path())} is not in its backing chain")


def _is_base(above: Image, below: GuestReader, base: Path) -> bool:
    """Whether the base is meant: as a path, or as the image above it has its name."""
    file = getattr(below, "file", None)
    return above.header.backing_name == os.fsencode(base) or (file is not None and is_same(file, base))


async def _copy(image: Image, base: Reader, target: Target, report: Report | None) -> int:
    """Write all that lies above the base to the target."""
    await target.grow(image.size)
    written = 0
    for start in range(0, image.size, LOOK_AHEAD):
        end = min(start + LOOK_AHEAD, image.size)
        async for guest, length, is_zero in _above(image, base, start, end):
            if is_zero:
                await target.zero(guest, length)
            else:
                for at, size in pieces(guest, length):
                    await target.write(at, await read(image, at, size))
            written += length
            if report is not None:
                report(guest + length, image.size)
        if report is not None:
            report(end, image.size)
    return written


async def _above(
    reader: Reader, base: Reader, start: GuestOffset, end: GuestOffset
) -> AsyncIterator[tuple[GuestOffset, int, bool]]:
    """(guest offset, length, whether it reads as zeros) of what layers above the base decide."""
    if reader is base or not isinstance(reader, Image):
        return
    inner = max(start, min(end, reader.size))
    for extent in await reader.active.mapping.resolve(start, inner - start):
        guest, length = extent.guest_offset, extent.length
        if extent.kind is not UNALLOCATED:
            yield guest, length, extent.kind is ZERO_KIND
            continue
        async for part in _above(reader.backing, base, guest, guest + length):
            yield part
    if inner < end:
        yield inner, end - inner, True  # a layer hides what lies below it even where it is too short


async def _punch_all(path: Path, options: OpenOptions) -> None:
    """Give the space of a data file back that no entry names any more."""
    with _opened(path, replace(options, writable=True)) as data:
        if data.facts().regular:
            await data.punch_hole(0, data.facts().size)


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
