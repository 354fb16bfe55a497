"""A backup of what a repair overwrites: the old sectors and what took their place, put back on demand.

Owns the backup's layout. Must not know what is repaired. Each write goes to the backup, and the backup to the
disk, before the image is touched, so that a repair which ends anywhere can be undone. Restoring wants
every sector to hold what it held before or after some write of the repair: nothing else can have been written
since, and another image does not fit.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qcowfs.errors import UsageError
from qcowfs.geometry import SECTOR_SIZE
from qcowfs.host.facts import FileFacts
from qcowfs.host.hostfile import HostFile, ReadRequest, Stretch, WriteRequest

MAGIC = b"qcowfs backup 1\n"
_LENGTH = struct.Struct(">I")
_RECORD = struct.Struct(">QI32s")
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Saved:
    """Whole sectors that a repair was about to overwrite: host offset, bytes before and after."""

    offset: int
    before: bytes
    after: bytes


class BackedUpFile:
    """A host file whose old sectors go to a backup before they are overwritten."""

    def __init__(self, file: HostFile, backup: HostFile) -> None:
        """Write to `file`, saving to the empty `backup`."""
        self._file = file
        self._backup = backup
        self._end = 0
        self.name = file.name

    def facts(self) -> FileFacts:
        """Size, time and identity as of now."""
        return self._file.facts()

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """As the file does."""
        return self._file.read_cached(offset, buffer)

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        """As the file does."""
        await self._file.read_into(requests)

    def write_now(self, offset: int, data: bytes | memoryview) -> bool:
        """Never, since the backup comes first."""
        del offset, data
        return False

    def descriptor_now(self) -> int | None:
        """None, since the backup comes first."""
        return None

    def note_written(self, where: range, length: int) -> None:
        """Nothing: nobody writes past this object."""

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        """Save what lies there, sync the backup, then write."""
        if not self._end:
            await self._append(_head(self._file))
        for offset, data in requests:
            for start in range(0, len(data), MOST_BYTES):
                await self._save(offset + start, bytes(data[start : start + MOST_BYTES]))
        await self._backup.sync()
        await self._file.write_from(requests)

    async def _save(self, offset: int, data: bytes) -> None:
        """Append one record: whole sectors around the data, as they are and as they will be."""
        head = offset % SECTOR_SIZE
        before = bytearray(head + len(data) + -(head + len(data)) % SECTOR_SIZE)
        await self._file.read_into([(offset - head, memoryview(before))])
        after = before[:head] + data + before[head + len(data) :]
        both = bytes(before + after)
        await self._append(_RECORD.pack(offset - head, len(before), hashlib.sha256(both).digest()) + both)

    async def _append(self, data: bytes) -> None:
        await self._backup.write_from([(self._end, data)])
        self._end += len(data)

    async def find_next(self, offset: int, *, data: bool) -> int | None:
        """As the file does."""
        return await self._file.find_next(offset, data=data)

    async def data_and_holes(self, start: int, end: int) -> list[Stretch]:
        """As the file does."""
        return await self._file.data_and_holes(start, end)

    async def punch_hole(self, offset: int, length: int) -> None:
        """Nothing: what a repair gives back stays, or the backup would miss it."""

    async def sync(self) -> None:
        """Return when everything written so far is on disk."""
        await self._file.sync()

    def close(self) -> None:
        """Nothing: both files belong to whoever opened them."""


def _head(file: HostFile) -> bytes:
    about = json.dumps({"image": file.name, "size": file.facts().size}).encode()
    return MAGIC + _LENGTH.pack(len(about)) + about


async def restore(file: HostFile, backup: HostFile) -> int:
    """Put back what a repair overwrote; returns the size that the file had.

    Raises `UsageError` where the backup is none, or the image holds anything else than the repair
    left, `OSError` as the host does.
    """
    data = bytearray(backup.facts().size)
    await backup.read_into([(0, memoryview(data))])
    size, start = _unpack_head(bytes(data[: 1 << 16]), backup.name)
    records = list(_records(data, start))
    wanted: dict[int, bytes] = {}
    known: dict[int, set[bytes]] = {}
    for saved in records:
        for within in range(0, len(saved.before), SECTOR_SIZE):
            before, after = (part[within : within + SECTOR_SIZE] for part in (saved.before, saved.after))
            wanted.setdefault(saved.offset + within, before)
            known.setdefault(saved.offset + within, set()).update((before, after))
    await _refuse_strangers(file, known, backup.name)
    await file.write_from([(offset, wanted[offset]) for offset in sorted(wanted)])
    await file.sync()
    return size


async def _refuse_strangers(file: HostFile, known: dict[int, set[bytes]], name: str) -> None:
    """Raise `UsageError` unless every sector holds what it held before or during the repair."""
    sector = bytearray(SECTOR_SIZE)
    for offset, contents in known.items():
        await file.read_into([(offset, memoryview(sector))])
        if bytes(sector) not in contents:
            raise UsageError(
                f"{file.name}: host offset {offset:#x} holds neither what {name} saved nor what the repair "
                "wrote: it is another image, or was written since; nothing was restored"
            )


def _unpack_head(data: bytes, name: str) -> tuple[int, int]:
    """The image's size then, and where the records start."""
    start = len(MAGIC) + _LENGTH.size
    try:
        (length,) = _LENGTH.unpack_from(data, len(MAGIC))
        size = int(json.loads(data[start : start + length])["size"])
    except (ValueError, KeyError, TypeError, struct.error):
        size = -1
    if size < 0 or not data.startswith(MAGIC):
        raise UsageError(f"{name}: is no backup that qcowfs check has made")
    return size, start + length


def _records(data: bytearray, start: int) -> Iterator[Saved]:
    """Every whole record; one that a crash cut short was not acted upon yet."""
    while start + _RECORD.size <= len(data):
        offset, length, digest = _RECORD.unpack_from(data, start)
        start += _RECORD.size
        both = bytes(data[start : start + 2 * length])
        start += 2 * length
        if hashlib.sha256(both).digest() != digest:
            return
        yield Saved(offset, both[:length], both[length:])
