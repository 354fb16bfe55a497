"""What a status call tells of a file.

Owns what makes two open files the same one. Must not know what is in them.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple


class FileFacts(NamedTuple):
    """What a status call tells of a host file: sizes in bytes, time in nanoseconds since 1970."""

    size: int
    allocated: int
    mtime_ns: int
    identity: tuple[int, int]
    regular: bool


def facts_of(fd: int) -> FileFacts:
    """The facts of an open file; a device is as long as one can seek in it."""
    status = os.fstat(fd)
    regular = stat.S_ISREG(status.st_mode)
    size = status.st_size if regular else os.lseek(fd, 0, os.SEEK_END)
    return FileFacts(size, status.st_blocks * 512, status.st_mtime_ns, identity_of(status), regular)


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """What two names of one file share: its inode, and of a device, which may have several, its number."""
    return (status.st_rdev, 0) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
