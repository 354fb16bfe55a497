"""How much space a view takes: clusters that its L2 tables name, counted without any cache.

Owns the walk over all tables of a view. Must not know what the clusters hold. Counting looks only for the two
entries that take no cluster, absent and zero-plain, so that it runs at the speed of the host file.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from qcowfs.format.entries import OFFSET_MASK, ZERO
from qcowfs.geometry import TABLE_ENTRY_SIZE, Geometry
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import checkpoint

_CHUNK = 1 << 20
_SMALL_TABLES = 256


@dataclass(frozen=True)
class Usage:
    """The tables of one view: where its L1 table lies and how many entries cover the disk."""

    file: HostFile
    geometry: Geometry
    l1_table_offset: int
    l1_entries: int

    @property
    def is_small(self) -> bool:
        """Whether counting takes no longer than a user would wait for a status call."""
        return self.l1_entries <= _SMALL_TABLES

    async def allocated_bytes(self) -> int:
        """Bytes of guest clusters that have a host cluster; tables that are lost count nothing.

        Raises `OSError` as the host does.
        """
        clusters = 0
        most = max(1, _CHUNK // self.geometry.cluster_size)
        for start in range(0, self.l1_entries, _CHUNK // TABLE_ENTRY_SIZE):
            tables = await self._l2_tables(start)
            for first in range(0, len(tables), most):
                clusters += await self._count(tables[first : first + most])
                await checkpoint()
        return clusters * self.geometry.cluster_size

    async def _l2_tables(self, start: int) -> list[int]:
        """Host offsets of the L2 tables that one chunk of the L1 table names."""
        count = min(_CHUNK // TABLE_ENTRY_SIZE, self.l1_entries - start)
        data = bytearray(count * TABLE_ENTRY_SIZE)
        offset = self.l1_table_offset + start * TABLE_ENTRY_SIZE
        await self.file.read_into([(offset, memoryview(data))])
        words = array("Q", bytes(data))
        if sys.byteorder == "little":
            words.byteswap()
        return [word & OFFSET_MASK for word in words if word & OFFSET_MASK]

    async def _count(self, tables: list[int]) -> int:
        """Allocated clusters of some L2 tables, read together."""
        size = self.geometry.cluster_size
        data = bytearray(len(tables) * size)
        view = memoryview(data)
        requests = [(at, view[i * size : (i + 1) * size]) for i, at in enumerate(tables)]
        await self.file.read_into(requests)
        words = array("Q", bytes(data))
        return _count_standard(words) if not self.geometry.extended_l2 else _count_extended(words)


def _count_standard(words: array[int]) -> int:
    return len(words) - words.count(0) - words.count(_big_endian(ZERO))


def _count_extended(words: array[int]) -> int:
    entries = words[0::2]
    return len(entries) - entries.count(0)


def _big_endian(word: int) -> int:
    return int.from_bytes(word.to_bytes(8, "big"), sys.byteorder)
