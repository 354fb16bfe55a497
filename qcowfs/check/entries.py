"""L2 entries, many at once: what they refer to, which rules they break, and what would mend them.

Owns the rules of L2 entries. Must not know where tables lie or who reads them. Implements "Standard Cluster
Descriptor", "Compressed Clusters Descriptor" and "Extended L2 Entries".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcowfs.check.arrays import I64, U64, Bool, Counts
from qcowfs.check.findings import Cure, Kind
from qcowfs.check.subject import AREAS, REFCOUNT_BLOCK, REFCOUNT_TABLE, Subject
from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from qcowfs.geometry import COMPRESSED_OFFSET_BITS, SECTOR_SIZE

_COPIED, _COMPRESSED, _ZERO, _MASK = (np.uint64(n) for n in (COPIED, COMPRESSED, ZERO, OFFSET_MASK))
RESERVED = np.uint64(0x3F00_0000_0000_01FE)
_LOW_HALF = np.uint64(0xFFFF_FFFF)
_HALF_BITS = np.uint64(32)


@dataclass(frozen=True)
class Breach:
    """A rule, the indices of the entries that break it, and what mends them."""

    kind: Kind
    rule: str
    cure: Cure
    indices: I64


class Entries:
    """The entries of some L2 tables that are not 0: word, bitmap, guest offset, by index in the batch."""

    indices: I64
    words: U64
    bitmaps: U64 | None
    every: np.uint64

    def __init__(self, subject: Subject, words: U64, l1_indices: I64) -> None:
        """Take rows of whole tables, whose place in their L1 table is given."""
        self.subject = subject
        geometry = subject.geometry
        self.tables = l1_indices
        self.per_table = geometry.l2_entries
        flat = words.reshape(-1)
        descriptors = flat[0::2] if geometry.extended_l2 else flat
        bitmaps = flat[1::2] if geometry.extended_l2 else None
        used = descriptors if bitmaps is None else descriptors | bitmaps
        if np.count_nonzero(used) == len(used):
            self.indices, self.words, self.bitmaps = np.arange(len(used)), descriptors, bitmaps
        else:
            self.indices = np.flatnonzero(used)
            self.words = descriptors[self.indices]
            self.bitmaps = None if bitmaps is None else bitmaps[self.indices]
        self.every = np.bitwise_or.reduce(self.words)

    def guest_offsets(self, indices: I64) -> I64:
        """Guest offsets of entries, by their index in the batch."""
        geometry = self.subject.geometry
        table, within = np.divmod(indices, self.per_table)
        guests: I64 = self.tables[table] * geometry.l2_coverage + within * geometry.cluster_size
        return guests

    @cached_property
    def compressed(self) -> Bool:
        """Which entries are compressed clusters."""
        return _any_of(self.words, _COMPRESSED)

    @property
    def standard(self) -> Entries:
        """The other entries; these themselves if none is compressed."""
        return self._unpacked if self.every & _COMPRESSED else self

    @cached_property
    def _unpacked(self) -> Entries:
        return self._only(~self.compressed)

    @cached_property
    def packed(self) -> Entries:
        """The compressed entries."""
        return self._only(self.compressed)

    def _only(self, mask: Bool) -> Entries:
        part = object.__new__(Entries)
        part.subject, part.tables, part.per_table = self.subject, self.tables, self.per_table
        part.indices, part.words = self.indices[mask], self.words[mask]
        part.bitmaps = None if self.bitmaps is None else self.bitmaps[mask]
        part.every = np.bitwise_or.reduce(part.words)
        return part

    # -- standard clusters

    @cached_property
    def offsets(self) -> U64:
        """Host offsets of standard entries."""
        return self.words & _MASK

    @cached_property
    def _unaligned(self) -> Bool:
        low = np.uint64(self.subject.geometry.cluster_size - 1)
        if not self.every & _MASK & low:
            return np.zeros(len(self.words), bool)
        return _any_of(self.offsets, low)

    @cached_property
    def _past_end(self) -> Bool:
        past: Bool = (self.offsets >> np.uint64(self.subject.bits)) >= np.uint64(self.subject.clusters)
        return past

    @cached_property
    def counted(self) -> Bool:
        """Which standard entries refer to a cluster of the file."""
        if self.subject.header.has_data_file:
            return np.zeros(len(self.words), bool)
        counted: Bool = (self.offsets != 0) & ~self._unaligned & ~self._past_end
        return counted

    @cached_property
    def clusters(self) -> I64:
        """The host clusters of the counted entries."""
        clusters: U64 = self.offsets[self.counted] >> np.uint64(self.subject.bits)
        return clusters.view(np.int64)

    @cached_property
    def _reads_zero(self) -> Bool:
        """Entries that read as zeros whatever their offset is."""
        if self.bitmaps is not None:
            return ~_any_of(self.bitmaps, _LOW_HALF)
        if self.subject.header.version < 3 or not self.every & _ZERO:
            return np.zeros(len(self.words), bool)
        return _any_of(self.words, _ZERO)

    def breaches(self) -> Iterator[Breach]:
        """Rules that standard entries break, apart from the COPIED flag."""
        reserved = RESERVED | (_ZERO if self.bitmaps is not None else np.uint64(0))
        if self.every & reserved:
            wrong = _any_of(self.words, reserved)
            yield self._breach(wrong, Kind.ERROR, "reserved bits are set", Cure.CLEAR_RESERVED)
        if self.subject.header.version < 3 and self.every & _ZERO:
            rule = "the zero flag, which version 2 does not know"
            yield self._breach(_any_of(self.words, _ZERO), Kind.LOST, rule, Cure.DROP)
        if self.bitmaps is not None:
            yield from self._bitmap_breaches(self.bitmaps)
        if self.subject.header.has_data_file:
            yield from self._data_file_breaches()
        else:
            yield from self._place_breaches()

    def first_past_end(self) -> tuple[int, int] | None:
        """The lowest host cluster that was lost with the end of the file, and the index of its entry."""
        if not self._past_end.any():
            return None
        gone = np.flatnonzero(self._past_end & ~self._unaligned & ~self._reads_zero)
        if not len(gone):
            return None
        lowest = int(gone[np.argmin(self.offsets[gone])])
        return int(self.offsets[lowest]) >> self.subject.bits, int(self.indices[lowest])

    def _breach(self, mask: Bool, kind: Kind, rule: str, cure: Cure) -> Breach:
        return Breach(kind, rule, cure, self.indices[mask])

    def _bitmap_breaches(self, bitmaps: U64) -> Iterator[Breach]:
        allocated, zeros = bitmaps & _LOW_HALF, bitmaps >> _HALF_BITS
        rule = "a subcluster is marked both allocated and zero"
        yield self._breach((allocated & zeros) != 0, Kind.LOST, rule, Cure.DROP)
        rule = "subclusters are allocated but the cluster has no offset"
        homeless = (allocated != 0) & (self.offsets == 0) & ((allocated & zeros) == 0)
        if self.subject.header.has_data_file:
            homeless &= ~_any_of(self.words, _COPIED)
        yield self._breach(homeless, Kind.LOST, rule, Cure.DROP)

    def _data_file_breaches(self) -> Iterator[Breach]:
        named = (self.offsets != 0) | _any_of(self.words, _COPIED)
        astray = named & (self.offsets.astype(np.int64) != self.guest_offsets(self.indices))
        rule = "the offset in the data file differs from the guest offset"
        yield self._breach(astray & ~self._reads_zero, Kind.LOST, rule, Cure.DROP)
        yield self._breach(astray & self._reads_zero, Kind.ERROR, rule, Cure.PLAIN_ZERO)

    def _place_breaches(self) -> Iterator[Breach]:
        """Entries whose cluster is not where a cluster can be."""
        flagged = (self.offsets == 0) & _any_of(self.words, _COPIED)
        yield self._breach(flagged, Kind.ERROR, "the COPIED flag without a cluster", Cure.CLEAR_COPIED)
        past = self._past_end & ~self._unaligned
        for wrong, rule in (
            (self._unaligned, "the cluster is not cluster aligned"),
            (past, "the cluster lies past the end of the file"),
        ):
            if wrong.any():
                yield self._breach(wrong & ~self._reads_zero, Kind.LOST, rule, Cure.DROP)
                yield self._breach(wrong & self._reads_zero, Kind.ERROR, rule, Cure.PLAIN_ZERO)
        owners = self.subject.owners[self.clusters]
        if owners.any():
            yield from self._overlaps(owners)

    def _overlaps(self, owners: Counts) -> Iterator[Breach]:
        indices, zero = self.indices[self.counted], self._reads_zero[self.counted]
        for area in np.unique(owners[owners != 0]).tolist():
            rule = f"the cluster overlaps {AREAS[area]}"
            hit = owners == area
            yield Breach(*judge_overlap(area, rule), indices[hit & ~zero])
            yield Breach(Kind.ERROR, rule, Cure.PLAIN_ZERO, indices[hit & zero])

    def flag_breaches(self, counts: Counts) -> Iterator[Breach]:
        """Standard entries whose COPIED flag contradicts the count of their cluster."""
        alone = counts[self.clusters] == 1
        copied = _any_of(self.words[self.counted], _COPIED)
        wrong = alone != copied
        if wrong.any():
            indices = self.indices[self.counted]
            rule = "lacks the COPIED flag, but its cluster's refcount is 1"
            yield Breach(Kind.ERROR, rule, Cure.SET_COPIED, indices[wrong & alone])
            rule = "has the COPIED flag, but its cluster's refcount is not 1"
            yield Breach(Kind.ERROR, rule, Cure.CLEAR_COPIED, indices[wrong & ~alone])

    # -- compressed clusters

    @cached_property
    def stored_ranges(self) -> tuple[I64, I64]:
        """Host offset, and bytes at most, of what compressed entries store."""
        offset_bits = COMPRESSED_OFFSET_BITS - (self.subject.bits - 8)
        offsets = (self.words & np.uint64((1 << offset_bits) - 1)).astype(np.int64)
        counted = self.words & np.uint64((1 << COMPRESSED_OFFSET_BITS) - 1)
        sectors = (counted >> np.uint64(offset_bits)).astype(np.int64)
        return offsets, (sectors + 1) * SECTOR_SIZE - offsets % SECTOR_SIZE

    @cached_property
    def _touched(self) -> tuple[I64, I64]:
        """The first and last host cluster that compressed entries touch."""
        offsets, lengths = self.stored_ranges
        return offsets >> self.subject.bits, (offsets + lengths - 1) >> self.subject.bits

    @cached_property
    def _starts_in_file(self) -> Bool:
        inside: Bool = self._touched[0] < self.subject.clusters
        return inside

    def touched_clusters(self) -> Iterator[tuple[Bool, I64]]:
        """Host clusters that compressed entries refer to: the n-th of each, and which entries have one."""
        if self.subject.header.has_data_file:
            return
        first, last = self._touched
        last = np.minimum(last, self.subject.clusters)
        number = 0
        while (have := self._starts_in_file & (first + number <= last)).any():
            yield have, first[have] + number
            number += 1

    def clipped(self) -> U64:
        """The words of compressed entries, shortened to end before what cannot be theirs."""
        first, last = self._touched
        end = np.minimum(last, self.subject.clusters) + 1
        for number, (have, clusters) in enumerate(self.touched_clusters()):
            foreign = np.zeros(len(end), bool)
            foreign[have] = self.subject.owners[clusters] != 0
            if number:
                end = np.where(foreign, np.minimum(end, first + number), end)
        offsets, _ = self.stored_ranges
        sectors = (((end << self.subject.bits) - offsets // SECTOR_SIZE * SECTOR_SIZE) // SECTOR_SIZE) - 1
        shift = np.uint64(COMPRESSED_OFFSET_BITS - (self.subject.bits - 8))
        rest: U64 = self.words & (_COMPRESSED | ((np.uint64(1) << shift) - np.uint64(1)))
        return np.where(end <= last, rest | sectors.astype(np.uint64) << shift, self.words)

    def packed_breaches(self) -> Iterator[Breach]:
        """Rules that compressed entries break."""
        flagged = _any_of(self.words, _COPIED)
        yield self._breach(flagged, Kind.ERROR, "a compressed cluster has the COPIED flag", Cure.CLEAR_COPIED)
        if self.bitmaps is not None:
            rule = "a compressed cluster has a subcluster bitmap"
            yield self._breach(self.bitmaps != 0, Kind.ERROR, rule, Cure.CLEAR_BITMAP)
        if self.subject.header.has_data_file:
            rule = "a compressed cluster, which an image with a data file cannot have"
            yield self._breach(np.ones(len(self.words), bool), Kind.LOST, rule, Cure.DROP)
            return
        past, inside = "past the end of the file", self._starts_in_file
        yield self._breach(~inside, Kind.LOST, f"the compressed cluster lies {past}", Cure.DROP)
        cut = inside & (self._touched[1] > self.subject.clusters)
        yield self._breach(cut, Kind.ERROR, f"the compressed cluster goes on {past}", Cure.CLIP)
        for number, (have, clusters) in enumerate(self.touched_clusters()):
            owners = self.subject.owners[clusters]
            for area in np.unique(owners[owners != 0]).tolist():
                found = self.indices[have][owners == area]
                if number:
                    rule = f"the compressed cluster goes on into {AREAS[area]}"
                    yield Breach(Kind.ERROR, rule, Cure.CLIP, found)
                else:
                    rule = f"the compressed cluster overlaps {AREAS[area]}"
                    yield Breach(*judge_overlap(area, rule), found)


def judge_overlap(area: int, rule: str) -> tuple[Kind, str, Cure]:
    """What an overlap with an area means for the entry: nothing is lost where the area can be made anew."""
    if area in (REFCOUNT_TABLE, REFCOUNT_BLOCK):
        return Kind.ERROR, rule, Cure.MOVE_COUNTS
    return Kind.LOST, rule, Cure.DROP


def _any_of(words: U64, bits: np.uint64) -> Bool:
    """Which words have any of the bits."""
    found: Bool = (words & bits) != 0
    return found
