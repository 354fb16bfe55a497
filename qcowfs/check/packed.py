"""Whether every compressed cluster inflates, in as many threads as there are processors.

Owns how that work is spread. Must not know how entries were judged; those that lie past the end are left out.
"""

from __future__ import annotations

import os

import numpy as np
import trio

from qcowfs.check.arrays import I64, load_bytes
from qcowfs.check.entries import Breach, Entries
from qcowfs.check.findings import Cure, Kind
from qcowfs.check.subject import Subject
from qcowfs.check.trees import Trees
from qcowfs.check.walk import report
from qcowfs.codecs.compression import Inflater, inflater
from qcowfs.errors import CorruptImage
from qcowfs.host.waiting import run_in_thread

_PIECE = 256
"""Clusters that one thread inflates at a time."""


async def inflate_all(subject: Subject, trees: Trees) -> None:
    """Report compressed clusters of any tree that do not inflate to a whole cluster."""
    inflate = inflater(subject.header.compression_type)
    async for batch in trees.walk():
        entries = Entries(subject, batch.words, batch.l1_indices)
        for breach in await damaged(entries, inflate, batch.words.nbytes):
            report(subject, batch, entries, breach)


async def damaged(entries: Entries, inflate: Inflater, tables: int) -> list[Breach]:
    """The compressed clusters that do not inflate, by the reason why; their tables have so many bytes."""
    if entries.standard is entries or entries.subject.header.has_data_file:
        return []
    bad = await _find_bad(entries.packed, inflate, tables)
    found = []
    for rule in sorted(set(bad.values())):
        broken = np.array([index for index, why in bad.items() if why == rule], np.int64)
        found.append(Breach(Kind.LOST, rule, Cure.DROP, broken))
    return found


async def _find_bad(packed: Entries, inflate: Inflater, tables: int) -> dict[int, str]:
    """Why entries do not inflate, by their index."""
    offsets, lengths = packed.stored_ranges
    end = packed.subject.clusters << packed.subject.bits
    within = np.flatnonzero(offsets < end)
    bad: dict[int, str] = {}
    limit = trio.CapacityLimiter(os.cpu_count() or 1)
    done = 0

    async def work(part: I64) -> None:
        nonlocal done
        async with limit:
            spans = list(zip(offsets[part].tolist(), lengths[part].tolist(), strict=True))
            stored = [await load_bytes(packed.subject.file, at, length) for at, length in spans]
            size = packed.subject.geometry.cluster_size
            whys = await run_in_thread(_try_all, inflate, stored, size)
            bad.update({int(packed.indices[i]): why for i, why in zip(part, whys, strict=True) if why})
            done += len(part)
            packed.subject.passes.glance(tables * done // len(within))

    async with trio.open_nursery() as nursery:
        for start in range(0, len(within), _PIECE):
            nursery.start_soon(work, within[start : start + _PIECE])
    return bad


def _try_all(inflate: Inflater, stored: list[bytes], size: int) -> list[str]:
    """Why each piece does not inflate, empty for those that do."""
    return [_try(inflate, piece, size) for piece in stored]


def _try(inflate: Inflater, stored: bytes, size: int) -> str:
    try:
        inflate(stored, size)
    except CorruptImage as error:
        return str(error)
    return ""
