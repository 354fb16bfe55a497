"""A disk as a Python file: `qcowfs.open`.

Owns what such a file does. Must not know FUSE, the command line, or how plain calls reach the engine.
"""

from __future__ import annotations

import errno
import io
import os
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowfs.bridge import Engine
from qcowfs.data.backing import RawBacking
from qcowfs.data.views import ImageView
from qcowfs.disk.disks import Disk, open_disk
from qcowfs.disk.extents import DiskExtent, disk_extents
from qcowfs.disk.image import Image, OpenOptions, shown
from qcowfs.disk.info import read_info
from qcowfs.disk.keys import Keys
from qcowfs.errors import UsageError
from qcowfs.format.snapshot_table import Snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_AT_ONCE = 512
"""Extents that are fetched from the engine by one call."""
_LITTLE = 1 << 16
"""Bytes up to which a write is tried from the caller's thread, at the cost of a copy."""


def open(  # noqa: A001 - called as `qcowfs.open`, as `gzip.open` is
    path: str | os.PathLike[str],
    snapshot: str | None = None,
    mode: str = "r",
    *,
    format: str | None = "qcow2",  # noqa: A002 - what everyone calls it
    options: OpenOptions | None = None,
    key: bytes | None = None,
    keys: Mapping[str, bytes] | None = None,
) -> DiskFile:
    """Open a disk as a binary file of fixed size.

    `snapshot` is the id or name of an internal snapshot, which is read-only. `mode` is "r" or "r+"; the
    latter takes a writer's lock, so nobody else may have the image open. `format` may be "raw", or None to
    go by the first bytes. `options` says what else may be opened and how much memory is used. `key` is the
    passphrase of encrypted images, `keys` has those of single images by path or file name; without either,
    those of `options` count.

    Raises `QcowError` with one line that names the image and what is wrong, or `OSError` as the host does.
    """
    if mode not in ("r", "rb", "r+", "rb+", "r+b"):
        raise UsageError(f"mode {mode!r}: must be 'r' or 'r+'")
    writable = "+" in mode
    if writable and snapshot is not None:
        raise UsageError(f"snapshot {snapshot!r}: snapshots are read-only; leave the mode at 'r'")
    options = replace(options or OpenOptions(), writable=writable)
    if key is not None or keys is not None:
        options = replace(options, keys=Keys(keys, key))
    engine = Engine(lambda: _opened(Path(path), format, options, snapshot))
    return DiskFile(engine, Path(path), writable=writable)


def _opened(
    path: Path, form: str | None, options: OpenOptions, snapshot: str | None
) -> AbstractAsyncContextManager[Disk]:
    if not options.writable:
        return open_disk(path, form, options, snapshot)
    if form == "raw":
        raise UsageError(f"{shown(path)}: raw disks are only read; Python's own open writes them")
    return _writable(path, options)


@asynccontextmanager
async def _writable(path: Path, options: OpenOptions) -> AsyncIterator[Disk]:
    image = await Image.open(path, options)
    try:
        yield Disk(image.label, "qcow2", image.active, image=image)
    finally:
        await image.aclose()


class DiskFile(io.RawIOBase):
    """A disk as an unbuffered binary file: it has a position, and its size never changes.

    Any thread may call it; calls wait for each other. It does not survive `fork`: open it anew in the
    child. What `flush` returned from is on the host's disk, and so is everything after `close`.
    """

    def __init__(self, engine: Engine, path: Path, *, writable: bool) -> None:
        """For `open` only."""
        super().__init__()
        self.name = str(path)
        self.mode = "rb+" if writable else "rb"
        self._path = path
        self._writable = writable
        self._engine = engine
        self._position = 0
        self._reader = engine.disk.reader
        self._writer = None if engine.disk.image is None else engine.disk.image.writer
        self._finalizer = weakref.finalize(self, engine.stop)

    # -- what it is

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._reader.size

    @property
    def snapshots(self) -> list[Snapshot]:
        """The internal snapshots of the image, oldest first."""
        image = self._engine.disk.image
        return [] if image is None else list(image.snapshots)

    @property
    def info(self) -> dict[str, Any]:
        """What the image is and holds, under the keys of `qemu-img info --output=json`."""
        self._check_open()
        if self._engine.disk.image is None:
            facts = self._engine.disk.file
            actual = 0 if facts is None else facts.facts().allocated
            return {"filename": self.name, "format": "raw", "virtual-size": self.size, "actual-size": actual}
        return self._engine.run(read_info, self._path, self.name, _ignore)

    def extents(self, start: int = 0, end: int | None = None) -> Iterator[DiskExtent]:
        """Where the disk's bytes lie, from `start` to `end`, in order and without gaps.

        What was written before is flushed first, so that it is told.
        """
        self._check_open()
        if self._writable:
            self.flush()
        found = disk_extents(self._engine.disk, start, end, sharing=True)
        while batch := self._engine.run(_take, found):
            yield from batch

    # -- io.RawIOBase

    def readable(self) -> bool:
        """Always."""
        self._check_open()
        return True

    def writable(self) -> bool:
        """Whether it was opened with "r+"."""
        self._check_open()
        return self._writable

    def seekable(self) -> bool:
        """Always."""
        self._check_open()
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position; beyond the end is allowed, reading there gives nothing."""
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"whence {whence}: must be 0, 1 or 2")
        if bases[whence] + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        with self._engine.lock:
            self._position = bases[whence] + offset
            return self._position

    def tell(self) -> int:
        """The position in bytes."""
        self._check_open()
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer from the position on, less only at the end of the disk; how much it was."""
        self._check_open()
        with self._engine.lock:
            done = self.readinto_at(buffer, self._position)
            self._position += done
            return done

    def write(self, data: ReadableBuffer, /) -> int:
        """Write at the position; how much fitted before the end of the disk.

        Raises `OSError` (ENOSPC) at the end, `io.UnsupportedOperation` if open for reading.
        """
        self._check_open()
        with self._engine.lock:
            done = self.write_at(data, self._position)
            self._position += done
            return done

    def flush(self) -> None:
        """Return when everything written so far is on the host's disk."""
        super().flush()
        if self._writer is not None and self._writable:
            self._engine.run(self._writer.flush)

    def close(self) -> None:
        """Write everything back and close the image; raises what that raises, and is closed all the same."""
        if self.closed:
            return
        try:
            if self._finalizer.detach() is not None:
                self._engine.stop()
        finally:
            self._writable = False
            super().close()

    # -- without a position

    def readinto_at(self, buffer: WriteableBuffer, offset: int) -> int:
        """Fill the buffer from that offset on, less only at the end of the disk; how much it was."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self.size - offset)]
        with self._engine.lock:
            if not self._read_now(offset, view):
                self._engine.run(self._reader.read_into, offset, view)
        return len(view)

    def _read_now(self, offset: int, view: memoryview) -> bool:
        """Read without the engine where all is in memory; whether that was so."""
        if not view:
            return True
        if not isinstance(self._reader, ImageView):
            return isinstance(self._reader, RawBacking) and self._reader.file.read_cached(offset, view)
        found = self._reader.read_now(offset, view)
        if found is not None and found is not view:
            view[:] = found
        return found is not None

    def write_at(self, data: ReadableBuffer, offset: int) -> int:
        """Write at that offset; see `write`."""
        self._check_open()
        writer = self._writer
        if writer is None:
            raise io.UnsupportedOperation(f"{self.name}: is open for reading; mode 'r+' writes")
        view = memoryview(data).cast("B")
        if offset >= self.size and view:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        view = view[: self.size - offset]
        with self._engine.lock:
            if len(view) > _LITTLE or not writer.write_now(offset, bytes(view)):
                self._engine.run(writer.write, offset, view)
        return len(view)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.name}: the disk is closed")
        self._engine.check_process()


def _ignore(_: str) -> None:
    """What `info` would warn about is told when the image is opened."""


async def _take(extents: AsyncIterator[DiskExtent]) -> list[DiskExtent]:
    """Some more extents; none at the end."""
    taken = []
    async for extent in extents:
        taken.append(extent)
        if len(taken) == _AT_ONCE:
            break
    return taken
