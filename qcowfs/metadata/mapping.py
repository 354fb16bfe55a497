"""Where a guest offset lies: L1 and L2 tables to extents.

Owns the walk through the tables of one view (the active disk or a snapshot). Must not know how data is moved,
what lies below, or the end of the data file. Implements "Cluster mapping" of the specification.
"""

from __future__ import annotations

from array import array
from enum import Enum
from typing import NamedTuple

from qcowfs.errors import CorruptImage
from qcowfs.format.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO,
    run_length,
    subcluster_bitmaps,
)
from qcowfs.geometry import Geometry, GuestOffset, HostOffset
from qcowfs.metadata.cache import TableCache
from qcowfs.metadata.places import Places


class ExtentKind(Enum):
    """What a reader finds in an extent."""

    DATA = "data"
    ZERO = "zero"
    UNALLOCATED = "unallocated"
    COMPRESSED = "compressed"
    LOST = "lost"


class Extent(NamedTuple):
    """A run of guest bytes of one kind; offsets and lengths in bytes.

    `host_offset` is where the run starts in the data file (DATA), where the cluster's stored bytes start
    (COMPRESSED, at most `stored` of them; the run lies within that one cluster), or which table entry
    or cluster is broken (LOST, with the rule in `damage`); else 0.
    """

    kind: ExtentKind
    guest_offset: GuestOffset
    length: int
    host_offset: HostOffset = 0
    stored: int = 0
    damage: str = ""


DATA, ZERO_KIND, UNALLOCATED = ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.UNALLOCATED
COMPRESSED_KIND, LOST = ExtentKind.COMPRESSED, ExtentKind.LOST


class Mapping:
    """The tables of one view, found by the host offset and number of entries of its L1 table."""

    def __init__(
        self,
        l1_tables: TableCache,
        l2_tables: TableCache,
        geometry: Geometry,
        l1_table_offset: int,
        l1_size: int,
        *,
        version: int = 3,
        has_data_file: bool = False,
    ) -> None:
        """Walk tables through the two caches; an absent L1 entry means unallocated."""
        self._l1_tables = l1_tables
        self._l2_tables = l2_tables
        self._geometry = geometry
        self._l1_table_offset = l1_table_offset
        self._l1_size = l1_size
        self._zero_flag_is_valid = version >= 3
        self._has_data_file = has_data_file
        self._places = Places(self._look_up)
        self._cluster_bits = geometry.cluster_bits
        self._in_cluster = geometry.cluster_size - 1

    @property
    def l1_table(self) -> tuple[HostOffset, int]:
        """Host offset and number of entries of the L1 table."""
        return self._l1_table_offset, self._l1_size

    @property
    def places(self) -> dict[int, HostOffset]:
        """Data clusters known so far, by index; what changes is forgotten at once."""
        return self._places.known

    def translate(self, guest: int, length: int) -> HostOffset | None:
        """Where the range starts in the data file, if it lies in one data cluster known in memory.

        A shortcut for the commonest answer of `get_extents`; None says nothing about the range.
        """
        within = guest & self._in_cluster
        if within + length > self._in_cluster + 1:
            return None
        start = self._places.find(guest >> self._cluster_bits)
        return None if start is None else start + within

    def _look_up(self, cluster: int) -> HostOffset | None:
        """Where the tables in memory say that the guest cluster's data lie."""
        geometry, guest = self._geometry, cluster << self._cluster_bits
        try:
            l2_offset = self._get_l2_table(guest)
        except CorruptImage:
            return None
        if not l2_offset or geometry.extended_l2 or self._has_data_file:
            return None
        slice_offset, index = geometry.l2_slice(guest)
        words = self._l2_tables.get(l2_offset + slice_offset)
        if words is None:
            return None
        entry = words[index]
        start = entry & OFFSET_MASK
        if entry & (COMPRESSED | ZERO) or not start or start & self._in_cluster:
            return None
        return start

    def forget(self, guest: int) -> None:
        """Let `translate` look the cluster up anew, since its entry has changed."""
        self._places.forget(guest >> self._cluster_bits)

    def get_extents(self, guest: int, length: int) -> list[Extent] | None:
        """What `resolve` answers if every table needed is in memory, else None."""
        extents: list[Extent] = []
        end = guest + length
        while guest < end:
            try:
                piece = self._get_piece(extents, guest, end)
            except CorruptImage as error:
                piece = min(end, self._geometry.l2_coverage_end(guest))
                _append(extents, _lost(guest, piece, 0, str(error)))
            if piece is None:
                return None
            guest = piece
        return extents

    async def resolve(self, guest: int, length: int) -> list[Extent]:
        """The extents that cover `[guest, guest + length)`, merged over contiguous clusters.

        A broken table or entry becomes an extent of kind LOST. Raises `OSError` as the host does.
        """
        extents: list[Extent] = []
        end = guest + length
        while guest < end:
            try:
                piece = self._get_piece(extents, guest, end)
                if piece is None:
                    await self._load_tables(guest)
                    continue
            except CorruptImage as error:
                piece = min(end, self._geometry.l2_coverage_end(guest))
                _append(extents, _lost(guest, piece, 0, str(error)))
            guest = piece
        return extents

    def _get_piece(self, extents: list[Extent], guest: int, end: int) -> int | None:
        """Append the extents that one slice tells of; where they end, None if a table is missing."""
        geometry = self._geometry
        l2_offset = self._get_l2_table(guest)
        if l2_offset is None:
            return None
        if not l2_offset:
            stop = min(end, geometry.l2_coverage_end(guest))
            _append(extents, Extent(UNALLOCATED, guest, stop - guest, 0, 0, ""))
            return stop
        slice_offset, index = geometry.l2_slice(guest)
        place = l2_offset + slice_offset
        words = self._l2_tables.get(place)
        if words is None:
            return None
        stop = min(end, geometry.slice_end(guest))
        if geometry.extended_l2:
            self._scan_extended(extents, words, index * 2, guest, stop, place)
        else:
            self._scan_standard(extents, words, index, guest, stop, place)
        return stop

    def _get_l2_table(self, guest: int) -> int | None:
        """Host offset of the L2 table, 0 if absent, None if the L1 slice is not in memory."""
        geometry = self._geometry
        l1_index = guest // geometry.l2_coverage
        if l1_index >= self._l1_size:
            return 0
        slice_offset, index = geometry.l1_slice(guest)
        words = self._l1_tables.get(self._l1_table_offset + slice_offset)
        if words is None:
            return None
        l2_offset = words[index] & OFFSET_MASK
        if not geometry.is_cluster_aligned(l2_offset):
            raise CorruptImage(f"L1 entry {l1_index}: L2 table offset {l2_offset:#x} is not cluster aligned")
        return l2_offset

    async def _load_tables(self, guest: int) -> None:
        """Load the next missing slice on the way to the guest offset's L2 entry."""
        l2_offset = self._get_l2_table(guest)
        if l2_offset is None:
            name, table, cache = "L1", self._l1_table_offset, self._l1_tables
            place = table + self._geometry.l1_slice(guest)[0]
        else:
            name, table, cache = "L2", l2_offset, self._l2_tables
            place = table + self._geometry.l2_slice(guest)[0]
        try:
            await cache.load(place)
        except CorruptImage as error:
            raise CorruptImage(f"{name} table at {table:#x}: {error}") from None

    def _scan_standard(
        self, extents: list[Extent], words: array[int], index: int, guest: int, end: int, place: int
    ) -> None:
        """Append the extents of a slice of 8-byte entries from `index` on."""
        geometry = self._geometry
        size = geometry.cluster_size
        while guest < end:
            entry = words[index]
            stop = min(end, geometry.cluster_start(guest) + size)
            if entry & COMPRESSED:
                host, stored = geometry.compressed_location(entry)
                extent = Extent(COMPRESSED_KIND, guest, stop - guest, host, stored)
            elif entry & ZERO:
                extent = self._zero_entry(guest, stop, place + index * 8)
            else:
                extent = self._offset_entry(entry, guest, stop, place + index * 8)
            _append(extents, extent)
            guest = stop
            index += 1

    def _zero_entry(self, guest: int, stop: int, place: int) -> Extent:
        if not self._zero_flag_is_valid:
            return _lost(guest, stop, place, "L2 entry has the zero flag, which version 2 does not know")
        return Extent(ZERO_KIND, guest, stop - guest)

    def _offset_entry(self, entry: int, guest: int, stop: int, place: int) -> Extent:
        """The extent of an uncompressed entry whose data, if any, is to be read."""
        geometry = self._geometry
        host = entry & OFFSET_MASK
        if not host and not (self._has_data_file and entry & COPIED):
            return Extent(UNALLOCATED, guest, stop - guest)
        if not geometry.is_cluster_aligned(host):
            rule = f"L2 entry: cluster offset {host:#x} is not cluster aligned"
            return _lost(guest, stop, place, rule)
        if self._has_data_file and host != geometry.cluster_start(guest):
            rule = f"L2 entry: offset {host:#x} in the data file differs from the guest offset"
            return _lost(guest, stop, place, rule)
        return Extent(DATA, guest, stop - guest, host + geometry.in_cluster(guest))

    def _scan_extended(
        self, extents: list[Extent], words: array[int], index: int, guest: int, end: int, place: int
    ) -> None:
        """Append the extents of a slice of 16-byte entries from word `index` on."""
        geometry = self._geometry
        while guest < end:
            entry, bitmap = words[index], words[index + 1]
            stop = min(end, geometry.cluster_start(guest) + geometry.cluster_size)
            at = place + index * 8
            if entry & COMPRESSED:
                host, stored = geometry.compressed_location(entry)
                compressed = Extent(COMPRESSED_KIND, guest, stop - guest, host, stored)
                _append(extents, compressed)
            else:
                self._scan_subclusters(extents, entry, bitmap, guest, stop, at)
            guest = stop
            index += 2

    def _scan_subclusters(
        self, extents: list[Extent], entry: int, bitmap: int, guest: int, end: int, place: int
    ) -> None:
        """Append the runs of equal subclusters of one cluster."""
        geometry = self._geometry
        allocated, zeros = subcluster_bitmaps(bitmap)
        if allocated & zeros:
            rule = "L2 entry: a subcluster is marked both allocated and zero"
            _append(extents, _lost(guest, end, place, rule))
            return
        if allocated and not entry & OFFSET_MASK and not (self._has_data_file and entry & COPIED):
            rule = "L2 entry: subclusters are allocated but the cluster has no offset"
            _append(extents, _lost(guest, end, place, rule))
            return
        first = geometry.cluster_start(guest)
        while guest < end:
            n = geometry.subcluster_index(guest)
            run = min(run_length(allocated, n, 32), run_length(zeros, n, 32))
            stop = min(end, first + (n + run) * geometry.subcluster_size)
            if allocated >> n & 1:
                extent = self._offset_entry(entry, guest, stop, place)
            else:
                kind = ZERO_KIND if zeros >> n & 1 else UNALLOCATED
                extent = Extent(kind, guest, stop - guest)
            _append(extents, extent)
            guest = stop


def _append(extents: list[Extent], new: Extent) -> None:
    """Add an extent, merged with the last one where it continues it."""
    if extents:
        last = extents[-1]
        if last.kind is new.kind and _continues(last, new):
            extents[-1] = last._replace(length=last.length + new.length)
            return
    extents.append(new)


def _continues(last: Extent, new: Extent) -> bool:
    if new.kind is DATA:
        return last.host_offset + last.length == new.host_offset
    return new.kind is ZERO_KIND or new.kind is UNALLOCATED


def _lost(guest: int, end: int, host: int, rule: str) -> Extent:
    return Extent(ExtentKind.LOST, guest, end - guest, host, damage=rule)
