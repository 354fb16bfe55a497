"""Which mount shows an image: found by its folder or by the image's file.

Owns that search. Must not know FUSE requests, and loads no FUSE.
"""

from __future__ import annotations

import os
from pathlib import Path

from qcowfs.daemon.mountpoint import FACTS_FILE, FS_TYPE, mount_table


def mount_of(target: Path) -> Path | None:
    """Where the image is mounted, `target` being the mount's folder or the image; None if nowhere.

    Mounts that this user may not look into, and dead ones, are passed over.
    """
    where = os.path.realpath(target)
    for folder, kind, _ in mount_table():
        if kind == FS_TYPE and (str(folder) == where or _shows(folder, target)):
            return folder
    return None


def image_of(folder: Path) -> Path:
    """The image that a mount shows. Raises `OSError` or `StopIteration` where the mount does not tell."""
    lines = (folder / FACTS_FILE).read_bytes().splitlines()
    named = next(line for line in lines if line.startswith(b"image=")).removeprefix(b"image=")
    return Path(os.fsdecode(named))


def _shows(folder: Path, image: Path) -> bool:
    try:
        return image.samefile(image_of(folder))
    except (OSError, StopIteration):
        return False
