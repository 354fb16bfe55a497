"""A host file in memory, for tests of programs that use the engine.

Owns contents, the log of writes and syncs, and injected faults. Must not know qcow2.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from qcowfs.host.facts import FileFacts
from qcowfs.host.hostfile import ReadRequest, Stretch, WriteRequest

_inodes = count(1)


@dataclass(frozen=True)
class Write:
    """One write of the log."""

    offset: int
    data: bytes


class Punch(Write):
    """A hole; its `data` are what the range may hold then."""


@dataclass(frozen=True)
class Sync:
    """One sync of the log."""


SYNC = Sync()
PUNCHED = b"\xdb"


class MemoryHostFile:
    """A `HostFile` whose bytes are in `data`, with ranges that fail as a bad disk does."""

    def __init__(self, data: bytes, name: str = "memory", mtime_ns: int = 0) -> None:
        """Hold a copy of `data`."""
        self.data = bytearray(data)
        self.name = name
        self.closed = False
        self._facts = (mtime_ns, (0, next(_inodes)))
        self._bad: list[tuple[range, int]] = []
        self._bad_writes: list[tuple[range, int]] = []
        self.fail_next_syncs = 0
        self.log: list[Write | Sync] = []
        self.is_quick = False
        """Whether writes are done at once, as by a host's page cache, rather than by the general way."""

    def fail_reads(self, start: int, length: int, error: int = errno.EIO) -> None:
        """Make every read that touches the range end with that errno."""
        self._bad.append((range(start, start + length), error))

    def fail_writes(self, start: int, length: int, error: int = errno.EIO) -> None:
        """Make every write that touches the range end with that errno."""
        self._bad_writes.append((range(start, start + length), error))

    def heal(self) -> None:
        """Let everything succeed again."""
        self._bad.clear()
        self._bad_writes.clear()
        self.fail_next_syncs = 0

    def _fail(self, bad: list[tuple[range, int]], wanted: range) -> None:
        for r, error in bad:
            if r.start < wanted.stop and wanted.start < r.stop:
                raise OSError(error, os.strerror(error), self.name)

    def facts(self) -> FileFacts:
        """Size as of now; a memory file counts as regular."""
        mtime_ns, identity = self._facts
        return FileFacts(len(self.data), len(self.data), mtime_ns, identity, regular=True)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """Never: so that every read takes the general way."""
        return False

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer; bytes past the end become zeros."""
        for offset, buffer in requests:
            wanted = range(offset, offset + len(buffer))
            self._fail(self._bad, wanted)
            part = bytes(self.data[offset : offset + len(buffer)])
            buffer[:] = part.ljust(len(buffer), b"\0")

    async def data_and_holes(self, start: int, end: int) -> list[Stretch]:
        """All of it data, up to the file's end."""
        middle = max(start, min(end, len(self.data)))
        stretches = [(start, middle, True), (middle, end, False)]
        return [stretch for stretch in stretches if stretch[0] < stretch[1]]

    def write_now(self, offset: int, data: bytes | memoryview) -> bool:
        """Write the whole buffer if the file `is_quick`; whether it was written."""
        if self.is_quick:
            self._write(offset, data)
        return self.is_quick

    def descriptor_now(self) -> int | None:
        """None: there is none."""
        return None

    def note_written(self, where: range, length: int) -> None:
        """Nothing: nobody writes past this object."""

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        """Write every buffer, growing the file; each is one entry of the log."""
        for offset, data in requests:
            self._write(offset, data)

    def _write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        wanted = range(offset, offset + len(data))
        self._fail(self._bad_writes, wanted)
        if len(self.data) < offset:
            self.data += bytes(offset - len(self.data))
        self.data[offset : offset + len(data)] = data
        self.log.append(Write(offset, bytes(data)))

    async def find_next(self, offset: int, *, data: bool) -> int | None:
        """All of the file is data."""
        return offset if data is (offset < len(self.data)) else None if data else len(self.data)

    async def punch_hole(self, offset: int, length: int) -> None:
        """Fill the range with other bytes than zeros, since nobody may count on it; the log gets it too."""
        part = range(len(self.data))[offset : offset + length]
        if part:
            self.data[part.start : part.stop] = PUNCHED * len(part)
            self.log.append(Punch(part.start, PUNCHED * len(part)))

    async def sync(self) -> None:
        """Note the moment up to which nothing may be lost."""
        if self.fail_next_syncs:
            self.fail_next_syncs -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)
        self.log.append(SYNC)

    def close(self) -> None:
        """Mark the file as closed."""
        self.closed = True
