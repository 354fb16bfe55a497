"""The trees of an image: the active L1 table and those of snapshots, their L2 tables, each walked once.

Owns L1 entries and the order of the walk. Must not know L2 entries. An L2 table that several trees share is
walked once, with the number of its owners as weight; all tables are claimed before the first is walked, so
that entries can be held against every place of metadata.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from qcowfs.check.arrays import I64, U64, Bool, Counts, add_counts, batches, load_tables, load_words
from qcowfs.check.findings import Finding, Kind
from qcowfs.check.subject import AREAS, L1_TABLE, L2_TABLE, UNCLAIMED, Subject
from qcowfs.format.entries import COPIED, OFFSET_MASK

L1_RESERVED = 0x7F00_0000_0000_01FF


@dataclass(frozen=True)
class Tree:
    """One L1 table: where it lies, how many entries it has, whose it is."""

    label: str
    offset: int
    entries: int
    active: bool = False


@dataclass(frozen=True)
class Batch:
    """Some L2 tables of one tree: a row of words each, their host offsets, L1 indices and owners' number."""

    tree: Tree
    words: U64
    offsets: I64
    l1_indices: I64
    weights: Counts


class Trees:
    """The trees of a subject."""

    def __init__(self, subject: Subject, trees: list[Tree]) -> None:
        """Walk these trees; the active one comes first, so that shared tables are found in it."""
        self._subject = subject
        self._trees = trees
        self._owners_of_table = np.zeros(subject.clusters + 1, np.uint32)

    async def claim(self) -> None:
        """Claim all L1 tables, then all L2 tables that they name."""
        self._trees = [
            tree for tree in self._trees
            if tree.entries == 0
            or self._subject.claim(tree.offset, tree.entries * 8, L1_TABLE, f"{tree.label}, L1 table")
            or not self._subject.is_past_end(tree.offset, tree.entries * 8)
        ]  # fmt: skip
        for tree in self._trees:
            words = await load_words(self._subject.file, tree.offset, tree.entries)
            self._claim_tables(tree, words)

    def _claim_tables(self, tree: Tree, words: U64) -> None:
        """Judge the entries of an L1 table and count the L2 tables that they name."""
        offsets = words & np.uint64(OFFSET_MASK)
        self._report(tree, words, (words & np.uint64(L1_RESERVED)) != 0, Kind.ERROR, "reserved bits are set")
        sound = self._sound(offsets)
        misplaced = (offsets != 0) & ~sound
        unaligned = misplaced & ((offsets % np.uint64(self._subject.geometry.cluster_size)) != 0)
        self._report(tree, words, unaligned, Kind.LOST, "the L2 table is not cluster aligned")
        self._report(
            tree, words, misplaced & ~unaligned, Kind.LOST, "the L2 table lies past the end of the file"
        )
        indices = np.flatnonzero(sound)
        clusters = (offsets[sound] >> np.uint64(self._subject.bits)).astype(np.int64)
        self._subject.refer(clusters)
        self._judge_places(tree, words, indices, clusters)
        add_counts(self._owners_of_table, clusters)
        if tree.active:
            self._judge_copied(tree, words, indices, clusters)

    def _sound(self, offsets: U64) -> Bool:
        """Which entries name a cluster of the file."""
        bits, end = np.uint64(self._subject.bits), np.uint64(self._subject.clusters)
        aligned = (offsets % np.uint64(self._subject.geometry.cluster_size)) == 0
        found: Bool = aligned & (offsets != 0) & ((offsets >> bits) < end)
        return found

    def _judge_places(self, tree: Tree, words: U64, indices: I64, clusters: I64) -> None:
        """Claim L2 tables; one that lies on other metadata is no table and is not walked."""
        owners = self._subject.owners[clusters]
        taken = (owners != UNCLAIMED) & (owners != L2_TABLE)
        for area in np.unique(owners[taken]).tolist():
            mask = np.zeros(len(words), bool)
            mask[indices[owners == area]] = True
            self._report(tree, words, mask, Kind.LOST, f"the L2 table overlaps {AREAS[area]}")
        self._subject.owners[clusters[~taken]] = L2_TABLE

    def _judge_copied(self, tree: Tree, words: U64, indices: I64, clusters: I64) -> None:
        alone = self._subject.stored[clusters] == 1
        copied = (words[indices] & np.uint64(COPIED)) != 0
        for state, rule in ((False, "lacks the COPIED flag"), (True, "has the COPIED flag")):
            mask = np.zeros(len(words), bool)
            mask[indices[(alone != copied) & (copied == state)]] = True
            self._report(tree, words, mask, Kind.ERROR, f"{rule}, but its L2 table's refcount is {{count}}")

    def _report(self, tree: Tree, words: U64, mask: Bool, kind: Kind, rule: str) -> None:
        """Note a rule that some entries of an L1 table break; what lost ones name is hidden."""
        wrong = np.flatnonzero(mask)
        if not len(wrong):
            return
        subject = self._subject
        subject.report.hidden |= kind is Kind.LOST
        found = [
            self._finding(tree, kind, rule, int(index), int(words[index]))
            for index in wrong[: subject.report.room(kind)]
        ]
        subject.report.add_many(kind, found, len(wrong))

    def _finding(self, tree: Tree, kind: Kind, rule: str, index: int, word: int) -> Finding:
        host = word & OFFSET_MASK
        cluster = host >> self._subject.bits
        if "{count}" in rule:
            rule = rule.format(count=self._subject.stored[cluster])
        guest = index * self._subject.geometry.l2_coverage
        return Finding(kind, rule, f"{tree.label}, L1 table", guest, host, tree.offset + index * 8, word)

    async def walk(self) -> AsyncIterator[Batch]:
        """Every L2 table once, in the tree that comes first."""
        walked = np.zeros(self._subject.clusters + 1, bool)
        for tree in self._trees:
            words = await load_words(self._subject.file, tree.offset, tree.entries)
            offsets = words & np.uint64(OFFSET_MASK)
            indices = np.flatnonzero(self._sound(offsets))
            clusters = (offsets[indices] >> np.uint64(self._subject.bits)).astype(np.int64)
            fresh = (self._subject.owners[clusters] == L2_TABLE) & ~walked[clusters]
            clusters, first = np.unique(clusters[fresh], return_index=True)
            walked[clusters] = True
            async for batch in self._load(tree, clusters, indices[fresh][first]):
                yield batch

    async def _load(self, tree: Tree, clusters: I64, l1_indices: I64) -> AsyncIterator[Batch]:
        size = self._subject.geometry.cluster_size
        for part in batches(len(clusters), size):
            offsets = clusters[part] << self._subject.bits
            words = await load_tables(self._subject.file, offsets, size)
            yield Batch(tree, words, offsets, l1_indices[part], self._owners_of_table[clusters[part]])
