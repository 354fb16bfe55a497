"""Opening an image file for a check or a repair, under QEMU's locks.

Owns which locks. Must not know what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcowfs import locks
from qcowfs.hostfile import OsHostFile


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
