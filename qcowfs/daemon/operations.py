"""The FUSE request handlers: decode, ask the tree or a view, encode.

Owns attributes, handles and read buffers. Must not know the qcow2 format or how the session lives.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time
from dataclasses import dataclass
from itertools import count

import pyfuse3

from qcowfs.daemon import space
from qcowfs.daemon.refusals import Refusals
from qcowfs.daemon.replies import answers
from qcowfs.daemon.tree import DiskFile, FactsFile, Folder, Node, Tree

EXACT_TIMEOUT = 3600.0
CHANGING_TIMEOUT = 1.0
GUESS_TIMEOUT = 0.0
MAX_READ = 1 << 20
FACTS_HANDLE = 0
_SPARE_BUFFERS = 16
_XATTR_PREFIX = b"user.qcowfs."


@dataclass(frozen=True)
class Ownership:
    """Who owns the files, and their permission bits; folders get x wherever files get r."""

    uid: int
    gid: int
    mode: int = 0o600

    @property
    def folder_mode(self) -> int:
        """Permission bits of folders."""
        return self.mode & 0o444 | (self.mode & 0o444) >> 2


class Buffers:
    """Spare buffers for replies, since a fresh one costs its zeroing and page faults.

    A buffer may be given back just before its handler returns: the reply is sent before any other task
    runs.
    """

    def __init__(self) -> None:
        """Start without spares."""
        self._spare: list[mmap.mmap] = []

    def take(self) -> mmap.mmap:
        """A buffer of `MAX_READ` bytes with arbitrary content, page aligned so that it copies fast."""
        return self._spare.pop() if self._spare else mmap.mmap(-1, MAX_READ)

    def give_back(self, buffer: mmap.mmap) -> None:
        """Keep the buffer for the next reader."""
        if len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(buffer)


class Operations(Refusals):
    """The handlers of one mount."""

    supports_dot_lookup = False

    def __init__(self, tree: Tree, ownership: Ownership, facts: dict[bytes, bytes]) -> None:
        """Serve `tree`; `facts` are extended attributes of the root, without their prefix."""
        super().__init__()
        self._tree = tree
        self._ownership = ownership
        self._facts = facts
        self._handles: dict[int, DiskFile] = {}
        self._next_handle = count(1)
        self._buffers = Buffers()
        self._cluster_size = tree.disk.view.cluster_size

    # -- names and attributes

    @answers
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name in a folder."""
        node = self._tree.find(self._folder(parent_inode), name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        await self._count_if_quick(node)
        return self._attributes(node)

    @answers
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Status of a node."""
        node = self._node(inode)
        await self._count_if_quick(node)
        return self._attributes(node)

    def _node(self, inode: int) -> Node:
        node = self._tree.get(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return node

    def _folder(self, inode: int) -> Folder:
        node = self._node(inode)
        if not isinstance(node, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return node

    async def _count_if_quick(self, node: Node) -> None:
        if isinstance(node, DiskFile) and node.allocated is None and node.view.counts_quickly:
            await node.count_allocated()

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_uid, entry.st_gid = self._ownership.uid, self._ownership.gid
        entry.st_blksize = self._cluster_size
        entry.attr_timeout = entry.entry_timeout = EXACT_TIMEOUT
        if isinstance(node, Folder):
            writable = node is self._tree.snapshots and self._tree.disk.writer is not None
            entry.st_mode = stat.S_IFDIR | self._ownership.folder_mode
            entry.st_mode |= self._ownership.mode & 0o222 if writable else 0
            entry.st_nlink = 2
        elif isinstance(node, FactsFile):
            permitted = 0o666 if self._tree.disk.writer is not None else 0o444
            entry.st_mode = stat.S_IFREG | self._ownership.mode & permitted
            entry.st_nlink, entry.st_size = 1, len(node.content)
        else:
            self._describe_disk(entry, node)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.mtime_ns
        return entry

    def _describe_disk(self, entry: pyfuse3.EntryAttributes, node: DiskFile) -> None:
        writable = node.writer is not None
        entry.st_mode = stat.S_IFREG | self._ownership.mode & (0o777 if writable else 0o444)
        entry.st_nlink = 1
        entry.st_size = node.view.size
        allocated = node.allocated_now
        entry.st_blocks = -(-(node.view.size if allocated is None else allocated) // 512)
        if allocated is None or writable:
            entry.attr_timeout = CHANGING_TIMEOUT if writable and allocated is not None else GUESS_TIMEOUT

    @answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Sizes in clusters: the live disk is the file system's extent."""
        facts = pyfuse3.StatvfsData()
        facts.f_bsize = facts.f_frsize = self._cluster_size
        facts.f_blocks = -(-self._tree.disk.view.size // self._cluster_size)
        facts.f_files = len(self._tree)
        facts.f_namemax = 255
        return facts

    @answers
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """Never asked: the kernel checks permissions itself (default_permissions)."""
        return True

    @answers
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """An extended attribute of the root (image, pid) or of a snapshot (id, name).

        On a writable mount there are none: the kernel would ask for one with every write.
        """
        if self._tree.disk.writer is not None:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        value = self._xattrs(self._node(inode)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @answers
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """The names of a node's extended attributes."""
        if self._tree.disk.writer is not None:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return list(self._xattrs(self._node(inode)))

    def _xattrs(self, node: Node) -> dict[bytes, bytes]:
        facts: dict[bytes, bytes] = {}
        if node is self._tree.root:
            facts = self._facts
        elif isinstance(node, DiskFile) and node.snapshot is not None:
            facts = {b"id": node.snapshot.id, b"name": node.snapshot.name}
        return {_XATTR_PREFIX + name: value for name, value in facts.items()}

    # -- folders

    @answers
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open a folder; its inode serves as handle."""
        return self._folder(inode).inode

    @answers
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a folder from the entry whose place is `start_id`."""
        entries = list(self._folder(fh).entries.items())
        for place, (name, node) in enumerate(entries[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), place):
                break

    # -- reading and writing

    @answers
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a disk; the kernel keeps what it has cached. Only the live disk may be writable."""
        node = self._node(inode)
        if isinstance(node, Folder):
            raise pyfuse3.FUSEError(errno.EISDIR)
        if flags & os.O_ACCMODE != os.O_RDONLY and getattr(node, "writer", None) is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        if isinstance(node, FactsFile):
            return pyfuse3.FileInfo(fh=FACTS_HANDLE, keep_cache=True)
        handle = next(self._next_handle)
        self._handles[handle] = node
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    @answers
    async def read(  # type: ignore[override]  # any buffer will do, whatever the stub says
        self, fh: int, off: int, size: int
    ) -> memoryview | bytes:
        """Read guest bytes; short only at the end of the disk."""
        if fh == FACTS_HANDLE:
            return self._tree.facts.content[off : off + size]
        return await self._read(fh, off, size, wait=False)

    @answers
    async def read_waiting(self, fh: int, off: int, size: int) -> memoryview | bytes:
        """As `read`, of bytes that are known to take waiting."""
        return await self._read(fh, off, size, wait=True)

    async def _read(self, fh: int, off: int, size: int, *, wait: bool) -> memoryview | bytes:
        view = self._handles[fh].view
        length = min(size, view.size - off, MAX_READ)
        if length <= 0:
            return b""
        buffer = self._buffers.take()
        part = memoryview(buffer)[:length]
        try:
            reply = None if wait else view.read_now(off, part)
            if reply is None:
                await view.read_into(off, part)
                reply = part
        finally:
            self._buffers.give_back(buffer)
        return reply

    @answers
    async def write(self, fh: int, off: int, buf: bytes | memoryview) -> int:
        """Write guest bytes; short only at the end of the disk, beyond it ENOSPC as on a block device."""
        node = self._handles[fh]
        length = min(len(buf), node.view.size - off)
        if node.writer is not None and length > 0 and node.writer.write_now(off, buf[:length]):
            node.written_ns = time.time_ns()
            return length
        return await self._write(node, off, buf)

    @answers
    async def write_waiting(self, fh: int, off: int, buf: bytes | memoryview) -> int:
        """As `write`, of bytes that are known to take waiting."""
        return await self._write(self._handles[fh], off, buf)

    async def _write(self, node: DiskFile, off: int, buf: bytes | memoryview) -> int:
        if node.writer is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        length = min(len(buf), node.view.size - off)
        if length <= 0:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        await node.writer.write(off, buf if length == len(buf) else buf[:length])
        node.written_ns = time.time_ns()
        return length

    @answers
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Set the live disk's time; its size stays, its owner and mode are the mount's.

        A size of 0 is what opening with O_TRUNC asks for: nothing, as on a block device.
        """
        node = self._node(inode)
        if not isinstance(node, DiskFile) or node.writer is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size not in (0, node.view.size):
            raise pyfuse3.FUSEError(errno.EINVAL)
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
            node.written_ns = None
        return self._attributes(node)

    @answers
    async def fallocate(self, inode: int, mode: int, off: int, length: int) -> None:
        """Zero a range or give it back; see `space.change_range`."""
        node = self._disk(inode)
        await space.change_range(node, mode, off, length)
        node.written_ns = time.time_ns()

    @answers
    async def lseek(self, inode: int, off: int, whence: int) -> int:
        """Find data or a hole; see `space.find_place`."""
        return await space.find_place(self._disk(inode), off, whence)

    def _disk(self, inode: int) -> DiskFile:
        node = self._node(inode)
        if not isinstance(node, DiskFile):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        return node

    @answers
    async def flush(self, fh: int) -> None:
        """Closing a descriptor: what was written through any handle goes to the host's disk.

        Only now the file's time moves: the kernel drops what it has cached when it sees a new one.
        """
        disk = self._tree.disk
        writer = disk.writer
        disk.mtime_ns, disk.written_ns = disk.written_ns or disk.mtime_ns, None
        if writer is not None and writer.is_dirty and fh != FACTS_HANDLE:
            await writer.flush()

    @answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Return when data and all metadata that it needs are on disk."""
        writer = self._tree.disk.writer
        if writer is not None:
            await writer.flush()

    @answers
    async def release(self, fh: int) -> None:
        """Forget an open file."""
        self._handles.pop(fh, None)
