"""Mending table entries: what each cure makes of an entry, and writing the tables that change.

Owns the new values. Must not know when entries may be mended. A table is written as a whole; where a crash
tears that, each sector holds the old entries or the new ones, and both name the same clusters or none.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

import numpy as np

from qcowfs.check.arrays import I64, U64, load_words
from qcowfs.check.checker import Inspection
from qcowfs.check.entries import RESERVED, Breach, Entries
from qcowfs.check.findings import Cure
from qcowfs.check.packed import damaged
from qcowfs.check.subject import Subject
from qcowfs.check.trees import L1_RESERVED, Batch, Tree
from qcowfs.check.walk import breaches
from qcowfs.codecs.compression import inflater
from qcowfs.format.entries import COPIED, ZERO
from qcowfs.host.hostfile import HostFile, WriteRequest

FLAGS = frozenset({Cure.SET_COPIED, Cure.CLEAR_COPIED})
LOSSLESS = frozenset({Cure.CLEAR_RESERVED, Cure.CLEAR_BITMAP, Cure.PLAIN_ZERO, Cure.CLIP})
_LAST = (Cure.PLAIN_ZERO, Cure.DROP)
_COPIED, _ZERO = np.uint64(COPIED), np.uint64(ZERO)
_L1_RESERVED = np.uint64(L1_RESERVED)
_ALL_ZERO = np.uint64(0xFFFF_FFFF << 32)


async def mend_tables(file: HostFile, found: Inspection, cures: Collection[Cure], *, data: bool) -> bool:
    """Apply these cures to every entry that wants them; whether any table was changed.

    With `data`, compressed clusters that do not inflate are among those that want `DROP`.
    """
    changed = False
    inflate = inflater(found.subject.header.compression_type)
    for tree in filter(lambda tree: tree.may_mend, found.trees.trees):
        words = await load_words(file, tree.offset, tree.entries)
        changed |= await _mend_l1(file, found, tree, words, cures)
    async for batch in found.trees.walk():
        entries = Entries(found.subject, batch.words, batch.l1_indices)
        wrong = list(breaches(entries, batch))
        if data and Cure.DROP in cures:
            wrong += await damaged(entries, inflate, batch.words.nbytes)
        changed |= await _mend_l2(file, batch, entries, [b for b in wrong if b.cure in cures])
    if changed:
        await file.sync()
    return changed


async def _mend_l1(
    file: HostFile, found: Inspection, tree: Tree, words: U64, cures: Collection[Cure]
) -> bool:
    """Mend entries of an L1 table, 8 bytes each."""
    new = words.copy()
    wrong = chain(found.trees.flag_breaches(tree, words), found.trees.breaches(words))  # drops come last
    for breach in wrong:
        if breach.cure in cures:
            new[breach.indices] = _cured_l1(new[breach.indices], breach.cure)
    changed = np.flatnonzero(new != words).tolist()
    requests: list[WriteRequest] = [
        (tree.offset + index * 8, int(new[index]).to_bytes(8, "big")) for index in changed
    ]
    await file.write_from(requests)
    return bool(changed)


def _cured_l1(words: U64, cure: Cure) -> U64:
    if cure is Cure.DROP:
        return np.zeros_like(words)
    if cure is Cure.CLEAR_RESERVED:
        return words & ~_L1_RESERVED
    return words | _COPIED if cure is Cure.SET_COPIED else words & ~_COPIED


async def _mend_l2(file: HostFile, batch: Batch, entries: Entries, wrong: list[Breach]) -> bool:
    """Write the tables of a batch whose entries change."""
    geometry = entries.subject.geometry
    new = batch.words.copy()
    step = geometry.l2_entry_size // 8
    flat = new.reshape(-1)
    for breach in sorted(wrong, key=lambda breach: (breach.cure in _LAST) - (breach.cure is Cure.CLIP)):
        if breach.cure is Cure.CLIP:
            within = np.isin(entries.packed.indices, breach.indices)
            flat[entries.packed.indices[within] * step] = entries.packed.clipped()[within]
        else:
            _cure(entries.subject, flat, breach.indices * step, breach.cure)
    rows = np.flatnonzero((new != batch.words).any(axis=1))
    requests: list[WriteRequest] = [
        (int(batch.offsets[row]), new[row].astype(">u8").tobytes()) for row in rows.tolist()
    ]
    await file.write_from(requests)
    return bool(requests)


def _cure(subject: Subject, flat: U64, places: I64, cure: Cure) -> None:
    """Change the entries whose first words lie at these places of the flat tables."""
    extended = subject.geometry.extended_l2
    if cure is Cure.DROP:
        no_zero_flag = extended or subject.header.version < 3
        flat[places] = np.uint64(0) if no_zero_flag else _ZERO
        if extended:
            flat[places + 1] = _ALL_ZERO
    elif cure is Cure.PLAIN_ZERO:
        flat[places] = np.uint64(0) if extended else _ZERO
    elif cure is Cure.CLEAR_BITMAP:
        flat[places + 1] = np.uint64(0)
    elif cure is Cure.CLEAR_RESERVED:
        flat[places] &= ~(RESERVED | (_ZERO if extended else np.uint64(0)))
    elif cure is Cure.SET_COPIED:
        flat[places] |= _COPIED
    else:
        flat[places] &= ~_COPIED
