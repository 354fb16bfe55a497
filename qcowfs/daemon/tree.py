"""The inode tree: what files the mount shows, with their numbers, names and times.

Owns inode numbers, which are never used twice in a mount's life. Must not know FUSE or how bytes are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from qcowfs.format.snapshot_table import Snapshot
from qcowfs.image import Image
from qcowfs.snapshots import file_names
from qcowfs.views import ImageView

ROOT_INODE = 1
DISK_NAME = b"disk.raw"
SNAPSHOTS_NAME = b"snapshots"


@dataclass
class Folder:
    """A directory and its entries by name."""

    inode: int
    mtime_ns: int
    entries: dict[bytes, Node] = field(default_factory=dict)


@dataclass
class DiskFile:
    """A raw disk; `allocated` is how many bytes take space, None until they are counted."""

    inode: int
    mtime_ns: int
    view: ImageView
    snapshot: Snapshot | None = None
    allocated: int | None = None


Node = Folder | DiskFile


class Tree:
    """Every node of one mount by inode number; views of snapshots are made when first needed."""

    def __init__(self, image: Image) -> None:
        """Show the image's live disk and its snapshots."""
        self._numbers = count(ROOT_INODE)
        self._nodes: dict[int, Node] = {}
        mtime = image.file.facts().mtime_ns
        self.root = self._folder(mtime)
        self.disk = self._file(mtime, image.active, None)
        self.snapshots = self._folder(mtime)
        self.root.entries = {DISK_NAME: self.disk, SNAPSHOTS_NAME: self.snapshots}
        for snapshot, name in zip(image.snapshots, file_names(image.snapshots), strict=True):
            view = image.snapshot_view(snapshot)
            self.snapshots.entries[name.encode()] = self._file(snapshot.date_ns, view, snapshot)

    def get(self, inode: int) -> Node | None:
        """The node with that inode number."""
        return self._nodes.get(inode)

    def files(self) -> Iterator[DiskFile]:
        """Every raw disk."""
        return (node for node in self._nodes.values() if isinstance(node, DiskFile))

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._nodes)

    def _folder(self, mtime_ns: int) -> Folder:
        folder = Folder(next(self._numbers), mtime_ns)
        self._nodes[folder.inode] = folder
        return folder

    def _file(self, mtime_ns: int, view: ImageView, snapshot: Snapshot | None) -> DiskFile:
        file = DiskFile(next(self._numbers), mtime_ns, view, snapshot)
        self._nodes[file.inode] = file
        return file
