"""Changing where guest clusters lie: L2 entries set, L2 tables made or copied, L1 entries with them.

Owns every change to the active disk's L1 and L2 tables. Must not know how data moves or when tables are
written. A change is made to a slice in memory; the caches and the flush order do the rest.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

import trio

from qcowfs.errors import CorruptImage
from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK
from qcowfs.geometry import Geometry, GuestOffset, HostOffset
from qcowfs.metadata.cache import TableCache
from qcowfs.metadata.flush import Flusher
from qcowfs.metadata.mapping import Mapping
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.metadata.refcounts import Refcounts

MOST_SLICES = 1 << 14
"""L2 slices whose place is remembered."""


class Entry(NamedTuple):
    """An L2 entry: its descriptor, and the subcluster bitmap of an extended one (else 0)."""

    word: int
    bitmap: int = 0


@dataclass(frozen=True)
class Tables:
    """What linking needs of an image: the active L1 table and everything that keeps tables."""

    geometry: Geometry
    l1_table_offset: int
    l1: TableCache
    l2: TableCache
    refcounts: Refcounts
    flusher: Flusher
    metadata: MetadataMap


class Linker:
    """Sets L2 entries of the active disk; each guest offset's table must be ensured first."""

    def __init__(self, tables: Tables, mapping: Mapping) -> None:
        """Change the tables that `mapping` reads."""
        self._geometry = tables.geometry
        self._tables = tables
        self._mapping = mapping
        self._lock = trio.Lock()
        self._own_slices: dict[int, HostOffset] = {}

    async def ensure_table(self, guest: GuestOffset) -> None:
        """See to it that the guest offset's L2 table is this disk's own and its slice in memory.

        Raises `CorruptImage` for damaged tables, `OSError` as the host does.
        """
        while self._find_slice(guest) is None:
            await self._l1_slice(guest)
            place = self._find_own_slice(guest)
            if place:
                await self._tables.l2.load(place)
                continue
            async with self._lock:
                await self._own_table(guest)

    async def is_absent(self, guest: GuestOffset) -> bool:
        """Whether the guest offset has no L2 table at all."""
        words, index, _ = await self._l1_slice(guest)
        return not words[index]

    async def _l1_slice(self, guest: GuestOffset) -> tuple[array[int], int, HostOffset]:
        offset, index = self._geometry.l1_slice(guest)
        place = self._tables.l1_table_offset + offset
        words = self._tables.l1.get(place)
        if words is None:
            words = await self._tables.l1.load(place)
        return words, index, place

    async def _own_table(self, guest: GuestOffset) -> None:
        """Make the L1 entry name a table that nobody else refers to.

        The L1 slice is asked for anew after each wait: the cache may have dropped and reloaded it.
        """
        words, index, place = await self._l1_slice(guest)
        if _is_own(words[index]):
            return
        old = words[index] & OFFSET_MASK
        if not self._geometry.is_cluster_aligned(old):
            raise CorruptImage(f"L1 table at {place:#x}: L2 table offset {old:#x} is not cluster aligned")
        cluster = old // self._geometry.cluster_size
        if old and await self._tables.refcounts.get(cluster) == 1:
            words, index, place = await self._l1_slice(guest)
            words[index] = old | COPIED
            self._tables.l1.mark_dirty(place, words)
            return
        contents = await self._table_contents(old) if old else []
        new, _ = await self._tables.refcounts.allocate(1)
        words, index, place = await self._l1_slice(guest)
        self._tables.metadata.add(new, 1)
        self._fill_table(new, contents)
        words[index] = new | COPIED
        self._tables.l1.mark_dirty(place, words)
        if old:
            self._tables.flusher.drop(range(cluster, cluster + 1))

    async def _table_contents(self, old: HostOffset) -> list[array[int]]:
        """The slices of a table that others refer to as well; none of its clusters is ours alone."""
        step = self._geometry.slice_size
        return [await self._tables.l2.load(old + s) for s in range(0, self._geometry.cluster_size, step)]

    def _fill_table(self, new: HostOffset, contents: list[array[int]]) -> None:
        step = self._geometry.slice_size
        for number in range(self._geometry.cluster_size // step):
            words = self._tables.l2.put_zeros(new + number * step)
            if contents:
                words[:] = contents[number]
                _clear_copied(words, stride=self._geometry.l2_entry_size // 8)

    # -- single entries; the table must be ensured, and nothing awaited since

    def get(self, guest: GuestOffset) -> Entry:
        """The entry of the guest offset's cluster."""
        words, index, _ = self._slice(guest)
        return Entry(words[index], words[index + 1] if self._geometry.extended_l2 else 0)

    def set(self, guest: GuestOffset, entry: Entry) -> None:
        """Replace the entry of the guest offset's cluster."""
        words, index, place = self._slice(guest)
        words[index] = entry.word
        if self._geometry.extended_l2:
            words[index + 1] = entry.bitmap
        self._tables.l2.mark_dirty(place, words)
        self._mapping.forget(guest)

    def is_unallocated(self, guest: GuestOffset) -> bool:
        """Whether the guest offset's standard entry is in memory, in a table of ours, and 0."""
        found = None if self._geometry.extended_l2 else self._find_slice(guest)
        return found is not None and not found[0][found[1]]

    def count_unallocated(self, guest: GuestOffset, most: int) -> int:
        """How many standard entries from the guest offset's on, within its slice, are 0."""
        if self._geometry.extended_l2:
            return 0
        words, index, _ = self._slice(guest)
        end = min(len(words), index + most)
        found = index
        while found < end and not words[found]:
            found += 1
        return found - index

    def link_run(self, guest: GuestOffset, host: HostOffset, count: int) -> None:
        """Link unallocated clusters to host clusters that follow each other."""
        words, index, place = self._slice(guest)
        size = self._geometry.cluster_size
        for number in range(count):
            words[index + number] = (host + number * size) | COPIED
        self._tables.l2.mark_dirty(place, words)

    def find(self, guest: GuestOffset) -> Entry | None:
        """The entry of the guest offset's cluster, None if its table is not ensured."""
        found = self._find_slice(guest)
        if found is None:
            return None
        words, index, _ = found
        return Entry(words[index], words[index + 1] if self._geometry.extended_l2 else 0)

    def _slice(self, guest: GuestOffset) -> tuple[array[int], int, HostOffset]:
        """The L2 slice of the guest offset, the index of its entry's first word, the slice's place."""
        found = self._find_slice(guest)
        if found is None:
            raise LookupError("the L2 table is not ensured")
        return found

    def _find_slice(self, guest: GuestOffset) -> tuple[array[int], int, HostOffset] | None:
        geometry = self._geometry
        number, within = divmod(guest, geometry.slice_coverage)
        place = self._own_slices.get(number) or self._find_own_slice(guest)
        words = self._tables.l2.get(place) if place else None
        if words is None:
            return None
        return words, geometry.cluster_index(within) * (geometry.l2_entry_size // 8), place

    def _find_own_slice(self, guest: GuestOffset) -> HostOffset:
        """Where the guest offset's L2 slice lies if the table is ours, else 0; an own table stays so."""
        l1_offset, l1_index = self._geometry.l1_slice(guest)
        l1_words = self._tables.l1.get(self._tables.l1_table_offset + l1_offset)
        if l1_words is None or not _is_own(l1_words[l1_index]):
            return 0
        place = (l1_words[l1_index] & OFFSET_MASK) + self._geometry.l2_slice(guest)[0]
        if len(self._own_slices) >= MOST_SLICES:
            self._own_slices.clear()
        self._own_slices[guest // self._geometry.slice_coverage] = place
        return place

    def clusters_of(self, entry: Entry) -> range:
        """The host clusters, by index, that an entry refers to."""
        size = self._geometry.cluster_size
        if entry.word & COMPRESSED:
            offset, stored = self._geometry.compressed_location(entry.word)
            return range(offset // size, (offset + stored - 1) // size + 1)
        offset = entry.word & OFFSET_MASK
        return range(offset // size, offset // size + 1) if offset else range(0)


def _is_own(l1_entry: int) -> bool:
    """Whether the entry names a table that nobody else refers to; without an offset it names none."""
    return bool(l1_entry & COPIED and l1_entry & OFFSET_MASK)


def _clear_copied(words: array[int], stride: int) -> None:
    for index in range(0, len(words), stride):
        words[index] &= ~COPIED
