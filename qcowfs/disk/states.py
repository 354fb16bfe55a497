"""What changes an open image as a whole: its snapshots and its size.

Owns these calls and what is refused. Must not know how a state is laid out or put in force. Everything
written before a call belongs to the old state and nothing written later; writers wait meanwhile, readers do
not. A crash leaves the old state or the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from qcowfs.disk.image import Image, read_header
from qcowfs.disk.live import DiskWriter
from qcowfs.errors import CorruptImage, ReadOnlyError, UnsupportedFeature, UsageError
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.text import quoted

# What lays out a state computes with numpy: it is imported where it is needed, so that a mount starts sooner.
if TYPE_CHECKING:
    from qcowfs.metadata.draft import Draft
    from qcowfs.metadata.snapshotting import Plan


async def create_snapshot(image: Image, name: bytes) -> Snapshot:
    """Take a snapshot of the live disk; every name will do, also one that is taken.

    Raises, as all functions here: `ReadOnlyError`, `UnsupportedFeature` and `UsageError` where it cannot
    be done, `CorruptImage` for damage in the way, `OSError` as the host does; then nothing has changed.
    """
    from qcowfs.metadata import snapshotting

    async with _writer(image).turn:
        await _change(image, snapshotting.create(name))
        return image.snapshots[-1]


async def delete_snapshot(image: Image, snapshot: Snapshot) -> None:
    """Drop a snapshot; what only it held is free, and later reads of its views fail."""
    from qcowfs.metadata import snapshotting

    async with _writer(image).turn:
        _find(image, snapshot)
        await _change(image, snapshotting.delete(snapshot))


async def rename_snapshot(image: Image, snapshot: Snapshot, name: bytes) -> Snapshot:
    """Give a snapshot another name; the record that it has now."""
    from qcowfs.metadata import snapshotting

    async with _writer(image).turn:
        position = _find(image, snapshot)
        await _change(image, snapshotting.rename(snapshot, name))
        return image.snapshots[position]


async def revert(image: Image, snapshot: Snapshot) -> None:
    """Set the live disk to a snapshot's content and size; what was written since is lost."""
    from qcowfs.metadata import snapshotting

    async with _writer(image).turn:
        _find(image, snapshot)
        await _change(image, snapshotting.revert(snapshot))
        _writer(image).note_all_changed()


async def resize(image: Image, size: int, *, shrink: bool = False) -> None:
    """Give the live disk `size` bytes; what is new reads as zeros, whatever lies below.

    A smaller size needs `shrink`.
    """
    from qcowfs.metadata import snapshotting

    async with _writer(image).turn:
        old = image.active.size
        if size < old and not shrink:
            raise UsageError(
                f"{image.label}: {size} bytes are less than the {old} that it has; --shrink cuts it"
            )
        if size > old:
            await _writer(image).clear_tail()
        below = 0 if image.backing is None else image.backing.size
        await _change(image, snapshotting.resize(size, below))


def _find(image: Image, snapshot: Snapshot) -> int:
    if snapshot not in image.snapshots:
        raise UsageError(f"{image.label}: the snapshot {quoted(snapshot.name)} is no more")
    return image.snapshots.index(snapshot)


def _writer(image: Image) -> DiskWriter:
    if image.writer is None:
        raise ReadOnlyError(f"{image.label}: is open for reading only")
    return image.writer


async def _change(image: Image, plan: Plan) -> None:
    from qcowfs.metadata.draft import Draft

    writer = _writer(image)
    async with writer.alone() as protected:
        image.header = await read_header(image.file, image.label)  # the refcount table may have moved
        with _labelled(image):
            draft = await Draft.begin(image.file, image.header, image.snapshots, protected)
            draft.forget(writer.dropped)
            await plan(draft)
        with trio.CancelScope(shield=True):
            await _put_in_force(image, writer, draft)


async def _put_in_force(image: Image, writer: DiskWriter, draft: Draft) -> None:
    try:
        with _labelled(image):
            await draft.put_in_force()
    except CorruptImage:
        writer.forbid()
        raise
    try:
        await image.follow(writer, draft.replaced)
    except BaseException:
        writer.forbid()  # what it would write to is not the image's any more
        raise


@contextmanager
def _labelled(image: Image) -> Iterator[None]:
    """Let errors name the image."""
    try:
        yield
    except (CorruptImage, UsageError, UnsupportedFeature) as error:
        raise type(error)(f"{image.label}: {error}") from None
