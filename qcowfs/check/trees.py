"""The trees of an image: the active L1 table and those of snapshots, their L2 tables, each walked once.

Owns L1 entries and the order of the walk. Must not know L2 entries. An L2 table that several trees share is
walked once, with the number of its owners as weight; all tables are claimed before the first is walked, so
that entries can be held against every place of metadata.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

import numpy as np

from qcowfs.check.areas import WHOLE
from qcowfs.check.arrays import I64, U64, Bool, Counts, batches, load_tables, load_words
from qcowfs.check.entries import Breach, judge_overlap
from qcowfs.check.findings import Cure, Finding, Kind
from qcowfs.check.subject import AREAS, L1_TABLE, L2_TABLE, UNCLAIMED, Subject
from qcowfs.format.entries import COPIED, OFFSET_MASK

L1_RESERVED = 0x7F00_0000_0000_01FF


@dataclass(frozen=True)
class Tree:
    """One L1 table: where it lies, how many entries it has, whose it is.

    One that overlaps other metadata must not be mended: that would change the other as well. `record` is a
    snapshot's index in the snapshot table.
    """

    label: str
    offset: int
    entries: int
    active: bool = False
    may_mend: bool = True
    record: int | None = None


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
        """Walk these `trees`; the active one comes first, so that shared tables are found in it."""
        self._subject = subject
        self.trees = trees
        self._l2_tables: I64 = np.zeros(0, np.int64)
        self._owners_of_table: I64 = np.zeros(0, np.int64)

    async def claim(self) -> None:
        """Claim all L1 tables, then all L2 tables that they name."""
        self.trees = [tree for tree in map(self._claimed, self.trees) if tree is not None]
        for tree in self.trees:
            words = await load_words(self._subject.file, tree.offset, tree.entries)
            self._claim_tables(tree, words)

    def _claimed(self, tree: Tree) -> Tree | None:
        """The tree with its L1 table claimed, None if that cannot be read."""
        size = tree.entries * 8
        whole = "" if tree.record is None else WHOLE
        if self._subject.claim(tree.offset, size, L1_TABLE, f"{tree.label}, L1 table", whole=whole):
            return tree
        if tree.record is not None:
            self._subject.broken_snapshots.add(tree.record)
        readable = self._subject.geometry.is_cluster_aligned(tree.offset)
        readable &= not self._subject.is_past_end(tree.offset, size)
        return replace(tree, may_mend=False) if readable else None

    def _claim_tables(self, tree: Tree, words: U64) -> None:
        """Judge the entries of an L1 table, then count and claim the L2 tables that they name."""
        for breach in [*self.breaches(words), *self.flag_breaches(tree, words)]:
            self._report(tree, words, breach)
        self._note_gone(tree, words)
        _, clusters = self._tables(words)
        self._subject.refer(clusters)
        owners = self._subject.owners[clusters]
        self._subject.owners[clusters[owners == UNCLAIMED]] = L2_TABLE
        self._note(clusters)

    def _note_gone(self, tree: Tree, words: U64) -> None:
        """Note the lowest L2 table that was lost with the end of the file."""
        offsets = words & np.uint64(OFFSET_MASK)
        past = (offsets >> np.uint64(self._subject.bits)) >= np.uint64(self._subject.clusters)
        past &= (offsets % np.uint64(self._subject.geometry.cluster_size)) == 0
        if past.any():
            self._subject.note_gone(int(offsets[past].min()) >> self._subject.bits, f"{tree.label}, L2 table")

    def _note(self, clusters: I64) -> None:
        """Count another owner for each of these L2 tables, among all of them in the order of the file."""
        known = len(self._l2_tables)
        everything = np.concatenate([self._l2_tables, clusters])
        self._l2_tables, places = np.unique(everything, return_inverse=True)
        owners = np.bincount(places[known:], minlength=len(self._l2_tables))
        owners[places[:known]] += self._owners_of_table
        self._owners_of_table = owners

    def _tables(self, words: U64) -> tuple[I64, I64]:
        """Indices of the entries that name a cluster of the file, and those clusters."""
        offsets = words & np.uint64(OFFSET_MASK)
        indices = np.flatnonzero(self._sound(offsets))
        return indices, (offsets[indices] >> np.uint64(self._subject.bits)).astype(np.int64)

    def breaches(self, words: U64) -> Iterator[Breach]:
        """Rules that the entries of an L1 table break, apart from the COPIED flag."""
        offsets = words & np.uint64(OFFSET_MASK)
        reserved = np.flatnonzero((words & np.uint64(L1_RESERVED)) != 0)
        yield Breach(Kind.ERROR, "reserved bits are set", Cure.CLEAR_RESERVED, reserved)
        misplaced = (offsets != 0) & ~self._sound(offsets)
        unaligned = misplaced & ((offsets % np.uint64(self._subject.geometry.cluster_size)) != 0)
        rule = "the L2 table is not cluster aligned"
        yield Breach(Kind.LOST, rule, Cure.DROP, np.flatnonzero(unaligned))
        rule = "the L2 table lies past the end of the file"
        yield Breach(Kind.LOST, rule, Cure.DROP, np.flatnonzero(misplaced & ~unaligned))
        indices, clusters = self._tables(words)
        owners = self._subject.owners[clusters]
        for area in np.unique(owners[(owners != UNCLAIMED) & (owners != L2_TABLE)]).tolist():
            rule = f"the L2 table overlaps {AREAS[area]}"
            yield Breach(*judge_overlap(area, rule), indices[owners == area])

    def flag_breaches(self, tree: Tree, words: U64) -> Iterator[Breach]:
        """Entries of the active L1 table whose COPIED flag contradicts the count of their table."""
        if not tree.active:
            return
        indices, clusters = self._tables(words)
        alone = self._subject.stored[clusters] == 1
        copied = (words[indices] & np.uint64(COPIED)) != 0
        wrong = alone != copied
        rule = "lacks the COPIED flag, but its L2 table's refcount is 1"
        yield Breach(Kind.ERROR, rule, Cure.SET_COPIED, indices[wrong & alone])
        rule = "has the COPIED flag, but its L2 table's refcount is not 1"
        yield Breach(Kind.ERROR, rule, Cure.CLEAR_COPIED, indices[wrong & ~alone])

    def _sound(self, offsets: U64) -> Bool:
        """Which entries name a cluster of the file."""
        bits, end = np.uint64(self._subject.bits), np.uint64(self._subject.clusters)
        aligned = (offsets % np.uint64(self._subject.geometry.cluster_size)) == 0
        found: Bool = aligned & (offsets != 0) & ((offsets >> bits) < end)
        return found

    def _report(self, tree: Tree, words: U64, breach: Breach) -> None:
        """Note a rule that some entries of an L1 table break; what lost ones name is hidden."""
        total = len(breach.indices)
        if not total:
            return
        report = self._subject.report
        report.hidden |= breach.kind is Kind.LOST or breach.cure is Cure.MOVE_COUNTS
        found = [
            self._finding(tree, breach, index, int(words[index]))
            for index in breach.indices[: report.room(breach.kind)].tolist()
        ]
        report.add_many(breach.kind, found, total)
        report.cures[breach.cure] += total

    def _finding(self, tree: Tree, breach: Breach, index: int, word: int) -> Finding:
        guest, place = index * self._subject.geometry.l2_coverage, tree.offset + index * 8
        owner = f"{tree.label}, L1 table"
        return Finding(breach.kind, breach.rule, owner, guest, word & OFFSET_MASK, place, word)

    async def walk(self) -> AsyncIterator[Batch]:
        """Every L2 table once, in the tree that comes first; a pass over all of them."""
        self._subject.passes.begin(len(self._l2_tables) * self._subject.geometry.cluster_size)
        walked = np.zeros(len(self._l2_tables), bool)
        for tree in self.trees:
            words = await load_words(self._subject.file, tree.offset, tree.entries)
            indices, clusters = self._tables(words)
            fresh = self._subject.owners[clusters] == L2_TABLE
            places, first = np.unique(np.searchsorted(self._l2_tables, clusters[fresh]), return_index=True)
            new = ~walked[places]
            walked[places] = True
            async for batch in self._load(tree, places[new], indices[fresh][first][new]):
                yield batch
                self._subject.passes.advance(batch.words.nbytes)

    async def _load(self, tree: Tree, places: I64, l1_indices: I64) -> AsyncIterator[Batch]:
        size = self._subject.geometry.cluster_size
        for part in batches(len(places), size):
            offsets = self._l2_tables[places[part]] << self._subject.bits
            words = await load_tables(self._subject.file, offsets, size)
            yield Batch(tree, words, offsets, l1_indices[part], self._owners_of_table[places[part]])
