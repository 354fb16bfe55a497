"""The image's own counts: the refcount table, its blocks, and the comparison with the references found.

Owns what a sound refcount structure is. Must not know who refers to a cluster. Implements the section
"Reference counts" for reading.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcowfs.check.arrays import I64, U64, Counts, batches, load_rows, load_words, runs_of, unpack_counts
from qcowfs.check.findings import Finding, Kind
from qcowfs.check.subject import REFCOUNT_BLOCK, REFCOUNT_TABLE, UNCLAIMED, Subject
from qcowfs.format.entries import REFCOUNT_TABLE_OFFSET_MASK

_RESERVED = ~np.uint64(REFCOUNT_TABLE_OFFSET_MASK)
_WINDOW = 1 << 18
NAME = "refcount table"


async def load_counts(subject: Subject) -> None:
    """Read the counts of every block that can be believed; the others are findings."""
    header, geometry = subject.header, subject.geometry
    size = header.refcount_table_clusters << header.cluster_bits
    hidden = subject.report.hidden
    subject.is_table_sound &= subject.claim(
        header.refcount_table_offset, size, REFCOUNT_TABLE, NAME, Kind.ERROR
    )
    subject.report.hidden = hidden  # it hides counts, no references
    if not subject.is_table_sound or not size:
        return
    table = await load_words(subject.file, header.refcount_table_offset, size // 8)
    subject.block_offsets = (table & np.uint64(REFCOUNT_TABLE_OFFSET_MASK)).astype(np.int64)
    _judge_entries(subject, table)
    present = np.flatnonzero(subject.block_offsets)
    for part in batches(len(present), geometry.cluster_size):
        await _load_blocks(subject, present[part])


def _judge_entries(subject: Subject, table: U64) -> None:
    """Count a reference to each block; those that break a rule lose their place."""
    seen: set[int] = set()
    for index in np.flatnonzero(table).tolist():
        offset = int(table[index]) & REFCOUNT_TABLE_OFFSET_MASK
        place = subject.header.refcount_table_offset + index * 8
        if table[index] & _RESERVED:
            subject.broken_blocks += 1
            subject.error("reserved bits are set", NAME, place=place, entry=int(table[index]))
        rule = _judge(subject, offset, seen)
        if rule:
            subject.block_offsets[index] = 0
            subject.broken_blocks += 1
            subject.error(rule, NAME, host=offset, place=place, entry=int(table[index]))
        seen.add(offset)


def _judge(subject: Subject, offset: int, seen: set[int]) -> str:
    """Count a block and say which rule it breaks."""
    if not subject.geometry.is_cluster_aligned(offset):
        return "the refcount block is not cluster aligned"
    if subject.is_past_end(offset, subject.geometry.cluster_size):
        return "the refcount block lies past the end of the file"
    cluster = offset >> subject.bits
    if offset and subject.owners[cluster] == UNCLAIMED:
        subject.owners[cluster] = REFCOUNT_BLOCK
        subject.refer_to_run(cluster, cluster + 1)
        return ""
    return "the refcount block overlaps other metadata" if offset else ""


async def _load_blocks(subject: Subject, indices: I64) -> None:
    """Put the counts of some blocks in their place."""
    rows = await load_rows(subject.file, subject.block_offsets[indices], subject.geometry.cluster_size)
    counts = unpack_counts(rows, subject.refcount_bits)
    near = indices < len(subject.stored) // subject.block_entries
    for row in np.flatnonzero(near).tolist():
        subject.store_counts(int(indices[row]), counts[row])
    for index in indices[~near & counts.any(axis=1)].tolist():
        subject.far_counts.append(index)
        row = counts[indices == index][0]
        where = index * subject.block_entries << subject.bits
        total = int(np.count_nonzero(row))
        rule = f"{total} clusters past the end of the file have refcounts"
        subject.report.add(Finding(Kind.LEAK, rule, host=where, count=total))


def compare(subject: Subject) -> None:
    """Hold the image's counts against the references that were found."""
    end = len(subject.stored)
    for start in range(0, end, _WINDOW):
        _compare_window(subject, start, min(start + _WINDOW, end))
    subject.report.image_end = _image_end(subject)


def references_in(subject: Subject, start: int, end: int) -> U64:
    """References to a range of clusters; those beyond the file have none."""
    found = np.zeros(end - start, np.uint64)
    part = subject.references[start:end]
    found[: len(part)] = part
    return found


def _compare_window(subject: Subject, start: int, end: int) -> None:
    if np.array_equal(subject.stored[start:end], subject.references[start:end]):
        return
    found = references_in(subject, start, end)
    stored = subject.stored[start:end].astype(np.uint64)
    for kind, wrong in ((Kind.ERROR, stored < found), (Kind.LEAK, stored > found)):
        where = np.flatnonzero(wrong)
        if len(where):
            subject.report.add_many(kind, _findings(subject, kind, where, stored, found, start), len(where))


def _findings(subject: Subject, kind: Kind, where: I64, stored: U64, found: U64, start: int) -> list[Finding]:
    """One finding for each run of clusters that are counted wrongly alike."""
    findings = []
    most = subject.report.room(kind)
    counts, wanted = stored[where], found[where]
    for run in runs_of(where, counts, wanted, most=most):
        first = start + int(where[run.start])
        rule = f"refcount {counts[run.start]}, references {wanted[run.start]}"
        one = Finding(kind, rule, host=first << subject.bits, count=run.stop - run.start)
        widest = (1 << subject.refcount_bits) - 1
        if wanted[run.start] > widest:
            one = replace(one, rule=f"{rule}, more than {subject.refcount_bits} bits hold")
        findings.append(one)
    return findings


def _image_end(subject: Subject) -> int:
    """Where the last cluster ends that is counted or referred to."""
    used = max(_last(subject.stored), _last(subject.references))
    return (used + 1) << subject.bits


def _last(counts: Counts) -> int:
    """The index of the last count that is not 0, -1 if there is none."""
    for end in range(len(counts), 0, -_WINDOW):
        start = max(0, end - _WINDOW)
        found = np.flatnonzero(counts[start:end])
        if len(found):
            return start + int(found[-1])
    return -1
