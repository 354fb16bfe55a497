"""The write-back cache of metadata tables: slices of L1, L2 and refcount tables, loaded on demand.

Owns how slices are read and written, that each is loaded once, and which ones are dirty. Must not know what
the entries of a slice mean, nor when it may be written: that is `flush`. A slice is an `array` of host-order
integers; its key is its host offset.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import count

from qcowfs.errors import CorruptImage
from qcowfs.format.words import Words
from qcowfs.geometry import Geometry
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import Event, new_event
from qcowfs.metadata.lru import BoundedStore

DEFAULT_CACHE_BYTES = 32 << 20
_SLICE_OVERHEAD = 400
"""Bytes that the interpreter adds to each cached slice, counted against the bound."""

_numbers = count(1)
"""Each cache's own, never used again, as part of its keys in a shared store."""

LEAST_SLICES = 16
"""A walk needs an L1 and an L2 slice at once, and several walks may be under way."""

SliceStore = BoundedStore[tuple[int, int], "array[int]"]


@dataclass(frozen=True)
class Batch:
    """Dirty slices as they were at one moment: host offset and bytes, ready to be written."""

    slices: dict[int, bytes]

    def __bool__(self) -> bool:
        return bool(self.slices)


class TableCache:
    """Slices of the tables of one kind in one host file, kept in a store that others may share."""

    def __init__(self, file: HostFile, geometry: Geometry, store: SliceStore, words: Words) -> None:
        """Keep slices of `file` in `store`; `words` packs and unpacks their entries."""
        self._number = next(_numbers)
        self._file = file
        self._geometry = geometry
        self._store = store
        self._words = words
        self._loading: dict[int, Event] = {}
        self._dirty: dict[int, array[int]] = {}
        self._written: dict[int, array[int]] = {}
        self._fresh: set[int] = set()

    def get(self, offset: int) -> array[int] | None:
        """The slice at host offset `offset` if it is in memory."""
        found = self._store.get((self._number, offset))
        if found is None and (self._dirty or self._written):
            found = self._dirty.get(offset)
            if found is None:
                found = self._written.get(offset)
        return found

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
        self._loading[offset] = new_event()
        try:
            found = await self._read(offset)
            self._keep(offset, found)
        finally:
            self._loading.pop(offset).set()
        return found

    async def _read(self, offset: int) -> array[int]:
        size = self._file.facts().size
        if self._geometry.cluster_start(offset) >= size:
            raise CorruptImage(f"the table lies past the end of the file ({size} bytes)")
        data = bytearray(self._geometry.slice_size)
        await self._file.read_into([(offset, memoryview(data))])
        return self._words.unpack(bytes(data))

    def _keep(self, offset: int, words: array[int]) -> None:
        cost = self._geometry.slice_size + _SLICE_OVERHEAD
        self._store.put((self._number, offset), words, cost)

    # -- the writer's side

    def put_zeros(self, offset: int) -> array[int]:
        """A dirty slice of zeros at `offset`, to which nothing on disk refers yet."""
        self._fresh.add(offset)
        words = self._words.unpack(bytes(self._geometry.slice_size))
        self._keep(offset, words)
        self._dirty[offset] = words
        return words

    def mark_dirty(self, offset: int, words: array[int]) -> None:
        """Note that the slice differs from the host file; it stays in memory until it is written."""
        self._dirty[offset] = words

    @property
    def dirty_bytes(self) -> int:
        """Memory that dirty slices take."""
        return len(self._dirty) * (self._geometry.slice_size + _SLICE_OVERHEAD)

    def take_dirty(self) -> Batch:
        """All dirty slices as of now; they count as clean unless they are given back."""
        batch = Batch({offset: self._words.pack(words) for offset, words in self._dirty.items()})
        self._written.update(self._dirty)
        self._dirty = {}
        return batch

    def split(self, batch: Batch) -> tuple[Batch, Batch]:
        """The slices of a batch to which nothing on disk refers, which may be written early; the others."""
        early = {offset: data for offset, data in batch.slices.items() if offset in self._fresh}
        late = {offset: data for offset, data in batch.slices.items() if offset not in self._fresh}
        return Batch(early), Batch(late)

    async def write(self, batch: Batch) -> None:
        """Write a batch, neighbours together. Raises `OSError` as the host does."""
        runs: list[tuple[int, bytearray]] = []
        for offset in sorted(batch.slices):
            if runs and runs[-1][0] + len(runs[-1][1]) == offset:
                runs[-1][1].extend(batch.slices[offset])
            else:
                runs.append((offset, bytearray(batch.slices[offset])))
        await self._file.write_from(runs)

    def mark_referenced(self, batch: Batch) -> None:
        """Note that something on disk may refer to the slices of a batch from now on."""
        self._fresh.difference_update(batch.slices)

    def settle(self, batch: Batch) -> None:
        """Note that a batch is on disk."""
        for offset in batch.slices:
            self._written.pop(offset, None)

    def give_back(self, batch: Batch) -> None:
        """Mark the slices of a batch that may not have reached the disk as dirty again."""
        for offset in batch.slices:
            words = self._written.pop(offset, None)
            if words is not None:
                self._dirty.setdefault(offset, words)
