"""Opening an image file for a check or a repair, under QEMU's locks, and the backup of a repair.

Owns which locks, and that a backup is a new file. Must not know what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcowfs.check.backup import BackedUpFile
from qcowfs.host import locks
from qcowfs.host.hostfile import HostFile, OsHostFile


@contextmanager
def opened(path: Path, *, writable: bool = False, force_share: bool = False) -> Iterator[OsHostFile]:
    """The image file alone, locked as a reader's or a writer's; nothing that it names is opened.

    Raises `ImageInUse` that names the holder, `UsageError` for what is no file, `OSError` as the host does.
    """
    file = OsHostFile.open(path, writable=writable)
    try:
        reader = locks.SHARED_READER if force_share else locks.READER
        locks.acquire(file.fd, file.name, locks.WRITER if writable else reader)
        yield file
    finally:
        file.close()


@contextmanager
def backed_up(file: HostFile, backup: Path | None) -> Iterator[HostFile]:
    """The file, whose old sectors go to a new backup before they are overwritten, if one is wanted.

    Raises `FileExistsError` rather than overwrite anything. A backup that nothing went to is removed.
    """
    if backup is None:
        yield file
        return
    backup.touch(mode=0o600, exist_ok=False)
    with opened_backup(backup, writable=True) as target:
        yield BackedUpFile(file, target)
        is_empty = not target.facts().size
    if is_empty:
        backup.unlink()


@contextmanager
def opened_backup(path: Path, *, writable: bool = False) -> Iterator[OsHostFile]:
    """A backup's file."""
    file = OsHostFile.open(path, writable=writable)
    try:
        yield file
    finally:
        file.close()
