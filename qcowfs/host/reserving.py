"""Blocks set aside for long writes to new space, on file systems that write faster then.

Owns which these are, and how long a write has to be. Must not know what is written. ext4 takes the blocks of
new space one by one as the page cache gets its pages, but those of a range that has its blocks together. xfs
takes more at a time by itself, and is slower so.
"""

from __future__ import annotations

import os
from pathlib import Path

from qcowfs.host import syscalls

LEAST = 1 << 20
"""Bytes: for fewer the call costs more than it spares."""
_MOUNTS = Path("/proc/self/mountinfo")


class Reserver:
    """Sets blocks aside for one file, as long as the host takes it."""

    def __init__(self, fd: int) -> None:
        """For the file of a descriptor, which stays the caller's."""
        self._fd = fd
        self._wanted = kind_of_file_system(os.fstat(fd).st_dev) == "ext4"

    def reserve(self, offset: int, length: int) -> None:
        """Set blocks aside for a range that is about to be written; where that fails, the write tells why."""
        if not self._wanted or length < LEAST:
            return
        try:
            syscalls.reserve(self._fd, offset, length)
        except OSError:
            self._wanted = False


def kind_of_file_system(device: int) -> str:
    """What a device is mounted as, empty if that is not known."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = _MOUNTS.read_text(errors="replace").split("\n")  # any other character may be in a name
    except OSError:
        return ""
    for line in lines:
        place, _, kind = line.partition(" - ")
        if place.split(" ", 3)[2:3] == [number]:
            return kind.partition(" ")[0]
    return ""
