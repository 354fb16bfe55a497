"""What the tree never permits: every request that would change it is answered with EROFS.

Owns that list. Must not know the tree. The kernel refuses these by itself on a read-only mount; a remount can
take that away.
"""

from __future__ import annotations

import errno
from typing import NoReturn

import pyfuse3


async def refuse(*_: object) -> NoReturn:
    """Answer any request with EROFS."""
    raise pyfuse3.FUSEError(errno.EROFS)


class Refusals(pyfuse3.Operations):
    """Handlers that change names, attributes or data."""

    mknod = refuse  # type: ignore[assignment]  # one answer for every signature
    mkdir = refuse  # type: ignore[assignment]
    unlink = refuse  # type: ignore[assignment]
    rmdir = refuse  # type: ignore[assignment]
    symlink = refuse  # type: ignore[assignment]
    rename = refuse  # type: ignore[assignment]
    link = refuse  # type: ignore[assignment]
    create = refuse  # type: ignore[assignment]
    setxattr = refuse  # type: ignore[assignment]
    removexattr = refuse  # type: ignore[assignment]
