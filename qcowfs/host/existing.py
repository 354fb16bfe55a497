"""A file or block device that is there already and is written into as it is.

Owns that nobody else uses it meanwhile, that there is room, and how it becomes blank. Must not know what is
written. It keeps its name, its size and what lies behind.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qcowfs.errors import ImageInUse, UsageError
from qcowfs.host import locks, syscalls
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.waiting import run_in_thread
from qcowfs.text import printable

_CANNOT_ZERO = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSYS)


@asynccontextmanager
async def existing_file(path: Path, size: int) -> AsyncIterator[OsHostFile]:
    """The file or device to be written, which is on disk when the block ends well.

    Raises `UsageError` if it has less than `size` bytes, `ImageInUse` where somebody else uses it, and
    `OSError` as the host does.
    """
    file = _open(path)
    try:
        locks.acquire(file.fd, file.name, locks.WRITER)
        room = file.facts().size
        if room < size:
            raise UsageError(f"{_shown(path)}: has {room} bytes, the disk has {size}")
        yield file
        await file.sync()
    finally:
        file.close()


async def make_blank(file: OsHostFile, size: int) -> bool:
    """Have the host turn the first `size` bytes into zeros; False where it would have to write them."""
    try:
        if size:
            await run_in_thread(syscalls.punch_hole, file.fd, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_ZERO:
            raise
        return False
    return True


def _open(path: Path) -> OsHostFile:
    try:
        return OsHostFile.open(path, writable=True, alone=True)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise ImageInUse(f"{_shown(path)}: the device is in use, mounted or part of another one") from None


def _shown(path: Path) -> str:
    return printable(os.fsencode(path))
