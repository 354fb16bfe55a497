"""Any disk that a command reads: a raw file or block device, an image's live disk, one of its snapshots.

Owns how a path becomes such a disk. Must not know what is done with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qcowfs.data.backing import BackingReference, GuestReader, RawBacking, probe_format
from qcowfs.data.views import ImageView
from qcowfs.disk.image import Image, OpenOptions, lock, shown
from qcowfs.errors import UnsupportedFeature, UsageError
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.snapshots import find_snapshot

FORMATS = ("qcow2", "raw")


@dataclass(frozen=True)
class Disk:
    """An open disk: its bytes, and what they come from.

    `image` and `view` are there for qcow2, `file` for raw ones.
    """

    label: str
    format: str
    reader: GuestReader | ImageView
    image: Image | None = None
    file: HostFile | None = None

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.reader.size

    def files(self) -> Iterator[HostFile]:
        """Every file that its bytes may come from, down to the bottom of the chain."""
        reader: GuestReader | ImageView | None = self.image or self.reader
        while isinstance(reader, Image):
            yield from {reader.file, reader.data_file}
            reader = reader.backing
        if isinstance(reader, RawBacking):
            yield reader.file

    @property
    def view(self) -> ImageView | None:
        """The view of a qcow2 image, None for a raw disk."""
        return self.reader if isinstance(self.reader, ImageView) else None


@asynccontextmanager
async def open_disk(
    path: Path, form: str | None = None, options: OpenOptions | None = None, snapshot: str | None = None
) -> AsyncIterator[Disk]:
    """Open the disk at `path` for reading, by its first bytes where `form` does not tell what it is.

    Raises `QcowError` with one line that names it and what is wrong, or `OSError` as the host does.
    """
    options = replace(options or OpenOptions(), writable=False)
    form = form or await _probe(path, options)
    if form == "raw":
        if snapshot is not None:
            raise UsageError(f"{shown(path)}: is a raw disk, which has no snapshots")
        file = options.open_host(path)
        try:
            lock(file, options)
            options.keys.note(file.name, encrypted=False)
            yield Disk(shown(path), form, RawBacking(file, shown(path)), file=file)
        finally:
            file.close()
        return
    image = await Image.open(path, options)
    try:
        view = image.active
        if snapshot is not None:
            view = image.snapshot_view(find_snapshot(image.snapshots, snapshot))
        yield Disk(view.label, form, view, image=image)
    finally:
        image.close()


async def _probe(path: Path, options: OpenOptions) -> str:
    file = options.open_host(path)
    try:
        found = await probe_format(file)
    finally:
        file.close()
    if found not in FORMATS:
        raise UnsupportedFeature(
            f"{shown(path)}: is a {found} image; qcow2 and raw are supported (-f raw reads it as it is)"
        )
    return found


@asynccontextmanager
async def open_backing_of(
    image: Path, name: str, form: str, options: OpenOptions | None = None
) -> AsyncIterator[Disk]:
    """Open what an image at `image` would have as backing file; raises `BackingFileError` if refused."""
    options = options or OpenOptions()
    reference = BackingReference(shown(image), image, name.encode("utf-8", "surrogateescape"), form)
    path = reference.locate(options.backing)
    reference.open(path, options.open_host).close()
    async with open_disk(path, form, options) as disk:
        yield disk
