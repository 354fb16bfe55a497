"""Changes to the image as a whole while it is mounted: snapshots and the disk's size.

Owns what has to happen around such a change: pages written back before, the tree and the kernel's caches
brought up to date after, and who has to be asked first. Must not know how the wish arrived.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from qcowfs.daemon.holders import writers_of
from qcowfs.daemon.tree import DISK_NAME, DiskFile, Tree
from qcowfs.disk import states
from qcowfs.disk.image import Image
from qcowfs.errors import ImageInUse
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.host.waiting import run_in_thread
from qcowfs.text import quoted

log = logging.getLogger(__name__)

_PLAIN_WORDS = os.environ | {"LC_ALL": "C"}


class Control:
    """Changes one mounted image, one change at a time.

    What asks the kernel for its pages does so before or after its turn: the kernel may hold them while it
    waits for the turn of `grow`.
    """

    def __init__(self, image: Image, tree: Tree, mount_point: Path) -> None:
        """Keep `tree` and the kernel's view of `mount_point` in step with the image."""
        self.image = image
        self.tree = tree
        self._disk_path = mount_point / os.fsdecode(DISK_NAME)
        self._lock = trio.Lock()
        self.open_for_writing = 0
        """Open handles of the live disk that may write."""

    async def create(self, name: bytes) -> DiskFile:
        """Take a snapshot of all that was written before, also through memory maps."""
        await run_in_thread(sync_pages, self._disk_path)
        async with self._lock:
            file = self.tree.add_snapshot(await states.create_snapshot(self.image, name))
            await self._folder_changed()
        log.info("took the snapshot %s", quoted(name))
        return file

    async def delete(self, snapshot: Snapshot) -> None:
        """Drop a snapshot; who has its file open cannot read it any more."""
        async with self._lock:
            name, file = self.tree.file_of(snapshot)
            await states.delete_snapshot(self.image, snapshot)
            self.tree.remove_snapshot(name, file)
            await self._folder_changed(name)
        log.info("deleted the snapshot %s", quoted(snapshot.name))

    async def rename(self, snapshot: Snapshot, new: bytes) -> None:
        """Give a snapshot and its file another name."""
        async with self._lock:
            name, file = self.tree.file_of(snapshot)
            renamed = await states.rename_snapshot(self.image, snapshot, new)
            self.tree.rename_snapshot(name, file, renamed)
            await self._folder_changed(name)
        log.info("renamed the snapshot %s to %s", quoted(snapshot.name), quoted(new))

    async def revert(self, snapshot: Snapshot, *, force: bool) -> None:
        """Set the live disk to a snapshot.

        Raises `ImageInUse` while somebody may write to it or a loop device, with its own cache, sits on it.
        """
        async with self._lock:
            if not force:
                await self._refuse_if_held()
            await states.revert(self.image, snapshot)
            await self._disk_changed()
        await self._forget_pages()
        log.info("went back to the snapshot %s", quoted(snapshot.name))

    async def _refuse_if_held(self) -> None:
        holders = await run_in_thread(writers_of, self._disk_path)
        if self.open_for_writing or holders:
            raise ImageInUse(
                f"{self.image.label}: disk.raw is in use by {', '.join(holders) or 'another program'}, which "
                "would mix old and new; close it first, or use --force"
            )

    async def resize(self, size: int, *, shrink: bool) -> None:
        """Give the live disk another size."""
        await run_in_thread(sync_pages, self._disk_path)
        async with self._lock:
            await self._resize(size, shrink=shrink)
        await self._forget_pages()

    async def grow(self, size: int) -> None:
        """As `resize`, when the kernel itself asks: it holds the disk's lock and knows of the new size."""
        async with self._lock:
            await self._resize(size, shrink=False)

    async def _resize(self, size: int, *, shrink: bool) -> None:
        await states.resize(self.image, size, shrink=shrink)
        await self._disk_changed()
        log.info("resized the disk to %d bytes", size)

    async def _disk_changed(self) -> None:
        disk = self.tree.disk
        disk.mtime_ns, disk.written_ns, disk.allocated = time.time_ns(), None, None
        await disk.count_allocated()

    async def _forget_pages(self) -> None:
        inode = self.tree.disk.inode
        await run_in_thread(_forget, lambda: pyfuse3.invalidate_inode(inode))

    async def _folder_changed(self, gone: bytes | None = None) -> None:
        folder = self.tree.snapshots
        folder.mtime_ns = time.time_ns()
        await run_in_thread(_forget, lambda: pyfuse3.invalidate_inode(folder.inode, attr_only=True))
        if gone is not None:
            pyfuse3.invalidate_entry_async(folder.inode, gone, ignore_enoent=True)


def _forget(tell_kernel: Callable[[], None]) -> None:
    """Tell the kernel that something has changed; it may know nothing of it yet."""
    try:
        tell_kernel()
    except OSError as error:
        if error.errno != errno.ENOENT:
            log.warning("the kernel keeps old pages: %s", error)


def sync_pages(disk: Path) -> None:
    """Make the kernel hand over what programs wrote through mappings; never from the event loop.

    Another process waits for that: a thread of a daemon that is killed meanwhile would wait for ever, and
    keep the mount and the image's locks alive. Raises `OSError` as the kernel does.
    """
    words = ["sync", str(disk)]
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=_PLAIN_WORDS)
    if result.returncode:
        reason = result.stderr.rstrip().rpartition(": ")[2]
        number = next((n for n in errno.errorcode if os.strerror(n) == reason), errno.EIO)
        raise OSError(number, reason, str(disk))
