"""A folder of host files in memory, and reading from what is opened there."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qcowfs.data.backing import GuestReader
from qcowfs.disk.image import Image, OpenOptions
from qcowfs.host.hostfile import HostFile, ReadRequest
from qcowfs.testing import MemoryHostFile

FOLDER = Path("/images")
DISK = FOLDER / "disk.qcow2"


class CountedFile(MemoryHostFile):
    """A memory file that knows who has it open and what was read."""

    def __init__(self, data: bytes, name: str = "memory") -> None:
        super().__init__(data, name)
        self.open_count = 0
        self.reads: list[list[tuple[int, int]]] = []
        self.is_cached = False

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        part = self.data[offset : offset + len(buffer)]
        if not self.is_cached or len(part) < len(buffer):
            return False
        buffer[:] = part
        return True

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        self.reads.append([(offset, len(buffer)) for offset, buffer in requests])
        await super().read_into(requests)

    def close(self) -> None:
        self.open_count -= 1
        super().close()


class MemoryFolder:
    """Opens paths below `FOLDER`, each the same file whenever it is opened."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = {name: CountedFile(data, str(FOLDER / name)) for name, data in files.items()}
        self.opened: list[str] = []

    def open(self, path: Path) -> HostFile:
        """What an `OpenOptions.open_host` is."""
        name = os.path.relpath(path, FOLDER)
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self.opened.append(name)
        self.files[name].open_count += 1
        return self.files[name]

    def left_open(self) -> list[str]:
        """The files that somebody opened and did not close."""
        return [name for name, file in self.files.items() if file.open_count]

    async def image(self, name: str, options: OpenOptions | None = None) -> Image:
        """Open an image of this folder."""
        return await Image.open(FOLDER / name, replace(options or OpenOptions(), open_host=self.open))


async def open_bytes(data: bytes, options: OpenOptions | None = None) -> Image:
    """Open a lone image that lies in memory as `DISK`."""
    return await MemoryFolder({DISK.name: data}).image(DISK.name, options)


async def read(reader: GuestReader, guest: int, length: int) -> bytes:
    """Guest bytes, read into a buffer where every byte that nobody fills shows."""
    buffer = bytearray(b"\xa5" * length)
    await reader.read_into(guest, memoryview(buffer))
    return bytes(buffer)
