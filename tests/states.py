"""An open image beside a model of what its live disk and its snapshots hold."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qcowfs.check import check
from qcowfs.disk import states
from qcowfs.disk.image import Image, read_header
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.host.hostfile import WriteRequest
from qcowfs.metadata.counts import Counts
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.testing import MemoryHostFile
from tests.host_files import writer_of
from tests.memory import CountedFile, MemoryFolder, read
from tests.shapes import DISK, Made, OpenDisk, open_disk, qemu


class FaultyFile(CountedFile):
    """A file that numbers its writes and syncs, and fails those that `failing` names."""

    def __init__(self, data: bytes, name: str = "memory") -> None:
        super().__init__(data, name)
        self.done = 0
        self.failing: range = range(0)
        self.error = errno.EIO

    def _count(self) -> None:
        self.done += 1
        if self.done - 1 in self.failing:
            raise OSError(self.error, os.strerror(self.error), self.name)

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        for request in requests:
            self._count()
            await super().write_from([request])

    async def sync(self) -> None:
        self._count()
        await super().sync()

    @contextmanager
    def fails(self, error: int, first: int, count: int = 1) -> Iterator[None]:
        """Let `count` writes and syncs fail, from the one on that comes after `first` others."""
        self.done, self.failing, self.error = 0, range(first, first + count), error
        try:
            yield
        finally:
            self.failing = range(0)


@dataclass
class Twin:
    """An open image beside plain bytes: what the live disk holds, and each snapshot by its id."""

    made: Made
    folder: MemoryFolder
    disk: OpenDisk
    live: bytes
    saved: dict[bytes, bytes] = field(default_factory=dict)

    @classmethod
    async def open(cls, made: Made, data: bytes | None = None) -> Twin:
        """Open an image as it was made, or other bytes of it."""
        folder = made.folder(data)
        folder.files[DISK] = FaultyFile(bytes(folder.files[DISK].data), folder.files[DISK].name)
        disk = await open_disk(folder)
        twin = cls(made, folder, disk, await disk.read(0, disk.size))
        twin.saved = {s.id: await twin.read(s) for s in disk.image.snapshots}
        return twin

    @property
    def image(self) -> Image:
        return self.disk.image

    @property
    def file(self) -> FaultyFile:
        found = self.folder.files[DISK]
        assert isinstance(found, FaultyFile)
        return found

    def snapshot(self, id_: bytes) -> Snapshot:
        """The record with that id, as it is now."""
        return next(s for s in self.image.snapshots if s.id == id_)

    async def read(self, snapshot: Snapshot) -> bytes:
        """A snapshot's content."""
        view = self.image.snapshot_view(snapshot)
        return await read(view, 0, view.size)

    # -- what is done to both

    async def write(self, guest: int, data: bytes) -> None:
        await writer_of(self.image).write(guest, data)
        self.live = self.live[:guest] + data + self.live[guest + len(data) :]

    async def zero(self, guest: int, length: int, *, unmap: bool = False) -> None:
        await writer_of(self.image).zero(guest, length, unmap=unmap)
        self.live = self.live[:guest] + bytes(length) + self.live[guest + length :]

    async def create(self, name: bytes = b"new") -> Snapshot:
        made = await states.create_snapshot(self.image, name)
        self.saved[made.id] = self.live
        return made

    async def delete(self, id_: bytes) -> None:
        await states.delete_snapshot(self.image, self.snapshot(id_))
        del self.saved[id_]

    async def rename(self, id_: bytes, name: bytes) -> Snapshot:
        return await states.rename_snapshot(self.image, self.snapshot(id_), name)

    async def revert(self, id_: bytes) -> None:
        await states.revert(self.image, self.snapshot(id_))
        self.live = self.saved[id_]

    async def resize(self, size: int) -> None:
        await states.resize(self.image, size, shrink=size < len(self.live))
        self.live = self.live[:size].ljust(size, b"\0")

    # -- what must hold

    async def assert_equal(self, told: str = "") -> None:
        """The open image reads as the model."""
        assert self.image.size == len(self.live), told
        assert await read(self.image.active, 0, self.image.size) == self.live, told
        assert {s.id: await self.read(s) for s in self.image.snapshots} == self.saved, told

    async def assert_no_errors(self, told: str = "") -> None:
        """The file, as a crash now would leave it, has no error."""
        assert (await check(self.file)).errors == [], told

    async def close(self, told: str = "") -> bytes:
        """Close the image in order; it is clean, without a leak. The file's bytes."""
        await self.assert_equal(told)
        await self.image.aclose()
        report = await check(self.file)
        assert (report.errors, report.leaks) == ([], []), told
        assert self.folder.left_open() == [], told
        return bytes(self.file.data)

    async def close_before_qemu(self, folder: Path) -> None:
        """Close the image; QEMU agrees with the model too."""
        assert_by_qemu(self.made, await self.close(), folder, self.live, self.saved)


def assert_by_qemu(made: Made, data: bytes, folder: Path, live: bytes, saved: dict[bytes, bytes]) -> None:
    """QEMU finds the image clean, and reads it as told."""
    path, raw = made.save(data, folder), folder / "seen.raw"
    words = made.shape.opened(path)
    qemu("qemu-img", "check", *words)
    qemu("qemu-img", "convert", "-O", "raw", *words, raw)
    assert raw.read_bytes() == live
    for id_, content in saved.items():
        qemu("qemu-img", "convert", "-O", "raw", "-l", f"snapshot.id={id_.decode()}", *words, raw)
        seen = raw.read_bytes()[: len(content)]  # QEMU gives each snapshot the live disk's size
        assert seen == content[: len(live)]


async def clusters_in_use(file: MemoryHostFile) -> int:
    """How many host clusters an image without leaks counts."""
    assert (await check(file)).is_clean
    header = await read_header(file, "test")
    counts = await Counts.load(file, header, MetadataMap(header.cluster_bits))
    return int((counts.values != 0).sum())
