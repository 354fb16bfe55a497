"""A new state of an image's metadata, written beside the present one and put in force by one header write.

Owns the order: everything to free clusters, sync, the header's sector, sync. So a crash leaves the old state
or the new one, at worst with clusters that are counted but not used. Must not know what the state is for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcowfs.errors import CorruptImage
from qcowfs.format.entries import COPIED, OFFSET_MASK
from qcowfs.format.header import Header
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.counts import Counts
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.metadata.table_walk import L2Group, Walk, Words, load_words, pack_words

STATE_AT = 24
_STATE = struct.Struct(">QIIQQIIQ")


@dataclass
class Draft:
    """The next state: size in bytes, L1 table, snapshots; and what of the present one it replaces."""

    file: HostFile
    header: Header
    counts: Counts
    size: int
    l1: Words
    snapshots: list[Snapshot]
    present: list[Snapshot]
    replaced: list[range] = field(default_factory=list)
    """Host clusters to free once the new state is in force and nobody reads them."""

    @classmethod
    async def begin(
        cls, file: HostFile, header: Header, snapshots: list[Snapshot], metadata: MetadataMap
    ) -> Draft:
        """A draft equal to the present state, which has to be on disk."""
        counts = await Counts.load(file, header, metadata)
        l1 = await load_words(file, header.l1_table_offset, header.l1_size)
        return cls(file, header, counts, header.size, l1, list(snapshots), list(snapshots))

    def forget(self, dropped: list[range]) -> None:
        """Count what no entry names any more one reference less; what is free then is replaced."""
        if dropped:
            self.counts.lower_by_one(np.concatenate([np.arange(r.start, r.stop) for r in dropped]))

    async def raise_tree(self, l1: Words) -> None:
        """Count one more reference to everything that an L1 table leads to."""
        async for group in self.walk(l1):
            self.counts.raise_by_one(group.references())
            self.counts.raise_by_one(group.clusters)

    async def lower_tree(self, l1: Words) -> None:
        """Count one reference less to everything that an L1 table leads to."""
        async for group in self.walk(l1):
            self.counts.lower_by_one(group.references())
            self.counts.lower_by_one(group.clusters)

    def walk(self, l1: Words) -> Walk:
        """The L2 tables of an L1 table."""
        return Walk(self.file, self.header.geometry, l1)

    async def fix_flags(self) -> None:
        """Make the COPIED flags of the new L1 table and its L2 tables tell what the counts are."""
        async for group in self.walk(self.l1):
            own = self.counts.values[group.clusters] == 1
            wanted = np.zeros(group.descriptors.shape, bool)
            plain = group.plain & own[:, None]
            wanted[plain] = self.counts.values[group.plain_clusters[plain]] == 1
            wrong = (group.flags() != wanted).any(axis=1)
            group.set_flags(wanted)
            self.l1[group.l1_indices] &= np.uint64(OFFSET_MASK)
            await self.move(group, wrong, references=1)
            own |= wrong
            self.l1[group.l1_indices[own]] |= np.uint64(COPIED)

    async def move(self, group: L2Group, which: NDArray[np.bool_], references: int) -> None:
        """Write the changed tables of a group to new clusters, and name these in the new L1 table."""
        size = self.header.geometry.cluster_size
        places = self.counts.allocate(int(which.sum()))
        self.counts.values[places] = references
        self.l1[group.l1_indices[which]] = (places * size).astype(np.uint64)
        rows = group.words[which]
        requests = [(at * size, pack_words(row)) for at, row in zip(places.tolist(), rows, strict=True)]
        await self.file.write_from(requests)
        self.replaced += [range(c, c + 1) for c in group.clusters[which].tolist()]

    async def put_table(self, l1_index: int, words: Words) -> None:
        """Let an L1 entry of the live disk name a new L2 table; one that it named is free later."""
        old = int(self.l1[l1_index]) & OFFSET_MASK
        if old:
            self.drop(old, self.header.geometry.cluster_size)
        self.l1[l1_index] = await self._place(pack_words(words))

    async def place_l1(self, l1: Words) -> int:
        """Write an L1 table to new clusters; its offset, 0 if it is empty."""
        if not len(l1):
            return 0
        return await self._place(pack_words(l1))

    async def _place(self, data: bytes) -> int:
        size = self.header.geometry.cluster_size
        offset = self.counts.allocate_run(-(-len(data) // size)) * size
        await self.file.write_from([(offset, data.ljust(-(-len(data) // size) * size, b"\0"))])
        return offset

    def drop(self, offset: int, length: int) -> None:
        """Free what lies in a range of the host file once the new state is in force."""
        size = self.header.geometry.cluster_size
        if length:
            self.replaced.append(range(offset // size, -(-(offset + length) // size)))

    async def put_in_force(self) -> None:
        """Write what is left of the new state, then the header that names it.

        Raises `OSError` as the host does; the old state is then in force still, or `CorruptImage` if
        the disk cannot be brought to hold either for certain.
        """
        header = self.header
        l1_at = await self.place_l1(self.l1)
        table = b"".join(s.pack() for s in self.snapshots)
        table_at = await self._place(table) if table else 0
        self.drop(header.l1_table_offset, header.l1_size * 8)
        self.drop(header.snapshots_offset, sum(len(s.pack()) for s in self.present))
        self.replaced += self.counts.take_freed()
        counts_at, counts_clusters, replaced = await self.counts.store(self.file)
        self.replaced += replaced
        await self.file.sync()
        await self._switch(_STATE.pack(
            self.size, header.crypt_method, len(self.l1), l1_at or header.l1_table_offset, counts_at,
            counts_clusters, len(self.snapshots), table_at,
        ))  # fmt: skip

    async def _switch(self, state: bytes) -> None:
        before = bytearray(_STATE.size)
        await self.file.read_into([(STATE_AT, memoryview(before))])
        try:
            await self.file.write_from([(STATE_AT, state)])
            await self.file.sync()
        except OSError as error:
            try:
                await self.file.write_from([(STATE_AT, before)])
                await self.file.sync()
            except OSError:
                raise CorruptImage(
                    f"the header could neither be written nor put back ({error.strerror}); nothing more "
                    "is written, check the image"
                ) from None
            raise
