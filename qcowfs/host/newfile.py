"""A new file that appears under its name only when it is whole.

Owns names, and what becomes of a file that has the name already. Must not know what is written. The file
has no name while it is made, so that nothing of it remains however the program ends; where the host cannot
do that, it has a temporary name in the same folder.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qcowfs.errors import UsageError
from qcowfs.host import locks
from qcowfs.host.hostfile import OsHostFile
from qcowfs.text import printable

_LONGEST_PART = 48


@asynccontextmanager
async def new_file(path: Path, *, force: bool = False, sync: bool = True) -> AsyncIterator[OsHostFile]:
    """A file to be filled, which gets its name when the block ends well and vanishes when it does not.

    With `force` it replaces a regular file that has the name; with `sync` it is on disk before that.
    Raises `UsageError` where the name is taken, `ImageInUse` where the file to be replaced is in use, and
    `OSError` as the host does.
    """
    path = path.resolve()  # noqa: ASYNC240 - as quick as the calls that follow
    replaced = _open_replaced(path, force=force)
    try:
        file, temporary = _create(path)
        file.expect_growth()
        synced = sync or replaced is not None
        if not synced:
            file.leave_to_host()
        try:
            yield file
            if synced:
                await file.sync()
            _publish(file, temporary, path, replaced)
        finally:
            file.close()
            if temporary is not None:
                with suppress(FileNotFoundError):
                    temporary.unlink()
    finally:
        if replaced is not None:
            replaced.close()


def _open_replaced(path: Path, *, force: bool) -> OsHostFile | None:
    """The file that will be replaced, locked so that nobody uses it; None if there is none."""
    shown = printable(os.fsencode(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"{shown}: exists and is no regular file, so it cannot be replaced; "
            "convert -n writes into a device"
        )
    if not force:
        raise UsageError(f"{shown}: exists; --force replaces it")
    file = OsHostFile.open(path)
    try:
        locks.acquire(file.fd, file.name, locks.WRITER)
    except BaseException:
        file.close()
        raise
    return file


def _create(path: Path) -> tuple[OsHostFile, Path | None]:
    """An open file in the folder of `path`, and its temporary name if it has to have one."""
    try:
        return OsHostFile.create(path.parent, os.O_TMPFILE), None
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    temporary = _temporary(path)
    return OsHostFile.create(temporary), temporary


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:_LONGEST_PART]}.{os.urandom(6).hex()}.part")


def _publish(file: OsHostFile, temporary: Path | None, path: Path, replaced: OsHostFile | None) -> None:
    """Give the file its name; one that somebody else made meanwhile is never replaced."""
    source = Path(f"/proc/self/fd/{file.fd}") if temporary is None else temporary
    if replaced is None:
        try:
            _link(file, source, path)
        except FileExistsError:
            raise UsageError(f"{printable(os.fsencode(path))}: was made by somebody else meanwhile") from None
        return
    _take_after(file, replaced)
    if temporary is not None:
        temporary.replace(path)
        return
    stand_in = _temporary(path)
    _link(file, source, stand_in)
    stand_in.replace(path)


def _link(file: OsHostFile, source: Path, name: Path) -> None:
    """A further name for a file; a folder's descriptor makes the host follow /proc's link to it."""
    os.link(source, name, src_dir_fd=file.fd, follow_symlinks=True)


def _take_after(file: OsHostFile, replaced: OsHostFile) -> None:
    """Owner and permissions as the replaced file has them, as far as the host permits."""
    status = os.fstat(replaced.fd)
    with suppress(PermissionError):
        os.fchown(file.fd, status.st_uid, status.st_gid)
        os.fchmod(file.fd, stat.S_IMODE(status.st_mode))
