"""System calls of Linux that Python's `os` leaves out, by the C library.

Owns their numbers and argument types. Must not know what they are for. All release the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_SYNC_FILE_RANGE_WRITE = 2
_PR_SET_IO_FLUSHER = 57
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def _library() -> Any:  # noqa: ANN401 - the C library's functions have no types
    library = ctypes.CDLL(None, use_errno=True)
    for name, types in {
        "fallocate": (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
        "sync_file_range": (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint),
    }.items():
        if hasattr(library, name):
            getattr(library, name).argtypes = types
    return library


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make a range of the file a hole. Raises `OSError` where the file system has none."""
    _fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length)


def reserve(fd: int, offset: int, length: int) -> None:
    """Set blocks aside for a range, also past the end of the file. Raises `OSError` as the host does."""
    _fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _library().fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def begin_writing(fd: int, offset: int, length: int) -> None:
    """Start writing the range's dirty pages to the disk; a failure does not matter, since a sync tells."""
    if hasattr(_library(), "sync_file_range"):
        _library().sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def keep_freed_memory(size: int) -> None:
    """Let the C library keep so many freed bytes for later: giving them back costs page faults."""
    if hasattr(_library(), "mallopt"):
        _library().mallopt(_M_MMAP_THRESHOLD, size)
        _library().mallopt(_M_TRIM_THRESHOLD, size)


def set_io_flusher() -> int:
    """Tell the kernel that this process frees memory by writing; 0, or the errno of a refusal."""
    return ctypes.get_errno() if _library().prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) else 0
