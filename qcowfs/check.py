"""An independent verifier: counts every reference to every host cluster and compares.

Owns the recount. Must not know the allocator, the caches or the mapping, so that a fault of theirs cannot
hide in it: it reads tables straight from the host file by `format` alone. An *error* is a cluster with fewer
counts than references, or a structure that breaks the format; a *leak* has more counts than references.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

from qcowfs.errors import CorruptImage
from qcowfs.format import extensions as ext
from qcowfs.format.bitmaps import BitmapDirectory
from qcowfs.format.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    ZERO,
    subcluster_bitmaps,
)
from qcowfs.format.header import Header
from qcowfs.format.luks import unpack_pointer
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.format.words import TABLE_WORDS, Words
from qcowfs.hostfile import HostFile
from qcowfs.snapshots import load_snapshots


@dataclass
class Report:
    """What was found, one text each; `references` counts them by host cluster index."""

    errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    references: Counter[int] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        """Neither errors nor leaks."""
        return not self.errors and not self.leaks


async def check(file: HostFile) -> Report:
    """Recount an image; raises `QcowError` where its header cannot be read, `OSError` as the host does."""
    start = await _read(file, 0, min(file.facts().size, 1 << 21))
    header = Header.unpack(start)
    checker = _Checker(file, header)
    await checker.count_references()
    await checker.compare()
    return checker.report


async def _read(file: HostFile, offset: int, size: int) -> bytes:
    data = bytearray(size)
    await file.read_into([(offset, memoryview(data))])
    return bytes(data)


class _Checker:
    """The recount of one image."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self.file = file
        self.header = header
        self.geometry = header.geometry
        self.end = self.geometry.cluster_round_up(file.facts().size)
        self.report = Report()
        self.copied: dict[int, list[tuple[str, bool]]] = {}

    def refer(self, offset: int, size: int, what: str) -> bool:
        """Count a reference to every cluster of a range; whether the range is sound."""
        if not size:
            return True
        if offset + size > self.end + self.geometry.cluster_size or offset >= self.end:
            self.report.errors.append(f"{what}: host offset {offset:#x} lies past the end of the file")
            return False
        bits = self.geometry.cluster_bits
        self.report.references.update(range(offset >> bits, ((offset + size - 1) >> bits) + 1))
        return True

    async def count_references(self) -> None:
        """The header, every table and everything that the tables name."""
        header = self.header
        self.refer(0, self.geometry.cluster_size, "header")
        size = header.refcount_table_clusters << header.cluster_bits
        self.refer(header.refcount_table_offset, size, "refcount table")
        await self.count_tree(header.l1_table_offset, header.l1_size, "active L1 table", active=True)
        for snapshot in await self.snapshots():
            name = f"L1 table of snapshot {snapshot.id!r}"
            await self.count_tree(snapshot.l1_table_offset, snapshot.l1_size, name, active=False)
        self.count_extensions()

    async def snapshots(self) -> list[Snapshot]:
        """The snapshot table, counted."""
        if not self.header.nb_snapshots:
            return []
        try:
            snapshots = await load_snapshots(self.file, self.header)
        except CorruptImage as error:
            self.report.errors.append(str(error))
            return []
        size = sum(len(s.pack()) for s in snapshots)
        self.refer(self.header.snapshots_offset, size, "snapshot table")
        return snapshots

    def count_extensions(self) -> None:
        """The areas that header extensions name, without what bitmaps refer to."""
        pointer = self.header.extension(ext.ENCRYPTION_HEADER)
        if pointer is not None:
            self.refer(*unpack_pointer(pointer), "LUKS header")
        bitmaps = self.header.extension(ext.BITMAPS)
        if bitmaps is not None:
            directory = BitmapDirectory.unpack(bitmaps)
            self.refer(directory.offset, directory.size, "bitmap directory")

    async def count_tree(self, offset: int, entries: int, name: str, *, active: bool) -> None:
        """An L1 table, its L2 tables and their clusters."""
        if not self.refer(offset, entries * 8, name):
            return
        l1 = TABLE_WORDS.unpack(await _read(self.file, offset, entries * 8))
        for index, entry in enumerate(l1):
            table = entry & OFFSET_MASK
            what = f"{name} entry {index}"
            if not table:
                continue
            if not self.geometry.is_cluster_aligned(table):
                self.report.errors.append(f"{what}: L2 table offset {table:#x} is not cluster aligned")
                continue
            if self.refer(table, self.geometry.cluster_size, what):
                if active:
                    self.note_copied(table, what, bool(entry & COPIED))
                await self.count_l2(table, index, active=active)

    async def count_l2(self, table: int, l1_index: int, *, active: bool) -> None:
        """The clusters of one L2 table."""
        geometry = self.geometry
        words = TABLE_WORDS.unpack(await _read(self.file, table, geometry.cluster_size))
        step = geometry.l2_entry_size // 8
        for index in range(0, len(words), step):
            word, bitmap = words[index], words[index + 1] if step == 2 else 0
            if word or bitmap:
                guest = l1_index * geometry.l2_coverage + index // step * geometry.cluster_size
                self.count_entry(word, bitmap, f"guest offset {guest:#x}", active=active)

    def count_entry(self, word: int, bitmap: int, what: str, *, active: bool) -> None:
        """What one L2 entry refers to."""
        geometry = self.geometry
        if word & COMPRESSED:
            if word & COPIED:
                self.report.errors.append(f"{what}: a compressed cluster has the COPIED flag")
            offset, stored = geometry.compressed_location(word)
            sector = offset & ~511
            self.refer(sector, offset + stored - sector, what)
            return
        offset = word & OFFSET_MASK
        allocated, zeros = subcluster_bitmaps(bitmap)
        if allocated & zeros or (allocated and not offset and not self.header.has_data_file):
            self.report.errors.append(f"{what}: subcluster bitmap {bitmap:#x} contradicts itself")
        if word & ZERO and (self.header.version < 3 or geometry.extended_l2):
            self.report.errors.append(f"{what}: the zero flag is not valid here")
        if self.header.has_data_file or not offset:
            return
        if not geometry.is_cluster_aligned(offset):
            self.report.errors.append(f"{what}: cluster offset {offset:#x} is not cluster aligned")
        elif self.refer(offset, geometry.cluster_size, what) and active:
            self.note_copied(offset, what, bool(word & COPIED))

    def note_copied(self, offset: int, what: str, copied: bool) -> None:
        """Remember a COPIED flag until the counts are known."""
        cluster = offset >> self.geometry.cluster_bits
        self.copied.setdefault(cluster, []).append((what, copied))

    async def compare(self) -> None:
        """Hold the image's counts against the references, and the COPIED flags against the counts."""
        counts = await self.stored_counts()
        references = self.report.references
        for cluster in sorted(counts.keys() | references.keys()):
            stored, found = counts.get(cluster, 0), references[cluster]
            where = f"host offset {cluster << self.geometry.cluster_bits:#x}"
            if stored != found:
                text = f"{where}: refcount {stored}, references {found}"
                (self.report.leaks if stored > found else self.report.errors).append(text)
            for what, copied in self.copied.get(cluster, ()):
                if copied != (stored == 1):
                    text = f"{what}: COPIED is {copied} but {where} has refcount {stored}"
                    self.report.errors.append(text)

    async def stored_counts(self) -> dict[int, int]:
        """The counts that are not 0, by cluster; refcount blocks are counted as references."""
        header, geometry = self.header, self.geometry
        size = header.refcount_table_clusters << header.cluster_bits
        table: array[int] = TABLE_WORDS.unpack(await _read(self.file, header.refcount_table_offset, size))
        words = Words(1 << header.refcount_order)
        per_block = geometry.cluster_size * 8 >> header.refcount_order
        counts = {}
        for index, entry in enumerate(table):
            block = entry & REFCOUNT_TABLE_OFFSET_MASK
            what = f"refcount table entry {index}"
            if not block:
                continue
            if not geometry.is_cluster_aligned(block):
                self.report.errors.append(f"{what}: block {block:#x} is not cluster aligned")
            elif self.refer(block, geometry.cluster_size, what):
                values = words.unpack(await _read(self.file, block, geometry.cluster_size))
                counts.update({index * per_block + i: v for i, v in enumerate(values) if v})
        return counts
