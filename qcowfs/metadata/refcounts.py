"""The cluster allocator: reference counts of host clusters, found, raised and lowered.

Owns the refcount table, the refcount blocks and where free clusters are. Must not know guest offsets, nor
when its changes are written: that is `flush`. Everything but loading a slice is plain code, so that a
decision and its entry in the block are one step. Implements the section "Reference counts".
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from qcowfs.errors import CorruptImage, MetadataOverlap, UsageError
from qcowfs.format.entries import REFCOUNT_TABLE_OFFSET_MASK
from qcowfs.format.header import MAX_REFCOUNT_TABLE_BYTES, Header
from qcowfs.format.words import TABLE_WORDS, Words
from qcowfs.geometry import MAX_HOST_OFFSET_BITS, TABLE_ENTRY_SIZE, HostOffset
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.cache import TableCache
from qcowfs.metadata.metadata_map import MetadataMap


@dataclass(frozen=True)
class TableChange:
    """What of the refcount table has to reach the disk: pieces to write, and its new place if it moved."""

    pieces: dict[int, bytes]
    moved_to: tuple[HostOffset, int] | None
    old_tables: tuple[range, ...]
    indices: frozenset[int]


class Refcounts:
    """The allocator of one image; clusters are named by their index in the host file."""

    def __init__(self, header: Header, blocks: TableCache, metadata: MetadataMap) -> None:
        """Count clusters by the blocks in the cache `blocks`; `load` the table first.

        What `metadata` protects is never handed out, whatever the counts say.
        """
        self._metadata = metadata
        geometry = header.geometry
        self.cluster_size = self._cluster_size = geometry.cluster_size
        self._slice_size = geometry.slice_size
        self._words = Words(1 << header.refcount_order)
        self._blocks = blocks
        self._block_entries = (geometry.cluster_size * 8) >> header.refcount_order
        self._slice_entries = (geometry.slice_size * 8) >> header.refcount_order
        self._table_offset = header.refcount_table_offset
        self._table_clusters = header.refcount_table_clusters
        self._table: array[int] = array("Q")
        self._hint = 1
        self._dirty_entries: set[int] = set()
        self._old_tables: list[range] = []

    async def load(self, file: HostFile) -> None:
        """Read the refcount table. Raises `CorruptImage` where an entry is not aligned."""
        data = bytearray(self._table_clusters * self._cluster_size)
        await file.read_into([(self._table_offset, memoryview(data))])
        self._table = TABLE_WORDS.unpack(bytes(data))
        for index, entry in enumerate(self._table):
            if entry & REFCOUNT_TABLE_OFFSET_MASK & (self._cluster_size - 1):
                raise CorruptImage(f"refcount table entry {index}: block {entry:#x} is not cluster aligned")

    @property
    def maximum(self) -> int:
        """The largest count that an entry holds."""
        return self._words.maximum

    @property
    def blocks(self) -> list[HostOffset]:
        """Where the refcount blocks lie."""
        return [entry & REFCOUNT_TABLE_OFFSET_MASK for entry in self._table if entry]

    @property
    def table_extent(self) -> tuple[HostOffset, int]:
        """Offset and bytes of the refcount table."""
        return self._table_offset, self._table_clusters * self._cluster_size

    # -- single counts

    async def get(self, cluster: int) -> int:
        """The reference count of a cluster."""
        if not self._block_of(cluster):
            return 0
        words, index, _ = await self._load(cluster)
        return words[index]

    async def counts_any_from(self, file: HostFile, cluster: int) -> bool:
        """Whether a cluster from about that one on seems to have a count, past all caches.

        The seven clusters below it may be taken for it where counts are narrow.
        """
        first, within = divmod(cluster, self._block_entries)
        skipped = within * self._words.bits // 8
        blocks = dict.fromkeys(entry & REFCOUNT_TABLE_OFFSET_MASK for entry in self._table[first:])
        for block in filter(None, blocks):
            if block >= file.facts().size:
                return True
            counts = bytearray(self._cluster_size)
            await file.read_into([(block, memoryview(counts))])
            if any(counts[skipped if block == self._block_of(cluster) else 0 :]):
                return True
        return False

    async def change(self, cluster: int, by: int) -> None:
        """Add `by` to a count; raises `UsageError` where the width cannot hold it, `CorruptImage` below 0."""
        if not self._block_of(cluster):
            raise self._not_counted(cluster)
        words, index, place = await self._load(cluster)
        count = words[index] + by
        if count > self.maximum:
            raise UsageError(
                f"host offset {cluster * self._cluster_size:#x} would have {count} references, "
                f"refcounts of {self._words.bits} bits hold {self.maximum}; widen them with "
                "qcowfs amend -o refcount_bits=16"
            )
        if count < 0:
            raise self._not_counted(cluster)
        words[index] = count
        self._blocks.mark_dirty(place, words)
        if not count:
            self._hint = min(self._hint, cluster)

    # -- runs of counts

    def first_part(self, clusters: range) -> range:
        """The first of the clusters, as far as one slice counts them."""
        return clusters[: self._slice_entries - clusters.start % self._slice_entries]

    async def last_references(self, clusters: range) -> list[range]:
        """Those runs of the clusters whose count is 1."""
        found: list[range] = []
        while clusters:
            words, part, _ = await self._first_part(clusters)
            counts = words[part.start : part.stop]
            start = 0
            while start < len(counts):
                run = _run_of(counts, start)
                if counts[start] == 1:
                    found.append(clusters[start : start + run])
                start += run
            clusters = clusters[len(part) :]
        return found

    async def lower(self, clusters: range) -> None:
        """Subtract 1 from the count of each cluster, in steps that are whole within a slice.

        Raises `CorruptImage` where a count is 0 already; then those before it are lowered.
        """
        while clusters:
            words, part, place = await self._first_part(clusters)
            self._blocks.mark_dirty(place, words)
            for cluster, index in zip(clusters, part, strict=False):
                if not words[index]:
                    raise self._not_counted(cluster)
                words[index] -= 1
                if not words[index]:
                    self._hint = min(self._hint, cluster)
            clusters = clusters[len(part) :]

    async def _first_part(self, clusters: range) -> tuple[array[int], range, HostOffset]:
        """The slice that counts the first of the clusters: words, indices of those in it, its place."""
        if not self._block_of(clusters.start):
            raise self._not_counted(clusters.start)
        words, index, place = await self._load(clusters.start)
        return words, range(index, min(index + len(clusters), len(words))), place

    def _not_counted(self, cluster: int) -> CorruptImage:
        offset = cluster * self._cluster_size
        return CorruptImage(f"refcount of host offset {offset:#x} is 0 but it is in use")

    # -- allocating

    async def allocate(self, most: int) -> tuple[HostOffset, int]:
        """Take up to `most` free clusters that follow each other: where they start and how many.

        Raises `MetadataOverlap` where the counts call metadata free, `UsageError` where the image is at
        its end.
        """
        cluster = began = self._hint
        while True:
            if not self._block_of(cluster):
                self._add_block(cluster // self._block_entries)
            words, index, place = await self._load(cluster)
            try:
                found = words.index(0, index)
            except ValueError:
                cluster += len(words) - index
                continue
            cluster += found - index
            if cluster >> (MAX_HOST_OFFSET_BITS - (self._cluster_size.bit_length() - 1)):
                raise UsageError("the image cannot grow: host offsets end at 2^56")
            self._refuse_metadata(cluster)
            run = _take(words, found, most)
            while run > 1 and self._metadata.overlaps(cluster * self._cluster_size, run * self._cluster_size):
                run -= 1
                words[found + run] = 0
            self._blocks.mark_dirty(place, words)
            if self._hint >= began:  # else something below was freed meanwhile
                self._hint = max(self._hint, cluster + run)
            return cluster * self._cluster_size, run

    def next_fresh(self, start: HostOffset) -> HostOffset | None:
        """The next cluster to be allocated, if it lies at `start` or beyond and its count is in memory.

        None leaves it to `allocate`, whatever the reason; `take_next` takes it.
        """
        cluster = self._hint
        offset = cluster * self._cluster_size
        words, index, _ = self._find_now(cluster)
        if words is None or words[index] or offset < start:
            return None
        return None if offset >> MAX_HOST_OFFSET_BITS or self._metadata.overlaps(offset, 1) else offset

    def take_next(self) -> None:
        """Allocate what `next_fresh` has just found."""
        words, index, place = self._find_now(self._hint)
        if words is None:
            raise LookupError("nothing was found")
        words[index] = 1
        self._blocks.mark_dirty(place, words)
        self._hint += 1

    def _find_now(self, cluster: int) -> tuple[array[int] | None, int, HostOffset]:
        """As `_load`, without waiting; no slice where there is none in memory."""
        place, index = self._find(cluster) if self._block_of(cluster) else (0, 0)
        return self._blocks.get(place) if place else None, index, place

    def _refuse_metadata(self, cluster: int) -> None:
        offset = cluster * self._cluster_size
        if self._metadata.overlaps(offset, 1):
            raise MetadataOverlap(f"host offset {offset:#x}: the refcounts call a cluster of metadata free")

    async def release(self, offset: HostOffset, count: int) -> None:
        """Take back an allocation that nothing on disk refers to yet."""
        first = offset // self._cluster_size
        for cluster in range(first, first + count):
            await self.change(cluster, -1)

    def _block_of(self, cluster: int) -> HostOffset:
        index = cluster // self._block_entries
        return self._table[index] & REFCOUNT_TABLE_OFFSET_MASK if index < len(self._table) else 0

    def _find(self, cluster: int) -> tuple[HostOffset, int]:
        """The slice that holds a cluster's count, and its index there; the block must exist."""
        within = cluster % self._block_entries
        place = self._block_of(cluster) + within // self._slice_entries * self._slice_size
        return place, within % self._slice_entries

    async def _load(self, cluster: int) -> tuple[array[int], int, HostOffset]:
        place, index = self._find(cluster)
        words = self._blocks.get(place)
        if words is None:
            try:
                words = await self._blocks.load(place)
            except CorruptImage as error:
                raise CorruptImage(f"refcount block at {self._block_of(cluster):#x}: {error}") from None
        return words, index, place

    # -- growing, wholly in memory

    def _add_block(self, index: int) -> None:
        """A block for a range of clusters without one: all are free, so it takes the first of them."""
        if index >= len(self._table):
            self._grow_table(index)
        elif not self._table[index]:
            self._place_block(index, index * self._block_entries)
            self._count_new(range(index * self._block_entries, index * self._block_entries + 1))

    def _place_block(self, index: int, cluster: int) -> None:
        self._refuse_metadata(cluster)
        offset = cluster * self._cluster_size
        self._metadata.add(offset, 1)
        self._table[index] = offset
        self._dirty_entries.add(index)
        for start in range(0, self._cluster_size, self._slice_size):
            self._blocks.put_zeros(offset + start)

    def _count_new(self, clusters: range) -> None:
        """Give clusters of new blocks the count 1."""
        for cluster in clusters:
            place, index = self._find(cluster)
            words = self._blocks.get(place)
            if words is None:
                raise CorruptImage(f"refcount block at {place:#x} is not in memory")
            words[index] = 1

    def _grow_table(self, index: int) -> None:
        """Move the table to where its old coverage ends, behind the blocks that count it there."""
        first_index = len(self._table)
        start = first_index * self._block_entries
        clusters = self._table_clusters
        while True:
            clusters += 1
            blocks = self._blocks_for(start, clusters)
            entries = clusters * self._cluster_size // TABLE_ENTRY_SIZE
            if entries > max(index, first_index + blocks) and entries >= first_index * 3 // 2:
                break
        if clusters * self._cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise UsageError("the image cannot grow: its refcount table is at the limit of 8 MiB")
        if self._metadata.overlaps(start * self._cluster_size, (blocks + clusters) * self._cluster_size):
            raise MetadataOverlap(
                f"host offset {start * self._cluster_size:#x}: the refcounts call a cluster of metadata free"
            )
        old_first = self._table_offset // self._cluster_size
        self._old_tables.append(range(old_first, old_first + self._table_clusters))
        self._table.extend([0] * (entries - first_index))
        for number in range(blocks):
            self._place_block(first_index + number, start + number)
        self._count_new(range(start, start + blocks + clusters))
        self._table_offset = (start + blocks) * self._cluster_size
        self._metadata.add(self._table_offset, clusters * self._cluster_size)
        self._table_clusters = clusters

    def _blocks_for(self, start: int, clusters: int) -> int:
        """How many blocks from `start` on count themselves and `clusters` clusters behind them."""
        blocks = 0
        while True:
            end = start + blocks + clusters
            needed = -(-end // self._block_entries) - start // self._block_entries
            if needed == blocks:
                return blocks
            blocks = needed

    # -- for the flush

    @property
    def is_changed(self) -> bool:
        """Whether something of the table is not on disk."""
        return bool(self._dirty_entries or self._old_tables)

    def take_change(self) -> TableChange | None:
        """What of the table is not on disk, as of now; None if nothing."""
        indices, self._dirty_entries = frozenset(self._dirty_entries), set()
        if self._old_tables:
            old, self._old_tables = tuple(self._old_tables), []
            whole = {self._table_offset: TABLE_WORDS.pack(self._table)}
            return TableChange(whole, (self._table_offset, self._table_clusters), old, indices)
        if not indices:
            return None
        pieces = {
            self._table_offset + index * TABLE_ENTRY_SIZE: self._table[index].to_bytes(8, "big")
            for index in indices
        }
        return TableChange(pieces, None, (), indices)

    def unprotect(self, old_table: range) -> None:
        """Let the clusters of a table that the header no longer names be used again."""
        for cluster in old_table:
            self._metadata.remove(cluster * self._cluster_size)

    def give_back(self, change: TableChange) -> None:
        """Note that a change may not have reached the disk."""
        self._dirty_entries |= change.indices
        self._old_tables[:0] = change.old_tables


def _run_of(counts: array[int], start: int) -> int:
    """How many equal counts there are from `start` on."""
    end = start + 1
    while end < len(counts) and counts[end] == counts[start]:
        end += 1
    return end - start


def _take(words: array[int], start: int, most: int) -> int:
    """Set the run of zeros from `start` on, at most `most` long, to 1; how long it is."""
    end = start
    limit = min(len(words), start + most)
    while end < limit and not words[end]:
        words[end] = 1
        end += 1
    return end - start
