"""Putting the refcounts right: in their blocks, or by a new refcount structure that the header switches to.

Owns what the counts become and where a new structure lies. Must not know table entries. A new structure is
written behind the end of the file, synced, then named by one write of the header: a crash leaves the old one
or the new one. In place, each count is the old one or the right one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcowfs.check.arrays import Counts, batches, count_type, load_bytes, pack_counts, runs_of
from qcowfs.check.growth import place_behind_end
from qcowfs.check.subject import REFCOUNT_BLOCK, REFCOUNT_TABLE, Subject
from qcowfs.errors import CorruptImage, UsageError
from qcowfs.format.header import MAX_REFCOUNT_TABLE_BYTES
from qcowfs.host.hostfile import HostFile

REFCOUNT_TABLE_FIELD, ORDER_FIELD = 48, 96
_PLACE = struct.Struct(">QI")


@dataclass(frozen=True)
class Recount:
    """What may be done to counts: raised where they are too low, lowered where clusters leak."""

    subject: Subject
    may_raise: bool
    may_free: bool

    def wanted(self) -> Counts:
        """The count that each cluster gets; what the width cannot hold becomes its maximum."""
        subject = self.subject
        stored = subject.stored
        wanted = _references_that_fit(subject)
        if not self.may_raise:
            np.minimum(wanted, stored, out=wanted)
        if not self.may_free:
            np.maximum(wanted, stored, out=wanted)
        return wanted

    def needs_new_structure(self, wanted: Counts) -> bool:
        """Whether the blocks that there are cannot hold the counts, or cannot be trusted."""
        subject = self.subject
        if not self.may_raise:
            return False
        if not subject.is_table_sound or subject.broken_blocks or self._is_shared():
            return True
        by_block = (wanted != subject.stored).reshape(-1, subject.block_entries).any(axis=1)
        return any(not _block_of(subject, index) for index in np.flatnonzero(by_block).tolist())

    def _is_shared(self) -> bool:
        """Whether anything else refers to a cluster of the refcount structure."""
        subject = self.subject
        own = (subject.owners == REFCOUNT_TABLE) | (subject.owners == REFCOUNT_BLOCK)
        return bool((subject.references[own] > 1).any())

    def refuse_growth(self, file: HostFile) -> None:
        """Raise `CorruptImage` or `UsageError` where a new structure is needed and has no place."""
        wanted = self.wanted()
        if self.needs_new_structure(wanted):
            _plan(file, self.subject, wanted, self.subject.header.refcount_order)

    async def write(self, file: HostFile) -> bool:
        """Put the counts right; whether anything was written."""
        wanted = self.wanted()
        if self.needs_new_structure(wanted):
            await _write_new(file, self.subject, wanted, self.subject.header.refcount_order)
            return True
        return await self._write_in_place(file, wanted)

    async def _write_in_place(self, file: HostFile, wanted: Counts) -> bool:
        subject = self.subject
        rows, before = (a.reshape(-1, subject.block_entries) for a in (wanted, subject.stored))
        changed = np.flatnonzero((rows != before).any(axis=1))
        for part in batches(len(changed), subject.geometry.cluster_size):
            await file.write_from([
                (_block_of(subject, index), pack_counts(rows[index], subject.refcount_bits))
                for index in changed[part].tolist()
            ])  # fmt: skip
        far = subject.far_counts if self.may_free else []
        zeros = bytes(subject.geometry.cluster_size)
        await file.write_from([(_block_of(subject, index), zeros) for index in far])
        if len(changed) or far:
            await file.sync()
        return bool(len(changed) or far)


def _references_that_fit(subject: Subject) -> Counts:
    """The references to each cluster, none for those beyond the file, and as many as the width can hold."""
    widest = (1 << subject.refcount_bits) - 1
    wanted: Counts = np.zeros(len(subject.stored), np.result_type(subject.stored, subject.references))
    np.minimum(subject.references, np.uint64(widest), out=wanted[: len(subject.references)], casting="unsafe")
    return wanted


def _block_of(subject: Subject, index: int) -> int:
    return int(subject.block_offsets[index]) if index < len(subject.block_offsets) else 0


def leaked_ranges(subject: Subject) -> Iterator[tuple[int, int]]:
    """(host offset, length) of what is counted though nothing refers to it, within the file."""
    end = subject.clusters
    leaked = np.flatnonzero((subject.stored[:end] > 0) & (subject.references[:end] == 0))
    for run in runs_of(leaked, most=len(leaked)):
        yield int(leaked[run.start]) << subject.bits, (run.stop - run.start) << subject.bits


# -- a new structure


async def change_width(file: HostFile, subject: Subject, order: int) -> None:
    """Write all counts with a width of 2^`order` bits; the image must be without errors.

    Raises `UsageError` where a count does not fit.
    """
    most = int(subject.stored.max())
    if most > (1 << (1 << order)) - 1:
        raise UsageError(f"{file.name}: a cluster has {most} references, more than {1 << order} bits hold")
    wanted = Recount(subject, may_raise=True, may_free=False).wanted()
    await _write_new(file, subject, wanted, order)


async def _write_new(file: HostFile, subject: Subject, wanted: Counts, order: int) -> None:
    """Write new blocks and a new table that also count themselves, then let the header name them."""
    size, new = subject.geometry.cluster_size, _plan(file, subject, wanted, order)
    table = np.zeros(new.table_clusters * size // 8, ">u8")
    table[new.blocks] = (new.first + np.arange(len(new.blocks))) << subject.bits
    for part in batches(len(new.blocks), size):
        rows = pack_counts(new.rows[new.blocks[part]], 1 << order)
        await file.write_from([((new.first + part.start) << subject.bits, rows)])
    table_at = (new.first + len(new.blocks)) << subject.bits
    await file.write_from([(table_at, table.tobytes())])
    await file.sync()
    await _switch(file, subject, _PLACE.pack(table_at, new.table_clusters), order)


@dataclass(frozen=True)
class _Structure:
    """New counts, a row for each block; which rows get one; where they lie, followed by the table."""

    rows: Counts
    blocks: Counts
    first: int
    table_clusters: int


def _plan(file: HostFile, subject: Subject, wanted: Counts, order: int) -> _Structure:
    """A new structure, which counts itself. Raises `CorruptImage` or `UsageError` where it has no place."""
    bits = 1 << order
    per_block = subject.geometry.cluster_size * 8 // bits
    counts = _padded(_without_old_structure(subject, wanted), per_block, bits)
    blocks, table_clusters = _size_of_new(subject, counts, per_block)
    first = place_behind_end(file, subject, len(blocks) + table_clusters)
    end = first + len(blocks) + table_clusters
    counts = _padded(
        np.concatenate([counts, np.zeros(max(0, end - len(counts)), counts.dtype)]), per_block, bits
    )
    counts[first:end] = 1
    return _Structure(counts.reshape(-1, per_block), blocks, first, table_clusters)


async def _switch(file: HostFile, subject: Subject, place: bytes, order: int) -> None:
    """Name the new table, and its width if that is new, by one write within the header's first sector."""
    if order == subject.header.refcount_order:
        await file.write_from([(REFCOUNT_TABLE_FIELD, place)])
    else:
        fields = await load_bytes(file, REFCOUNT_TABLE_FIELD, ORDER_FIELD + 4 - REFCOUNT_TABLE_FIELD)
        rest = fields[len(place) : -4]
        await file.write_from([(REFCOUNT_TABLE_FIELD, place + rest + order.to_bytes(4, "big"))])
    await file.sync()


def _padded(counts: Counts, per_block: int, bits: int) -> Counts:
    """Counts for whole blocks, of the type for that width."""
    padded: Counts = np.zeros(-(-len(counts) // per_block) * per_block, count_type(bits))
    padded[: len(counts)] = counts
    return padded


def _without_old_structure(subject: Subject, wanted: Counts) -> Counts:
    """The counts of the file's clusters, once the old table and its blocks are given up."""
    counts = wanted[: subject.clusters + 1].copy()
    header, old = subject.header, subject.block_offsets[subject.block_offsets != 0] >> subject.bits
    counts[old] = _less_one(subject, old)
    at, size = header.refcount_table_offset, header.refcount_table_clusters << subject.bits
    if size and subject.geometry.is_cluster_aligned(at) and not subject.is_past_end(at, size):
        table = np.arange(at >> subject.bits, (at + size) >> subject.bits)
        counts[table] = _less_one(subject, table)
    return counts


def _less_one(subject: Subject, clusters: Counts) -> Counts:
    """References to clusters of the old structure, but for its own."""
    maximum = (1 << subject.refcount_bits) - 1
    less: Counts = np.minimum(subject.references[clusters].astype(np.uint64) - np.uint64(1), maximum)
    return less


def _size_of_new(subject: Subject, counts: Counts, per_block: int) -> tuple[Counts, int]:
    """Which ranges get a block, and how many clusters the table takes; both count themselves."""
    used = np.flatnonzero(counts.reshape(-1, per_block).any(axis=1))
    size, extra = subject.geometry.cluster_size, 0
    while True:
        first, last = subject.clusters // per_block, (subject.clusters + 1 + extra) // per_block
        blocks = np.union1d(used, np.arange(first, last + 1))
        table_clusters = -(-(int(blocks[-1]) + 1) * 8 // size)
        if len(blocks) + table_clusters <= extra:
            break
        extra = len(blocks) + table_clusters
    if table_clusters * size > MAX_REFCOUNT_TABLE_BYTES:
        raise CorruptImage(f"{subject.file.name}: its refcount table would be over the limit of 8 MiB")
    return blocks, table_clusters
