"""QEMU's image locks: one shared byte lock per permission that is used or denied to others.

Owns the byte numbers and the search for whoever holds them. Must not know what the file contains. The rules
are those of QEMU's file driver: all locks are shared, conflicts are found by testing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qcowfs.errors import ImageInUse
from qcowfs.text import printable

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = 0, 1, 2, 3
PERMISSION_NAMES = {
    CONSISTENT_READ: "consistent read",
    WRITE: "write",
    WRITE_UNCHANGED: "write unchanged",
    RESIZE: "resize",
}
_USED_BASE, _DENIED_BASE = 100, 200
_FLOCK = struct.Struct("hhqqi4x")
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class LockMode:
    """The permissions that an opener uses, and those that it denies to everyone else."""

    used: frozenset[int]
    denied: frozenset[int]


WRITER = LockMode(frozenset({CONSISTENT_READ, WRITE, RESIZE}), frozenset({WRITE, RESIZE}))
READER = LockMode(frozenset({CONSISTENT_READ}), frozenset({WRITE, RESIZE}))
SHARED_READER = LockMode(frozenset({CONSISTENT_READ}), frozenset())


def acquire(fd: int, path: str, mode: LockMode) -> None:
    """Lock the open file; the locks last until its last descriptor is closed.

    Raises `ImageInUse` that names the holder where it can be found. A file system without such locks
    goes unlocked, as in QEMU.
    """
    ours = [_USED_BASE + p for p in mode.used] + [_DENIED_BASE + p for p in mode.denied]
    try:
        for byte in ours:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise ImageInUse(_describe(fd, path, byte)) from None
    conflict = _find_conflict(fd, mode)
    if conflict is not None:
        release(fd)
        raise ImageInUse(_describe(fd, path, conflict))


def release(fd: int) -> None:
    """Drop every lock that the open file holds."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _find_conflict(fd: int, mode: LockMode) -> int | None:
    """The byte that a foreign lock holds against us, None if there is none."""
    against_us = [_DENIED_BASE + p for p in sorted(mode.used)]
    against_them = [_USED_BASE + p for p in sorted(mode.denied)]
    return next((b for b in against_them + against_us if _is_foreign(fd, b)), None)


def _is_foreign(fd: int, byte: int) -> bool:
    probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _describe(fd: int, path: str, byte: int) -> str:
    denied = byte >= _DENIED_BASE
    permission = PERMISSION_NAMES[byte - (_DENIED_BASE if denied else _USED_BASE)]
    does = f"denies others {permission!r}" if denied else f"has it open for {permission!r}"
    holders = [f"pid {pid} ({program})" for pid, program in find_holders(fd, byte)]
    who = " and ".join(holders) or "another process (not visible from here)"
    return f"{path}: in use: {who} {does}; stop it first, or read beside it with --force-share"


def find_holders(fd: int, byte: int) -> Iterator[tuple[int, str]]:
    """(pid, program) of every other open of the same file that holds a lock on `byte`."""
    status = os.fstat(fd)
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _holds(process, fd, status, byte):
            yield int(process.name), _program_of(process)


def _holds(process: Path, fd: int, status: os.stat_result, byte: int) -> bool:
    """Whether one of the process's descriptors of that file, other than ours, locks the byte."""
    try:
        links = list((process / "fd").iterdir())
    except OSError:
        return False
    own = int(process.name) == os.getpid()
    others = (link for link in links if not own or link.name != str(fd))
    return any(_locks(process, link, status, byte) for link in others)


def _locks(process: Path, link: Path, status: os.stat_result, byte: int) -> bool:
    """Whether a descriptor locks the byte of that file.

    The file is looked at only if a lock names its inode: a look at any other may wait for a dead mount.
    """
    try:
        lines = (process / "fdinfo" / link.name).read_text().splitlines()
        held = [line for line in lines if line.startswith("lock:") and _covers(line, status.st_ino, byte)]
        return bool(held) and os.path.samestat(link.stat(), status)
    except OSError:
        return False


def _covers(line: str, inode: int, byte: int) -> bool:
    where, first, last = line.split()[-3:]
    same = where.rpartition(":")[2] == str(inode)
    return same and int(first) <= byte and (last == "EOF" or byte <= int(last))


def _program_of(process: Path) -> str:
    try:
        return printable((process / "comm").read_bytes().strip())
    except OSError:
        return "unknown program"
