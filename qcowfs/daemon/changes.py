"""The requests that change the image as a whole: snapshots made, dropped and renamed as files, and orders.

Owns what these requests mean. Must not know how a snapshot is taken: that is `control`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pyfuse3

from qcowfs.daemon.control import Control
from qcowfs.daemon.operations import Operations, Ownership
from qcowfs.daemon.orders import LONGEST_ORDER, obey
from qcowfs.daemon.replies import answers
from qcowfs.daemon.tree import DiskFile, FactsFile
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.metadata.snapshots import name_of


class ChangingOperations(Operations):
    """The handlers of one mount, with those that a writable one has in addition."""

    def __init__(self, control: Control, ownership: Ownership, facts: dict[bytes, bytes]) -> None:
        """Serve the tree of `control`."""
        super().__init__(control.tree, ownership, facts)
        self._control = control
        self._writers: set[int] = set()
        self._answers: dict[int, bytes] = {}

    @answers
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a disk, or the hidden file to give orders."""
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing and self._may_change and isinstance(self._node(inode), FactsFile):
            handle = next(self._next_handle)
            self._answers[handle] = b""
            return pyfuse3.FileInfo(fh=handle, direct_io=True)
        info = await super().open(inode, flags, ctx)
        if writing:
            self._writers.add(info.fh)
            self._control.open_for_writing = len(self._writers)
        return info

    @answers
    async def read(  # type: ignore[override]  # any buffer will do, whatever the stub says
        self, fh: int, off: int, size: int
    ) -> memoryview | bytes:
        """Read guest bytes, or the answer to an order."""
        if fh in self._answers:
            return self._answers[fh][off : off + size]
        return await super().read(fh, off, size)

    @answers
    async def write(self, fh: int, off: int, buf: bytes | memoryview) -> int:
        """Write guest bytes, or an order, which is carried out before the write returns."""
        if fh not in self._answers:
            return await super().write(fh, off, buf)
        if off or len(buf) >= LONGEST_ORDER:
            raise pyfuse3.FUSEError(errno.EINVAL)
        self._answers[fh] = await obey(self._control, bytes(buf))
        return len(buf)

    @answers
    async def release(self, fh: int) -> None:
        """Forget an open file."""
        self._answers.pop(fh, None)
        self._writers.discard(fh)
        self._control.open_for_writing = len(self._writers)
        await super().release(fh)

    @answers
    async def create(  # type: ignore[override]  # refused by default
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Take a snapshot, and open its file; whoever writes to it gets an error."""
        self._refuse_elsewhere(parent_inode)
        file = await self._control.create(self._snapshot_name(name))
        handle = next(self._next_handle)
        self._handles[handle] = file
        return pyfuse3.FileInfo(fh=handle, keep_cache=True), self._attributes(file)

    @answers
    async def unlink(  # type: ignore[override]  # refused by default
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Delete a snapshot."""
        self._refuse_elsewhere(parent_inode)
        await self._control.delete(self._snapshot_at(name))

    @answers
    async def rename(  # type: ignore[override]  # refused by default
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        """Rename a snapshot; never over another one."""
        self._refuse_elsewhere(parent_inode_old)
        self._refuse_elsewhere(parent_inode_new)
        if flags & pyfuse3.RENAME_EXCHANGE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        snapshot = self._snapshot_at(name_old)
        if name_old != name_new:
            await self._control.rename(snapshot, self._snapshot_name(name_new))

    @answers
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Let the live disk grow, and `touch` of a snapshot pass; else as for every disk."""
        node = self._node(inode)
        if isinstance(node, DiskFile) and self._may_change:
            others = fields.update_mode or fields.update_uid or fields.update_gid or fields.update_size
            if node.snapshot is not None and not others:
                return self._attributes(node)
            if node is self._tree.disk and fields.update_size and attr.st_size > node.view.size:
                await self._control.grow(attr.st_size)
        return await super().setattr(inode, attr, fields, fh, ctx)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Drop nodes of deleted snapshots that the kernel has forgotten."""
        for inode, _ in inode_list:
            self._tree.forget(inode)

    @property
    def _may_change(self) -> bool:
        return self._tree.disk.writer is not None

    def _refuse_elsewhere(self, folder: int) -> None:
        if not self._may_change:
            raise pyfuse3.FUSEError(errno.EROFS)
        if self._folder(folder) is not self._tree.snapshots:
            raise pyfuse3.FUSEError(errno.EPERM)

    def _snapshot_at(self, name: bytes) -> Snapshot:
        file = self._tree.find(self._tree.snapshots, name)
        if not isinstance(file, DiskFile) or file.snapshot is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return file.snapshot

    def _snapshot_name(self, file_name: bytes) -> bytes:
        """The name of the snapshot that a new file stands for, EINVAL if no snapshot gets such a file."""
        if file_name in self._tree.snapshots.entries:
            raise pyfuse3.FUSEError(errno.EEXIST)
        name = name_of(os.fsdecode(file_name))
        if name is None:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return name
