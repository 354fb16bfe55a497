"""Space requests: zeroing and giving back ranges, and finding where data lies.

Owns what fallocate's modes and lseek's places mean on a disk, which behaves as a block device of fixed size.
Must not know how a request arrives.
"""

from __future__ import annotations

import errno
import os

import pyfuse3

from qcowfs.daemon.tree import DiskFile

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


async def change_range(node: DiskFile, mode: int, offset: int, length: int) -> None:
    """Do what fallocate's `mode` asks for within the disk.

    Raises `FUSEError`: EROFS for a snapshot, ENOSPC beyond the end of the disk, EOPNOTSUPP for any
    other mode, since a qcow2 image reserves no space for what is not written yet.
    """
    if node.writer is None:
        raise pyfuse3.FUSEError(errno.EROFS)
    if not mode & KEEP_SIZE and offset + length > node.view.size:
        raise pyfuse3.FUSEError(errno.ENOSPC)
    length = min(length, node.view.size - offset)
    kind = mode & ~KEEP_SIZE
    if kind not in (PUNCH_HOLE, ZERO_RANGE):
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
    if length > 0:
        await node.writer.zero(offset, length, unmap=kind == PUNCH_HOLE)


async def find_place(node: DiskFile, offset: int, whence: int) -> int:
    """The next offset with data or in a hole, as lseek(2) tells them.

    Raises `FUSEError`: ENXIO where there is none, EINVAL for any other `whence`.
    """
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise pyfuse3.FUSEError(errno.EINVAL)
    size = node.view.size
    if not 0 <= offset < size:
        raise pyfuse3.FUSEError(errno.ENXIO)
    data = whence == os.SEEK_DATA
    found = await _find(node, offset, size, data=data)
    if found == size and data:
        raise pyfuse3.FUSEError(errno.ENXIO)
    return found


async def _find(node: DiskFile, offset: int, size: int, *, data: bool) -> int:
    """Where data, or a hole, begins, `size` for nowhere; a long stretch is walked once for many questions."""
    version = 0 if node.writer is None else node.writer.writes
    known = node.stretches.get(data)
    if known is not None and known[0] == version and offset in known[1]:
        return known[1].stop
    found = await node.view.find_next(offset, size, data=data)
    end = size if found is None else found
    node.stretches[data] = (version, range(offset, end))
    return end
