"""The folder that is mounted on: its checks, a dead daemon's leftovers, and unmounting.

Owns what the host's mount table and tools say. Must not know FUSE requests or images, and loads no FUSE.
"""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qcowfs.daemon.holders import users_of
from qcowfs.errors import MountError, UsageError

FS_TYPE = "fuse.qcowfs"
FACTS_FILE = ".qcowfs"
FUSE_DEVICE = Path("/dev/fuse")
FUSE_CONFIG = Path("/etc/fuse.conf")
_OCTAL = re.compile(r"\\([0-7]{3})")


def prepare(mount_point: Path) -> None:
    """Check that the folder can be mounted on, clearing the mount of a daemon that was killed.

    Raises `UsageError` with what is wrong with the folder, `MountError` where clearing fails.
    """
    if fs_type(mount_point) == FS_TYPE and _is_dead(mount_point):
        _run_unmount(mount_point, lazy=True)
    try:
        status = mount_point.stat()
    except OSError as error:
        raise UsageError(f"mount point {mount_point}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"mount point {mount_point}: is not a folder; make one with mkdir")
    if fs_type(mount_point) == FS_TYPE:
        raise UsageError(
            f"mount point {mount_point}: already shows an image; free it with qcowfs umount {mount_point}"
        )


def _is_dead(mount_point: Path) -> bool:
    """Whether the daemon is gone; asked by statvfs, since the kernel may remember the status."""
    try:
        os.statvfs(mount_point)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def check_fuse(*, allow_other: bool) -> None:
    """Raise `MountError` that says what to change where this user cannot mount."""
    if not FUSE_DEVICE.exists():
        raise MountError(f"{FUSE_DEVICE} is missing; load the kernel module: modprobe fuse")
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is missing, which mounts for ordinary users; install fuse3")
    if allow_other and not _user_allow_other():
        raise MountError(
            f"allow_other is not permitted to ordinary users here; "
            f"put a line user_allow_other into {FUSE_CONFIG}, or mount as root"
        )


def _user_allow_other() -> bool:
    try:
        lines = FUSE_CONFIG.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def mount_table() -> Iterator[tuple[Path, str, str]]:
    """(mount point, file system type, source) of every mount, oldest first."""
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        kind, source = after.split(" ")[:2]
        yield Path(_unescape(before.split(" ")[4])), kind, _unescape(source)


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def fs_type(mount_point: Path) -> str | None:
    """The type of the topmost file system mounted exactly there, None if nothing is."""
    where = _place_of(mount_point)
    return next((kind for at, kind, _ in reversed(list(mount_table())) if at == where), None)


def _place_of(mount_point: Path) -> Path:
    """Where a mount on this path lies; the mount itself is not asked, since its daemon may be gone."""
    try:
        mount_point.readlink()
    except OSError:  # no link
        return Path(os.path.realpath(mount_point.parent)) / mount_point.name
    return Path(os.path.realpath(mount_point))


def unmount(mount_point: Path, *, lazy: bool = False) -> None:
    """Unmount and wait until the daemon has freed the image.

    Raises `UsageError` where no image is mounted, `MountError` naming who keeps the mount busy.
    """
    kind = fs_type(mount_point)
    if kind != FS_TYPE:
        raise UsageError(f"{mount_point}: no image is mounted there")
    daemon = _daemon_of(mount_point)
    try:
        _run_unmount(mount_point, lazy=lazy)
    except MountError as error:
        users = ", ".join(users_of(mount_point))
        raise MountError(f"{str(error).rstrip('.')}; in use by {users}" if users else str(error)) from None
    if daemon is not None:
        _wait_for_end(daemon)


def _daemon_of(mount_point: Path) -> int | None:
    """A descriptor of the daemon's process, None where it is gone."""
    try:
        first, _ = (mount_point / FACTS_FILE).read_bytes().split(b"\n", 1)
        return os.pidfd_open(int(first.removeprefix(b"pid=")))
    except (OSError, ValueError):
        return None


def _wait_for_end(process: int) -> None:
    try:
        select.select([process], [], [])
    finally:
        os.close(process)


def _run_unmount(mount_point: Path, *, lazy: bool) -> None:
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), str(mount_point)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), str(mount_point)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MountError(result.stderr.strip() or f"{command[0]} failed on {mount_point}")
