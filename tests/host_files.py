"""Host files in memory that make a test's moment last: writes and reads that wait until they are let go."""

from __future__ import annotations

from collections.abc import Sequence

import trio
import trio.testing

from qcowfs.disk.image import Image, OpenOptions
from qcowfs.disk.live import DiskWriter
from qcowfs.host.hostfile import ReadRequest, WriteRequest
from qcowfs.testing import MemoryHostFile, Sync, Write
from tests.memory import FOLDER


class WaitingFile(MemoryHostFile):
    """A file whose reads, writes and syncs wait for an event while `hold` names their kind."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.hold: set[str] = set()
        self.let_go = trio.Event()
        self.waiting: list[tuple[str, int]] = []

    async def _wait(self, kind: str, offset: int) -> None:
        if kind in self.hold:
            self.waiting.append((kind, offset))
            await self.let_go.wait()

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        await self._wait("read", requests[0][0])
        await super().read_into(requests)

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        if requests:
            await self._wait("write", requests[0][0])
        await super().write_from(requests)

    async def sync(self) -> None:
        await self._wait("sync", 0)
        await super().sync()

    def release(self) -> None:
        """Let everybody go on, now and later."""
        self.hold.clear()
        self.let_go.set()
        self.let_go = trio.Event()


async def open_file(file: MemoryHostFile, table_cache: int = 1 << 20) -> Image:
    """Open a lone image for writing; the file's log starts anew."""
    file.log.clear()
    options = OpenOptions(writable=True, open_writable=lambda _: file, table_cache=table_cache)
    return await Image.open(FOLDER / "disk.qcow2", options)


def writer_of(image: Image) -> DiskWriter:
    """The image's writing side."""
    assert image.writer is not None
    return image.writer


def shown_log(log: list[Write | Sync]) -> list[str | int]:
    """Each write by its host offset, each sync by its name."""
    return [entry.offset if isinstance(entry, Write) else "sync" for entry in log]


def word(data: bytes | bytearray, offset: int, size: int = 8) -> int:
    """A big-endian integer of the host file."""
    return int.from_bytes(data[offset : offset + size], "big")


def poke_word(data: bytearray, offset: int, value: int, size: int = 8) -> None:
    """Overwrite a big-endian integer of the host file."""
    data[offset : offset + size] = value.to_bytes(size, "big")


def place_of_entry(data: bytes | bytearray, guest: int) -> int:
    """Where the L2 entry of a guest offset lies (8-byte entries; the table must exist)."""
    size = 1 << word(data, 20, 4)
    l1_entry = word(data, word(data, 40) + guest // (size // 8 * size) * 8)
    return (l1_entry & 0x00FF_FFFF_FFFF_FE00) + guest // size % (size // 8) * 8
