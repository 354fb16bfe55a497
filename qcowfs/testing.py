"""A host file in memory, for tests of programs that use the engine.

Owns contents and injected faults. Must not know qcow2.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from itertools import count

from qcowfs.hostfile import FileFacts, ReadRequest

_inodes = count(1)


class MemoryHostFile:
    """A `HostFile` whose bytes are in `data`, with ranges that fail as a bad disk does."""

    def __init__(self, data: bytes, name: str = "memory", mtime_ns: int = 0) -> None:
        """Hold a copy of `data`."""
        self.data = bytearray(data)
        self.name = name
        self.closed = False
        self._facts = (mtime_ns, (0, next(_inodes)))
        self._bad: list[range] = []

    def fail_reads(self, start: int, length: int) -> None:
        """Make every read that touches the range end with EIO."""
        self._bad.append(range(start, start + length))

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
            if any(r.start < wanted.stop and wanted.start < r.stop for r in self._bad):
                raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)
            part = bytes(self.data[offset : offset + len(buffer)])
            buffer[:] = part.ljust(len(buffer), b"\0")

    def close(self) -> None:
        """Mark the file as closed."""
        self.closed = True
