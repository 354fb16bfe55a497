"""Guest data in its file: as it is, or encrypted sector by sector.

Owns the one step between the guest's bytes and those of the data file. Must not know which cluster holds
what, nor where keys come from. Every request tells both offsets, since either may number the sectors: the
host offset with LUKS, the guest offset with legacy AES.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from qcowfs.data.sector_locks import SectorLocks
from qcowfs.errors import CorruptImage
from qcowfs.geometry import (
    SECTOR_SIZE,
    Geometry,
    GuestOffset,
    HostOffset,
    is_whole_sectors,
    sector_index,
    sector_start,
    whole_sectors,
)
from qcowfs.host.facts import FileFacts
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import new_limiter, run_in_thread

if TYPE_CHECKING:
    from qcowfs.codecs.encryption import SectorCipher

DataRead = tuple[GuestOffset, HostOffset, memoryview]
"""Where the bytes are for the guest and in the file, and the buffer to fill from there."""
DataWrite = tuple[GuestOffset, HostOffset, bytes | bytearray | memoryview]
"""Where the bytes are for the guest and in the file, and the bytes."""

INLINE_BYTES = 64 << 10
"""More than this is left to a thread: the event loop then serves others meanwhile."""


class DataPort(Protocol):
    """How guest data is read from its file and written to it."""

    @property
    def encrypted(self) -> bool:
        """Whether bytes that were never written do not read as zeros."""

    def facts(self) -> FileFacts:
        """Size, time and identity of the file as of now."""

    def readable_end(self, size: int) -> HostOffset:
        """Up to where data can be read from a file of that size; what lies beyond is lost."""

    def read_cached(self, guest: GuestOffset, host: HostOffset, buffer: memoryview) -> bool:
        """Fill the buffer if that takes no waiting; whether it was filled."""

    async def read_into(self, requests: Sequence[DataRead]) -> None:
        """Fill every buffer. Raises `OSError` as the host does."""

    def write_now(self, guest: GuestOffset, host: HostOffset, data: bytes | memoryview) -> bool:
        """Write bytes that lie in one cluster if that takes no waiting; whether they were written."""

    async def write_from(self, requests: Sequence[DataWrite]) -> None:
        """Write every buffer whole, in order. Raises `OSError` as the host does."""

    def descriptor_now(self) -> int | None:
        """The file's descriptor, if others may read and overwrite plain data by it until the next await."""

    def note_written(self, where: range, length: int) -> None:
        """Note that so many bytes were written somewhere in a range of the file by the descriptor."""


class PlainData:
    """Guest data that lies in its file as it is."""

    encrypted = False

    def __init__(self, file: HostFile, geometry: Geometry) -> None:
        """Read and write `file`."""
        self._file = file
        self._geometry = geometry

    def facts(self) -> FileFacts:
        """Size, time and identity of the file as of now."""
        return self._file.facts()

    def readable_end(self, size: int) -> HostOffset:
        """The end of the cluster that the file ends in, whose rest is zeros."""
        return self._geometry.cluster_round_up(size)

    def read_cached(self, guest: GuestOffset, host: HostOffset, buffer: memoryview) -> bool:
        """Fill the buffer if that takes no waiting; whether it was filled."""
        return self._file.read_cached(host, buffer)

    async def read_into(self, requests: Sequence[DataRead]) -> None:
        """Fill every buffer. Raises `OSError` as the host does."""
        await self._file.read_into([(host, buffer) for _, host, buffer in requests])

    def write_now(self, guest: GuestOffset, host: HostOffset, data: bytes | memoryview) -> bool:
        """Write bytes that lie in one cluster if that takes no waiting; whether they were written."""
        return self._file.write_now(host, data)

    async def write_from(self, requests: Sequence[DataWrite]) -> None:
        """Write every buffer whole, in order. Raises `OSError` as the host does."""
        await self._file.write_from([(host, data) for _, host, data in requests])

    def descriptor_now(self) -> int | None:
        """The file's descriptor, as long as the file lends it."""
        return self._file.descriptor_now()

    def note_written(self, where: range, length: int) -> None:
        """Note that so many bytes were written somewhere in a range of the file by the descriptor."""
        self._file.note_written(where, length)


class EncryptedData:
    """Guest data that is encrypted by sectors; to change a part of one, it is read and written whole.

    Reads and writes of the same sectors exclude each other: the host lets a read see half of a write, and
    half of a sector decrypts to noise.
    """

    encrypted = True

    def __init__(self, file: HostFile, geometry: Geometry, cipher: SectorCipher, *, by_guest: bool) -> None:
        """Sectors are numbered by the guest's offsets or by the file's."""
        self._file = file
        self._geometry = geometry
        self._cipher = cipher
        self._by_guest = by_guest
        self._locks = SectorLocks()
        self._limiter = new_limiter(1)
        """One thread at a time: two would only take the interpreter from each other at every step."""

    def facts(self) -> FileFacts:
        """Size, time and identity of the file as of now."""
        return self._file.facts()

    def readable_end(self, size: int) -> HostOffset:
        """The end of the last whole sector: what was never written would decrypt to noise."""
        return sector_start(size)

    def descriptor_now(self) -> int | None:
        """None: nobody else can decrypt."""
        return None

    def note_written(self, where: range, length: int) -> None:
        """Nothing: nobody writes past this object."""

    def _number(self, guest: GuestOffset, host: HostOffset) -> int:
        """The sector number that the IV of the data at these offsets is made from."""
        return sector_index(guest if self._by_guest else host)

    # -- reading

    def read_cached(self, guest: GuestOffset, host: HostOffset, buffer: memoryview) -> bool:
        """Fill the buffer if that takes no waiting and little time; whether it was filled."""
        if len(buffer) > INLINE_BYTES or not is_whole_sectors(host, len(buffer)):
            return False
        if not self._locks.is_free(host, host + len(buffer), shared=True):
            return False
        if not self._file.read_cached(host, buffer):
            return False
        self._cipher.decrypt(buffer, self._number(guest, host))
        return True

    async def read_into(self, requests: Sequence[DataRead]) -> None:
        """Fill every buffer. Raises `OSError` as the host does."""
        widened = [self._widened(*request) for request in requests]
        use = await self._locks.hold([(h, h + len(buffer)) for _, h, buffer in widened], shared=True)
        try:
            await self._file.read_into([(host, buffer) for _, host, buffer in widened])
        finally:
            self._locks.release(use)
        await self._decrypt_all(widened)
        for (_, host, wanted), (_, start, buffer) in zip(requests, widened, strict=True):
            if len(buffer) != len(wanted):
                wanted[:] = buffer[host - start : host - start + len(wanted)]

    async def _decrypt_all(self, requests: Sequence[DataRead]) -> None:
        if sum(len(buffer) for _, _, buffer in requests) > INLINE_BYTES:
            await run_in_thread(self._decrypt, requests, limiter=self._limiter)
        else:
            self._decrypt(requests)

    def _widened(self, guest: GuestOffset, host: HostOffset, buffer: memoryview) -> DataRead:
        """The request rounded out to whole sectors, with a buffer of its own where that changes it."""
        start, length = whole_sectors(host, len(buffer))
        if length != len(buffer):
            buffer = memoryview(bytearray(length))
        return guest - (host - start), start, buffer

    def _decrypt(self, requests: Sequence[DataRead]) -> None:
        for guest, host, buffer in requests:
            self._cipher.decrypt(buffer, self._number(guest, host))

    # -- writing

    def write_now(self, guest: GuestOffset, host: HostOffset, data: bytes | memoryview) -> bool:
        """Write whole sectors that lie in one cluster if that takes no waiting and little time."""
        if len(data) > INLINE_BYTES or not is_whole_sectors(host, len(data)):
            return False
        if not self._locks.is_free(host, host + len(data), shared=False):
            return False
        return self._file.write_now(host, self._cipher.encrypt(data, self._number(guest, host)))

    async def write_from(self, requests: Sequence[DataWrite]) -> None:
        """Write every buffer whole, in order. Raises `OSError` as the host does.

        Sectors are held meanwhile: what changes a part of one also writes the rest of it as it was, and must
        not undo another write.
        """
        for guest, host, data in _joined(requests):
            start, length = whole_sectors(host, len(data))
            use = await self._locks.hold([(start, start + length)], shared=False)
            try:
                await self._write(guest, host, data)
            finally:
                self._locks.release(use)

    async def _write(
        self, guest: GuestOffset, host: HostOffset, data: bytes | bytearray | memoryview
    ) -> None:
        start, length = whole_sectors(host, len(data))
        guest -= host - start
        if length != len(data):
            data = await self._surrounded(guest, start, length, host - start, data)
        number = self._number(guest, start)
        if length > INLINE_BYTES:
            ciphertext = await run_in_thread(self._cipher.encrypt, data, number, limiter=self._limiter)
        else:
            ciphertext = self._cipher.encrypt(data, number)
        await self._file.write_from([(start, ciphertext)])

    async def _surrounded(
        self, guest: GuestOffset, start: HostOffset, length: int, at: int,
        data: bytes | bytearray | memoryview,
    ) -> bytearray:  # fmt: skip
        """Whole sectors that hold the data at a place and around it what they held before."""
        if start + length > self.readable_end(self._file.facts().size):
            where = f"guest offset {guest + at:#x}, host offset {start:#x}"
            raise CorruptImage(f"{where}: the sector to change lies past the end of the file")
        whole = bytearray(length)
        view = memoryview(whole)
        last = length - SECTOR_SIZE
        partial = [place for place, cut in ((0, at), (last, at + len(data) - length)) if cut]
        for place in partial[: 1 if last == 0 else 2]:
            sector = view[place : place + SECTOR_SIZE]
            await self._file.read_into([(start + place, sector)])
            self._cipher.decrypt(sector, self._number(guest + place, start + place))
        view[at : at + len(data)] = data
        return whole


def _joined(requests: Sequence[DataWrite]) -> list[DataWrite]:
    """The requests, those made one that meet within a sector."""
    joined: list[DataWrite] = []
    for guest, host, data in requests:
        if joined and not is_whole_sectors(host, 0):
            before, start, head = joined[-1]
            if start + len(head) == host:
                joined[-1] = before, start, b"".join((head, data))
                continue
        joined.append((guest, host, data))
    return joined
