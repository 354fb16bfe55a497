"""The cache of metadata tables: slices of L1 and L2 tables, loaded on demand.

Owns how slices are read and that each is loaded once. Must not know what the words of a slice mean. A slice
is an `array('Q')` of host-order words; its key is its host offset.
"""

from __future__ import annotations

import sys
from array import array

import trio

from qcowfs.errors import CorruptImage
from qcowfs.geometry import Geometry
from qcowfs.hostfile import HostFile
from qcowfs.lru import BoundedStore

DEFAULT_CACHE_BYTES = 32 << 20
_SLICE_OVERHEAD = 400
"""Bytes that the interpreter adds to each cached slice, counted against the bound."""

LEAST_SLICES = 16
"""A walk needs an L1 and an L2 slice at once, and several walks may be under way."""

SliceStore = BoundedStore[tuple[int, int], "array[int]"]


class TableCache:
    """Slices of big-endian 64-bit tables of one host file, kept in a store that others may share."""

    def __init__(self, file: HostFile, geometry: Geometry, store: SliceStore) -> None:
        """Keep slices of `file` in `store`."""
        self._file = file
        self._geometry = geometry
        self._store = store
        self._loading: dict[int, trio.Event] = {}

    def get(self, offset: int) -> array[int] | None:
        """The slice at host offset `offset` if it is in memory."""
        return self._store.get((id(self), offset))

    async def load(self, offset: int) -> array[int]:
        """The slice at host offset `offset`, read from the host file unless it is in memory.

        Bytes past the end of the host file read as zeros within the last cluster; raises `CorruptImage`
        for a slice of a cluster that lies wholly past it, `OSError` as the host does.
        """
        while (pending := self._loading.get(offset)) is not None:
            await pending.wait()
        found = self.get(offset)
        if found is not None:
            return found
        self._loading[offset] = trio.Event()
        try:
            found = await self._read(offset)
            cost = self._geometry.slice_size + _SLICE_OVERHEAD
            self._store.put((id(self), offset), found, cost)
        finally:
            self._loading.pop(offset).set()
        return found

    async def _read(self, offset: int) -> array[int]:
        size = self._file.facts().size
        if self._geometry.cluster_start(offset) >= size:
            raise CorruptImage(f"the table lies past the end of the file ({size} bytes)")
        data = bytearray(self._geometry.slice_size)
        await self._file.read_into([(offset, memoryview(data))])
        words = array("Q", bytes(data))
        if sys.byteorder == "little":
            words.byteswap()
        return words
