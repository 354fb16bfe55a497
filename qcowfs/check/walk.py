"""The walk over all L2 tables of an image: references counted, breaches reported, the live disk measured.

Owns what is done with each batch of entries. Must not know the entries' rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcowfs.check.arrays import I64, Counts
from qcowfs.check.entries import Breach, Entries
from qcowfs.check.findings import Cure, Finding
from qcowfs.check.growth import note_gone
from qcowfs.check.runs import take_runs
from qcowfs.check.subject import Subject
from qcowfs.check.trees import Batch, Trees
from qcowfs.format.entries import COPIED
from qcowfs.geometry import COMPRESSED_OFFSET_BITS


async def walk(subject: Subject, trees: Trees) -> None:
    """Count what every L2 entry refers to and report each rule that one breaks."""
    async for batch in trees.walk():
        entries = Entries(subject, batch.words, batch.l1_indices)
        if not len(entries.indices) or take_runs(entries, batch):
            continue
        for breach in breaches(entries, batch):
            report(subject, batch, entries, breach)
        _count(entries, batch)
        await note_gone(subject, batch, entries)
        if batch.tree.active:
            _measure(entries)


def breaches(entries: Entries, batch: Batch) -> Iterator[Breach]:
    """Every breach of a batch; COPIED flags mean something in the active tree only."""
    standard = entries.standard
    yield from standard.breaches()
    if batch.tree.active and not entries.subject.header.has_data_file:
        yield from standard.flag_breaches(entries.subject.stored)
    if standard is not entries:
        yield from entries.packed.packed_breaches()


def report(subject: Subject, batch: Batch, entries: Entries, breach: Breach) -> None:
    """Note a breach: the first entries one by one, the others by their number."""
    total = len(breach.indices)
    if not total:
        return
    listed = breach.indices[: subject.report.room(breach.kind)]
    guests = entries.guest_offsets(listed).tolist()
    found = [
        _finding(subject, batch, breach, index, guest)
        for index, guest in zip(listed.tolist(), guests, strict=True)
    ]
    subject.report.add_many(breach.kind, found, total)
    subject.report.cures[breach.cure] += total
    subject.report.hidden |= breach.cure is Cure.MOVE_COUNTS


def _finding(subject: Subject, batch: Batch, breach: Breach, index: int, guest: int) -> Finding:
    geometry = subject.geometry
    table, within = divmod(index, geometry.l2_entries)
    word = int(batch.words[table, within * geometry.l2_entry_size // 8])
    place = int(batch.offsets[table]) + within * geometry.l2_entry_size
    return Finding(breach.kind, breach.rule, batch.tree.label, guest, host_offset(subject, word), place, word)


def host_offset(subject: Subject, word: int) -> int:
    """The host offset that an L2 entry names."""
    if word >> COMPRESSED_OFFSET_BITS & 1:
        return subject.geometry.compressed_location(word)[0]
    return word & ((1 << 56) - 1) & ~511


def _count(entries: Entries, batch: Batch) -> None:
    """Count references, each as often as its table has owners."""
    standard = entries.standard
    _refer(entries, batch, standard.indices[standard.counted], standard.clusters)
    if standard is not entries:
        for have, clusters in entries.packed.touched_clusters():
            _refer(entries, batch, entries.packed.indices[have], clusters)


def _refer(entries: Entries, batch: Batch, indices: I64, clusters: I64) -> None:
    weights: Counts = np.unique(batch.weights)
    if len(weights) == 1:
        entries.subject.refer(clusters, int(weights[0]))
        return
    of_entry = batch.weights[indices // entries.per_table]
    for weight in weights.tolist():
        entries.subject.refer(clusters[of_entry == weight], weight)


def _measure(entries: Entries) -> None:
    """Count allocated, compressed and fragmented clusters as qemu-img does: table by table."""
    allocation, standard = entries.subject.report.allocation, entries.standard
    placed = standard.offsets != 0
    if entries.subject.header.has_data_file:
        placed |= (standard.words & np.uint64(COPIED)) != 0  # offset 0 is a cluster there
    tables = standard.indices[placed] // entries.per_table
    steps = np.diff(standard.offsets[placed].view(np.int64))
    apart = (steps != entries.subject.geometry.cluster_size) & (tables[1:] == tables[:-1])
    packed = 0 if standard is entries else len(entries.packed.indices)
    allocation.allocated += int(np.count_nonzero(placed)) + packed
    allocation.compressed += packed
    allocation.fragmented += int(np.count_nonzero(apart)) + packed
