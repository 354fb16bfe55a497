"""All reference counts of an image at once, as numpy arrays: for changes to millions of clusters.

Owns the counts in memory and where free clusters are; every change goes to copies of refcount blocks in new
places, so that nothing on disk changes until a header names them. Must not know L2 tables or snapshots.
Implements the section "Reference counts".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcowfs.errors import CorruptImage, MetadataOverlap, UsageError
from qcowfs.format.entries import REFCOUNT_TABLE_OFFSET_MASK
from qcowfs.format.header import MAX_REFCOUNT_TABLE_BYTES, Header
from qcowfs.geometry import TABLE_ENTRY_SIZE
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.metadata_map import MetadataMap

Clusters = NDArray[np.int64]
"""Host clusters, by index."""
MOST_CLUSTERS = 1 << 33
_CHUNK = 4 << 20


@dataclass
class Counts:
    """The count of each host cluster; `table` holds the places of the blocks, in bytes, 0 for none."""

    header: Header
    metadata: MetadataMap
    table: NDArray[np.uint64]
    values: NDArray[np.unsignedinteger]
    in_use: NDArray[np.bool_] = field(init=False)
    """Clusters that the state on disk counts; they are not free before another is in force."""
    _changed: set[int] = field(default_factory=set)
    _lowered: list[Clusters] = field(default_factory=list)
    _searched_to: int = 0

    @classmethod
    async def load(cls, file: HostFile, header: Header, metadata: MetadataMap) -> Counts:
        """Read every count. Raises `CorruptImage` for a block past the end of the file."""
        size = header.geometry.cluster_size
        data = bytearray(header.refcount_table_clusters * size)
        await file.read_into([(header.refcount_table_offset, memoryview(data))])
        table = np.frombuffer(data, ">u8").astype(np.uint64) & np.uint64(REFCOUNT_TABLE_OFFSET_MASK)
        used = int(np.flatnonzero(table)[-1]) + 1 if table.any() else 0
        per_block = (size * 8) >> header.refcount_order
        if used * per_block > MOST_CLUSTERS:
            raise UsageError(f"the refcounts cover {used * per_block} clusters, over {MOST_CLUSTERS}")
        width = 1 << header.refcount_order
        values = np.zeros(used * per_block, np.dtype(f"u{max(1, width // 8)}"))
        counts = cls(header, metadata, table, values)
        await counts._load_blocks(file, np.flatnonzero(table))
        counts.in_use = values != 0
        return counts

    async def _load_blocks(self, file: HostFile, indices: NDArray[np.intp]) -> None:
        size, end = self.header.geometry.cluster_size, file.facts().size
        step = max(1, _CHUNK // size)
        for start in range(0, len(indices), step):
            part = [int(i) for i in indices[start : start + step]]
            data = memoryview(bytearray(len(part) * size))
            places = [int(self.table[i]) for i in part]
            if max(places) >= end:
                raise CorruptImage(f"refcount block at {max(places):#x} lies past the end of the file")
            pieces = [data[n * size : (n + 1) * size] for n in range(len(part))]
            await file.read_into(list(zip(places, pieces, strict=True)))
            for index, piece in zip(part, pieces, strict=True):
                at = index * self.per_block
                self.values[at : at + self.per_block] = _unpack(piece, 1 << self.header.refcount_order)

    @property
    def per_block(self) -> int:
        """Counts in a refcount block."""
        return (self.header.geometry.cluster_size * 8) >> self.header.refcount_order

    @property
    def maximum(self) -> int:
        """The largest count that an entry holds."""
        return (1 << (1 << self.header.refcount_order)) - 1

    # -- changing

    def raise_by_one(self, clusters: Clusters) -> None:
        """Add 1 to the count of each cluster, as often as it is named.

        Raises `UsageError` where the width cannot hold it, `CorruptImage` for a cluster without count.
        """
        unique, times = self._known(clusters)
        room = np.array(self.maximum, self.values.dtype) - self.values[unique]
        if (times > room).any():
            place = int(unique[times > room][0]) * self.header.geometry.cluster_size
            raise UsageError(
                f"host offset {place:#x} would have more references than refcounts of "
                f"{1 << self.header.refcount_order} bits hold, at most {self.maximum}; widen them with "
                "qcowfs amend -o refcount_bits=16"
            )
        self.values[unique] += times.astype(self.values.dtype)
        self._note(unique)

    def lower_by_one(self, clusters: Clusters) -> None:
        """Subtract 1 from the count of each cluster, as often as it is named; see `take_freed`."""
        unique, times = self._known(clusters)
        short = times > self.values[unique]
        if short.any():
            raise self._not_counted(int(unique[short][0]))
        self.values[unique] -= times.astype(self.values.dtype)
        self._lowered.append(unique[self.values[unique] == 0])
        self._note(unique)

    def _known(self, clusters: Clusters) -> tuple[Clusters, NDArray[np.int64]]:
        """Each cluster once, in order, and how often it is named; all have a count."""
        if len(clusters) and (np.diff(clusters) > 0).all():
            unique, times = clusters, np.ones(len(clusters), np.int64)
        else:
            unique, times = np.unique(clusters, return_counts=True)
        if len(unique) and int(unique[-1]) >= len(self.values):
            raise self._not_counted(int(unique[-1]))
        if not self.values[unique].all():
            raise self._not_counted(int(unique[self.values[unique] == 0][0]))
        return unique, times

    def _not_counted(self, cluster: int) -> CorruptImage:
        offset = cluster * self.header.geometry.cluster_size
        return CorruptImage(
            f"host offset {offset:#x} has fewer counts than references; repair the image with check"
        )

    def take_freed(self) -> list[range]:
        """The clusters whose count fell to 0; they stay counted until nobody reads them any more."""
        lowered = np.unique(np.concatenate(self._lowered)) if self._lowered else np.empty(0, np.int64)
        freed = lowered[self.values[lowered] == 0]
        self.values[freed] = 1
        self._lowered = []
        return runs_of(freed)

    def _note(self, clusters: Clusters) -> None:
        """Note the blocks that count some clusters, given in order."""
        if len(clusters):
            blocks = clusters // self.per_block
            self._changed.update(blocks[np.flatnonzero(np.diff(blocks))].tolist(), [int(blocks[-1])])

    # -- allocating

    def allocate(self, count: int) -> Clusters:
        """Take free clusters, in order; they need not follow each other."""
        while True:
            start = self._searched_to
            free = np.flatnonzero((self.values[start:] == 0) & ~self.in_use[start:])[:count] + start
            if len(free) == count:
                break
            self._grow(count - len(free))
        self._take(free)
        if count:
            self._searched_to = int(free[-1]) + 1
        return free

    def allocate_run(self, count: int) -> int:
        """Take free clusters that follow each other; the first of them."""
        free = np.flatnonzero((self.values == 0) & ~self.in_use)
        fits = np.flatnonzero(free[count - 1 :] - free[: max(0, len(free) - count + 1)] == count - 1)
        if not len(fits):
            self._grow(count)
            return self.allocate_run(count)
        first = int(free[fits[0]])
        self._take(np.arange(first, first + count))
        return first

    def _take(self, clusters: Clusters) -> None:
        size = self.header.geometry.cluster_size
        for cluster in clusters.tolist():
            if self.metadata.overlaps(cluster * size, 1):
                place = cluster * size
                raise MetadataOverlap(
                    f"host offset {place:#x}: the refcounts call a cluster of metadata free"
                )
        self.values[clusters] = 1
        self._note(clusters)

    def _grow(self, least: int) -> None:
        """Cover more clusters, by whole blocks."""
        blocks = -(-least // self.per_block)
        self.values = np.concatenate([self.values, np.zeros(blocks * self.per_block, self.values.dtype)])
        self.in_use = np.concatenate([self.in_use, np.zeros(blocks * self.per_block, bool)])

    # -- storing

    async def store(self, file: HostFile) -> tuple[int, int, list[range]]:
        """Write the changed blocks and the table to new places.

        Returns the table's offset and clusters, and the clusters that hold what it replaces. Raises
        `UsageError` where the table would be too large, `OSError` as the host does.
        """
        size = self.header.geometry.cluster_size
        places, table_at, table_clusters = self._place_all()
        replaced = [range(int(self.table[i]) // size, int(self.table[i]) // size + 1) for i in places
                    if i < len(self.table) and self.table[i]]  # fmt: skip
        old = self.header.refcount_table_offset // size
        replaced.append(range(old, old + self.header.refcount_table_clusters))
        table = np.zeros(table_clusters * size // TABLE_ENTRY_SIZE, np.uint64)
        table[: min(len(table), len(self.table))] = self.table[: len(table)]
        for index, cluster in sorted(places.items()):
            table[index] = cluster * size
            block = self.values[index * self.per_block : (index + 1) * self.per_block]
            await file.write_from([(cluster * size, _pack(block, 1 << self.header.refcount_order))])
        await file.write_from([(table_at * size, table.astype(">u8").tobytes())])
        return table_at * size, table_clusters, replaced

    def _place_all(self) -> tuple[dict[int, int], int, int]:
        """A new cluster for each changed block and a run for the table, which change counts themselves."""
        size = self.header.geometry.cluster_size
        table_clusters = self._table_clusters()
        table_at = self.allocate_run(table_clusters)
        places: dict[int, int] = {}
        while missing := sorted(self._changed - places.keys()):
            places.update(zip(missing, self.allocate(len(missing)).tolist(), strict=True))
            if self._table_clusters() > table_clusters:
                self.values[table_at : table_at + table_clusters] = 0
                table_clusters = self._table_clusters()
                table_at = self.allocate_run(table_clusters)
        if table_clusters * size > MAX_REFCOUNT_TABLE_BYTES:
            raise UsageError("the image cannot grow: its refcount table is at the limit of 8 MiB")
        return places, table_at, table_clusters

    def _table_clusters(self) -> int:
        entries = len(self.values) // self.per_block
        return max(1, -(-entries * TABLE_ENTRY_SIZE // self.header.geometry.cluster_size))


def runs_of(clusters: Clusters) -> list[range]:
    """Clusters in order, each once, as ranges."""
    if not len(clusters):
        return []
    breaks = np.flatnonzero(np.diff(clusters) != 1) + 1
    starts = clusters[np.concatenate([[0], breaks])]
    ends = clusters[np.concatenate([breaks - 1, [len(clusters) - 1]])] + 1
    return [range(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def _unpack(block: memoryview, width: int) -> NDArray[np.unsignedinteger]:
    """The counts of a block; those of less than a byte begin at its low bits."""
    if width >= 8:
        return np.frombuffer(block, f">u{width // 8}").astype(f"u{width // 8}")
    bits = np.unpackbits(np.frombuffer(block, np.uint8), bitorder="little").reshape(-1, width)
    weights = (1 << np.arange(width)).astype(np.uint8)
    counts: NDArray[np.uint8] = (bits * weights).sum(axis=1, dtype=np.uint8)
    return counts


def _pack(counts: NDArray[np.unsignedinteger], width: int) -> bytes:
    if width >= 8:
        return counts.astype(f">u{width // 8}").tobytes()
    bits = (counts[:, None] >> np.arange(width).astype(np.uint8)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()
