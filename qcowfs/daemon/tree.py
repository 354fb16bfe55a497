"""The inode tree: what files the mount shows, with their numbers, names and times.

Owns inode numbers, which are never used twice in a mount's life. Must not know FUSE or how bytes are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from qcowfs.data.views import ImageView
from qcowfs.disk.image import Image
from qcowfs.disk.live import DiskWriter
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.metadata.snapshots import file_name

ROOT_INODE = 1
DISK_NAME = b"disk.raw"
SNAPSHOTS_NAME = b"snapshots"
FACTS_NAME = b".qcowfs"


@dataclass
class Folder:
    """A directory and its entries by name."""

    inode: int
    mtime_ns: int
    entries: dict[bytes, Node] = field(default_factory=dict)


@dataclass
class DiskFile:
    """A raw disk; `allocated` is how many bytes took space when they were counted, None before.

    `writer` is there for the live disk of a writable mount; `written_ns` is when it was last written, if
    that is not its time yet. `stretches` are the hole and the data that were walked last, each with the
    writer's number of changes at that time.
    """

    inode: int
    mtime_ns: int
    view: ImageView
    snapshot: Snapshot | None = None
    allocated: int | None = None
    writer: DiskWriter | None = None
    written_ns: int | None = None
    stretches: dict[bool, tuple[int, range]] = field(default_factory=dict)

    async def count_allocated(self) -> None:
        """Count what takes space. Raises `QcowError` or `OSError` where the tables cannot be read."""
        before = 0
        if self.writer is not None:
            await self.writer.flush()
            before = self.writer.allocated_since_open
        self.allocated = await self.view.allocated_bytes() - before

    @property
    def allocated_now(self) -> int | None:
        """Bytes that take space, None until they are counted."""
        if self.allocated is None or self.writer is None:
            return self.allocated
        return min(self.view.size, self.allocated + self.writer.allocated_since_open)


@dataclass
class FactsFile:
    """A small text file that no listing shows: the daemon's pid and its image, for `qcowfs umount`."""

    inode: int
    mtime_ns: int
    content: bytes


Node = Folder | DiskFile | FactsFile


class Tree:
    """Every node of one mount by inode number; views of snapshots are made when first needed."""

    def __init__(self, image: Image, facts: bytes) -> None:
        """Show the image's live disk and its snapshots, and `facts` to who knows where they are."""
        self._numbers = count(ROOT_INODE)
        self._nodes: dict[int, Node] = {}
        self._gone: set[int] = set()
        mtime = image.file.facts().mtime_ns
        self.root = self._folder(mtime)
        self.disk = self._file(mtime, image.active, None)
        self.disk.writer = image.writer
        self.snapshots = self._folder(mtime)
        self.facts = FactsFile(next(self._numbers), mtime, facts)
        self._nodes[self.facts.inode] = self.facts
        self.root.entries = {DISK_NAME: self.disk, SNAPSHOTS_NAME: self.snapshots}
        self._image = image
        for snapshot in image.snapshots:
            self.add_snapshot(snapshot)

    def get(self, inode: int) -> Node | None:
        """The node with that inode number."""
        return self._nodes.get(inode)

    def files(self) -> Iterator[DiskFile]:
        """Every raw disk."""
        return (node for node in self._nodes.values() if isinstance(node, DiskFile))

    def find(self, folder: Folder, name: bytes) -> Node | None:
        """The node of that name in a folder, listed or not."""
        if folder is self.root and name == FACTS_NAME:
            return self.facts
        return folder.entries.get(name)

    def file_of(self, snapshot: Snapshot) -> tuple[bytes, DiskFile]:
        """The name and the file of a snapshot that is listed."""
        entries = self.snapshots.entries.items()
        return next((n, f) for n, f in entries if isinstance(f, DiskFile) and f.snapshot == snapshot)

    def add_snapshot(self, snapshot: Snapshot) -> DiskFile:
        """List a snapshot that the image has now."""
        view = self._image.snapshot_view(snapshot)
        file = self._file(snapshot.date_ns, view, snapshot)
        self.snapshots.entries[self._free_name(snapshot)] = file
        return file

    def remove_snapshot(self, name: bytes, file: DiskFile) -> None:
        """List a snapshot no more; who has it open cannot read it any further."""
        file.view.end()
        del self.snapshots.entries[name]
        self._gone.add(file.inode)

    def rename_snapshot(self, name: bytes, file: DiskFile, snapshot: Snapshot) -> bytes:
        """List a snapshot under what it is called now; its new file name."""
        del self.snapshots.entries[name]
        file.snapshot = snapshot
        new = self._free_name(snapshot)
        self.snapshots.entries[new] = file
        return new

    def forget(self, inode: int) -> None:
        """Drop a node that is not listed any more, since the kernel has."""
        if inode in self._gone:
            self._gone.remove(inode)
            del self._nodes[inode]

    def _free_name(self, snapshot: Snapshot) -> bytes:
        taken = {os.fsdecode(name) for name in self.snapshots.entries}
        return os.fsencode(file_name(snapshot, self._image.snapshots.index(snapshot) + 1, taken))

    def __len__(self) -> int:
        """How many nodes a listing shows."""
        return len(self._nodes) - len(self._gone) - 1

    def _folder(self, mtime_ns: int) -> Folder:
        folder = Folder(next(self._numbers), mtime_ns)
        self._nodes[folder.inode] = folder
        return folder

    def _file(self, mtime_ns: int, view: ImageView, snapshot: Snapshot | None) -> DiskFile:
        file = DiskFile(next(self._numbers), mtime_ns, view, snapshot)
        self._nodes[file.inode] = file
        return file
