"""The quick way through sound tables: long runs of clusters that follow each other are judged as one.

Owns the shortcut. Must not report anything: whatever is not plainly sound is left to the rules of `entries`.
"""

from __future__ import annotations

import numpy as np

from qcowfs.check.entries import Entries
from qcowfs.check.subject import Subject
from qcowfs.check.trees import Batch
from qcowfs.format.entries import COPIED, OFFSET_MASK

_PLAIN = np.uint64(COPIED | OFFSET_MASK)
_SHORT = 256
"""Runs that are shorter on average cost more one by one than all entries together."""


def take_runs(entries: Entries, batch: Batch) -> bool:
    """Count a batch that consists of long runs of sound clusters; False leaves all of it to others."""
    subject, words = entries.subject, entries.words
    if entries.bitmaps is not None or entries.every & ~_PLAIN or subject.header.has_data_file:
        return False
    weight = int(batch.weights[0])
    if (batch.weights != weight).any():
        return False
    breaks = np.flatnonzero(words[1:] - words[:-1] != np.uint64(subject.geometry.cluster_size)) + 1
    if len(breaks) * _SHORT > len(words):
        return False
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(words)]
    heads = words[starts].tolist()
    runs = [(head, end - start) for head, start, end in zip(heads, starts, ends, strict=True)]
    if not all(_is_sound(subject, head, length, active=batch.tree.active) for head, length in runs):
        return False
    for head, length in runs:
        first = (head & OFFSET_MASK) >> subject.bits
        subject.refer_to_run(first, first + length, weight)
    if batch.tree.active:
        allocation = subject.report.allocation
        tables = entries.indices // entries.per_table
        allocation.allocated += len(words)
        allocation.fragmented += int(np.count_nonzero(tables[breaks] == tables[breaks - 1]))
    return True


def _is_sound(subject: Subject, head: int, length: int, *, active: bool) -> bool:
    """Whether a run from the entry `head` on lies in the file, off metadata, with the right flags."""
    host = head & OFFSET_MASK
    first = host >> subject.bits
    end = first + length
    if not host or not subject.geometry.is_cluster_aligned(host) or end > subject.clusters:
        return False
    if subject.owners[first:end].any():
        return False
    if not active:
        return True
    alone = subject.stored[first:end] == 1
    return bool(alone.all() if head & COPIED else not alone.any())
