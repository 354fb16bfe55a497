"""Who uses files of a mount: processes and loop devices.

Owns what /proc and /sys tell. Must not know why one asks. May block, so never in the event loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qcowfs.text import printable


def users_of(folder: Path) -> Iterator[str]:
    """Loop devices over files below the folder, and processes with files or their folder in it."""
    where = os.path.realpath(folder)
    for device, file in _loop_devices():
        if is_below(file, where):
            yield device
    for process in _processes():
        if any(is_below(path, where) for path, _ in _files_of(process)):
            yield _called(process)


def writers_of(file: Path) -> list[str]:
    """Loop devices over the file, and processes that have it open for writing."""
    where = os.path.realpath(file)
    return [
        *(device for device, path in _loop_devices() if path == where),
        *(_called(process) for process in _processes() if (where, True) in _files_of(process)),
    ]


def is_below(path: str, where: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return path == where or path.startswith(where + "/")


def _loop_devices() -> Iterator[tuple[str, str]]:
    for device in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            yield f"/dev/{device.parent.parent.name}", device.read_text().strip()
        except OSError:
            continue  # detached just now


def _processes() -> Iterator[Path]:
    return (process for process in Path("/proc").iterdir() if process.name.isdigit())


def _files_of(process: Path) -> Iterator[tuple[str, bool]]:
    """The paths that a process has open, its folders too, and whether for writing."""
    try:
        for link in (process / "cwd", process / "root", *(process / "fd").iterdir()):
            yield str(link.readlink()), _may_write(process / "fdinfo" / link.name)
    except OSError:
        return


def _may_write(facts: Path) -> bool:
    try:
        flags = next(line for line in facts.read_text().splitlines() if line.startswith("flags:"))
    except (OSError, StopIteration):
        return False
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _called(process: Path) -> str:
    try:
        program = printable((process / "comm").read_bytes().strip())
    except OSError:
        program = "ended"
    return f"pid {process.name} ({program})"
