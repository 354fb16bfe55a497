"""Zero clusters made into what version 2 can express: unallocated ones, or data that is zeros.

Owns the order of writes. Must not know when that is wanted. Data lies in a new, sparse end of the file, which
is on disk and counted before an entry names it; a table is written as a whole, and where a crash tears that,
each sector's entries read as zeros, old or new. What zero clusters had in reserve is a leak afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcowfs.check.arrays import U64, Bool, Counts
from qcowfs.check.checker import Inspection, inspect
from qcowfs.check.growth import place_behind_end
from qcowfs.check.passes import Passes
from qcowfs.check.recount import Recount
from qcowfs.check.trees import Batch
from qcowfs.errors import UsageError
from qcowfs.format.entries import COMPRESSED, COPIED, ZERO
from qcowfs.format.header import CRYPT_NONE
from qcowfs.host.hostfile import HostFile


async def forget_zeros(file: HostFile, found: Inspection) -> None:
    """Make every zero cluster unallocated, in all trees, which reads the same without a backing file."""

    def forget(batch: Batch, zero: Bool) -> U64:
        return np.where(zero, np.uint64(0), batch.words)

    await _rewrite(file, found, forget)


async def expand_zeros(file: HostFile, found: Inspection, passes: Passes) -> None:
    """Make every zero cluster a data cluster of its own, in all trees.

    Raises `CorruptImage` or `UsageError` where the file cannot grow, `OSError` as the host does.
    """
    references = await _references_wanted(found)
    if not len(references):
        return
    if found.subject.header.crypt_method != CRYPT_NONE:
        raise UsageError(
            f"{file.name}: has zero clusters over a backing file, which version 2 cannot express, and is "
            "encrypted: convert it instead"
        )
    bits, first = found.subject.bits, place_behind_end(file, found.subject, len(references))
    last = first + len(references) - 1
    await file.write_from([(last << bits, bytes(1 << bits))])
    await file.sync()
    found = await inspect(file, passes=passes)
    _refer(found, first, references)
    await Recount(found.subject, may_raise=True, may_free=False).write(file)
    place = first

    def expand(batch: Batch, zero: Bool) -> U64:
        nonlocal place
        count = int(np.count_nonzero(zero))
        new = batch.words.copy()
        own = (batch.weights == 1) & batch.tree.active
        flags = np.where(own, np.uint64(COPIED), np.uint64(0))[np.nonzero(zero)[0]]
        new[zero] = (np.arange(place, place + count, dtype=np.uint64) << np.uint64(bits)) | flags
        place += count
        return new

    await _rewrite(file, await inspect(file, passes=passes), expand)


def _zeros_of(batch: Batch) -> Bool:
    """Which entries are zero clusters."""
    zero: Bool = (batch.words & np.uint64(ZERO | COMPRESSED)) == np.uint64(ZERO)
    return zero


async def _references_wanted(found: Inspection) -> Counts:
    """For each zero cluster in the order of the walk, how often its table is shared."""
    parts = [np.repeat(b.weights, _zeros_of(b).sum(axis=1)) async for b in found.trees.walk()]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _refer(found: Inspection, first: int, references: Counts) -> None:
    """Count the references that the new clusters will have."""
    for weight in np.unique(references).tolist():
        found.subject.refer(first + np.flatnonzero(references == weight), weight)


async def _rewrite(file: HostFile, found: Inspection, change: Callable[[Batch, Bool], U64]) -> None:
    """Write anew each table that has zero clusters."""
    async for batch in found.trees.walk():
        zero = _zeros_of(batch)
        rows = np.flatnonzero(zero.any(axis=1)).tolist()
        if rows:
            words = change(batch, zero).astype(">u8")
            await file.write_from([(int(batch.offsets[row]), words[row].tobytes()) for row in rows])
    await file.sync()
