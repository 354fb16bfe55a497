"""What may be opened below an image: the policy on backing and data files, and raw backing files.

Owns the rules on names, formats, kinds of file, depth and loops. Must not know how a qcow2 image is opened or
read. A header's names are untrusted input.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from qcowfs.errors import BackingFileError, QcowError
from qcowfs.format.header import MAGIC
from qcowfs.host.hostfile import HostFile, OsHostFile
from qcowfs.text import quoted

MAX_CHAIN_DEPTH = 200
FORMATS = ("qcow2", "raw")
_MINI_LANGUAGE = re.compile(rb"[A-Za-z][A-Za-z0-9+._-]*:")
_FILE_PREFIX = b"file:"
_OTHER_MAGICS = {b"KDMV": "vmdk", b"conectix": "vpc", b"vhdxfile": "vhdx", b"QED\0": "qed"}
_PROBE_SIZE = 8

OpenHost = Callable[[Path], HostFile]


class GuestReader(Protocol):
    """A virtual disk that an overlay falls through to."""

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""

    @property
    def label(self) -> str:
        """How messages call it: its file and its role."""

    async def read_into(self, guest: int, buffer: memoryview) -> None:
        """Fill the buffer with the guest's bytes from `guest` on; beyond `size` they are zeros."""

    async def find_next(self, guest: int, end: int, *, data: bool) -> int | None:
        """The first offset in `[guest, end)` with data, or that reads as zeros; None if there is none."""

    async def allocated_bytes(self) -> int:
        """How many bytes of the disk take space, at most."""

    def close(self) -> None:
        """Give everything below back to the host."""


@dataclass(frozen=True)
class BackingPolicy:
    """What the user permits: no backing file at all, or one of an undeclared format."""

    refuse_all: bool = False
    probe: bool = False


@dataclass(frozen=True)
class BackingReference:
    """Where the image `label`, whose file is `image`, says that its backing file is."""

    label: str
    image: Path
    name: bytes
    format: str | None

    def locate(self, policy: BackingPolicy) -> Path:
        """The path to open, relative to the naming image's folder; raises `BackingFileError`."""
        shown = quoted(self.name)
        if policy.refuse_all:
            self.refuse(f"wants the backing file {shown}, which --no-backing refuses")
        if self.format is None and not policy.probe:
            self.refuse(
                f"does not declare the format of its backing file {shown}; declare it with "
                "qcowfs rebase -u -F FORMAT -b FILE, or trust the file's content with --probe-backing"
            )
        if self.format is not None and self.format not in FORMATS:
            self.refuse(
                f"wants a backing file of format {quoted(self.format.encode())}; qcow2 and raw are supported"
            )
        name = self.name.removeprefix(_FILE_PREFIX)
        if _MINI_LANGUAGE.match(name.split(b"/", 1)[0]):
            self.refuse(f"wants the backing file {shown}; only names of files are followed")
        if not name or b"\0" in name:
            self.refuse(f"names {shown} as backing file, which is no file name")
        return self.image.parent / os.fsdecode(name)

    def open(self, path: Path, open_host: OpenHost) -> HostFile:
        """Open the located file; only a regular file passes. Raises `BackingFileError`."""
        try:
            file = open_host(path)
        except OSError as error:
            self.refuse(f"wants the backing file {quoted(self.name)}, looked for at {path}: {error.strerror}")
        except QcowError as error:
            self.refuse(f"wants a backing file that is refused: {error}")
        if not file.facts().regular:
            file.close()
            self.refuse(f"wants the backing file {path}, which is not a regular file")
        return file

    def refuse(self, why: str) -> NoReturn:
        """Raise `BackingFileError` in the name of the image."""
        raise BackingFileError(f"{self.label}: {why}")


async def probe_format(file: HostFile) -> str:
    """The format that a file's first bytes show: "qcow2", another known one, else "raw"."""
    start = bytearray(_PROBE_SIZE)
    await file.read_into([(0, memoryview(start))])
    if start.startswith(MAGIC):
        return "qcow2"
    return next((name for magic, name in _OTHER_MAGICS.items() if start.startswith(magic)), "raw")


class RawBacking:
    """A raw file as the bottom of a backing chain."""

    def __init__(self, file: HostFile, label: str) -> None:
        """Read guest bytes straight from `file`."""
        self.file = file
        self.label = label
        self.size = file.facts().size

    async def read_into(self, guest: int, buffer: memoryview) -> None:
        """Fill the buffer; beyond the file's end the bytes are zeros."""
        await self.file.read_into([(guest, buffer)])

    async def find_next(self, guest: int, end: int, *, data: bool) -> int | None:
        """Where data, or a hole, begins in `[guest, end)`; None if there is none."""
        found = await self.file.find_next(guest, data=data)
        return found if found is not None and found < min(end, self.size) else None

    async def allocated_bytes(self) -> int:
        """What the host file takes."""
        return min(self.size, self.file.facts().allocated)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_for_writing(path: Path) -> HostFile:
    """The default way to open an image that is written to."""
    return OsHostFile.open(path, writable=True)


def open_for_reading(path: Path) -> HostFile:
    """The default way to open a file below an image."""
    return OsHostFile.open(path)
