"""Internal snapshots made, dropped, renamed and gone back to, and the disk's size changed.

Owns what of the metadata each of these changes, as a draft of the next state. Must not know who writes
meanwhile, or how the state is put in force. Implements the section "Snapshots".
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from qcowfs.errors import CorruptImage, UnsupportedFeature, UsageError
from qcowfs.format.entries import COPIED, OFFSET_MASK, ZERO
from qcowfs.format.header import MAX_L1_BYTES, MAX_SNAPSHOTS
from qcowfs.format.snapshot_table import MAX_TABLE_BYTES, NO_ICOUNT, Snapshot
from qcowfs.geometry import SECTOR_SIZE
from qcowfs.metadata.draft import Draft
from qcowfs.metadata.table_walk import L2Group, Words, load_words

MAX_NAME = 65535
MAX_ID = 128
ALL_ZERO = 0xFFFFFFFF << 32
"""The bitmap of an extended entry whose subclusters all read as zeros."""
Plan = Callable[[Draft], Awaitable[None]]


def create(name: bytes) -> Plan:
    """A new snapshot of the live disk, last in the table; its id is the largest numeric one plus 1."""

    async def plan(draft: Draft) -> None:
        _refuse_data_file(draft)
        _check_name(name)
        async for group in draft.walk(draft.l1):
            draft.counts.raise_by_one(group.references())
            own = np.asarray(group.flags().any(axis=1))
            group.set_flags(np.zeros(group.descriptors.shape, bool))
            _refuse_second_reference(draft, group)
            draft.counts.raise_by_one(group.clusters[~own])
            await draft.move(group, own, references=2)
        draft.l1 &= np.uint64(OFFSET_MASK)
        now = time.time_ns()
        draft.snapshots.append(Snapshot(
            await draft.place_l1(draft.l1) or draft.header.l1_table_offset, len(draft.l1),
            _next_id(draft.snapshots), name, now // 10**9, now % 10**9, 0, 0, _extra(draft.size),
        ))  # fmt: skip
        _check_table(draft)

    return plan


def delete(snapshot: Snapshot) -> Plan:
    """The snapshot gone, and everything that only it referred to free."""

    async def plan(draft: Draft) -> None:
        _refuse_data_file(draft)
        draft.snapshots.remove(snapshot)
        await draft.lower_tree(await _l1_of(draft, snapshot))
        draft.drop(snapshot.l1_table_offset, snapshot.l1_size * 8)
        await draft.fix_flags()

    return plan


def rename(snapshot: Snapshot, name: bytes) -> Plan:
    """The snapshot under another name."""

    async def plan(draft: Draft) -> None:
        _check_name(name)
        draft.snapshots[draft.snapshots.index(snapshot)] = replace(snapshot, name=name)
        _check_table(draft)

    return plan


def revert(snapshot: Snapshot) -> Plan:
    """The live disk with the content and the size of the snapshot, which stays."""

    async def plan(draft: Draft) -> None:
        _refuse_data_file(draft)
        size = draft.size if snapshot.disk_size is None else snapshot.disk_size
        l1 = await _l1_of(draft, snapshot, size)
        await draft.lower_tree(draft.l1)
        await draft.raise_tree(l1)
        draft.l1, draft.size = l1, size
        await draft.fix_flags()

    return plan


def resize(size: int, below: int) -> Plan:
    """The live disk with another size; what it held beyond a smaller one is free.

    A larger one reads as zeros where it is new, also over the `below` bytes of a backing file.
    """

    async def plan(draft: Draft) -> None:
        geometry, old = draft.header.geometry, draft.size
        _check_size(draft, size)
        await _cut(draft, min(old, size))
        entries = max(1, geometry.l1_entries_for(size))
        if size < old:
            draft.l1 = draft.l1[:entries].copy()
        elif entries > len(draft.l1):
            draft.l1 = np.concatenate([draft.l1, np.zeros(entries - len(draft.l1), np.uint64)])
        if old < min(size, below):
            await _hide(draft, geometry.cluster_round_up(old), min(size, below))
        draft.size = size
        await draft.fix_flags()

    return plan


async def _hide(draft: Draft, start: int, end: int) -> None:
    """Make the whole clusters of a range that has no entries read as zeros."""
    geometry = draft.header.geometry
    if draft.header.version < 3:
        raise UnsupportedFeature("version 2 has no zero clusters to hide a longer backing file with")
    step = geometry.l2_entry_size // 8
    for index in range(geometry.l1_index(start), geometry.l1_entries_for(end)):
        at = index * geometry.l2_coverage
        first = max(0, start - at) // geometry.cluster_size * step
        last = -(-min(end - at, geometry.l2_coverage) // geometry.cluster_size) * step
        words = np.zeros(geometry.cluster_size // 8, np.uint64)
        if draft.l1[index]:
            words = await load_words(draft.file, int(draft.l1[index]) & OFFSET_MASK, len(words))
        entry = [0, ALL_ZERO] if geometry.extended_l2 else [ZERO]
        words[first:last] = np.resize(np.array(entry, np.uint64), last - first)
        await draft.put_table(index, words)


async def _cut(draft: Draft, size: int) -> None:
    """Drop every cluster that lies wholly beyond a size."""
    geometry = draft.header.geometry
    kept = geometry.l1_entries_for(size)
    beyond = draft.l1.copy()
    beyond[:kept] = 0
    await draft.lower_tree(beyond)
    draft.l1[kept:] = 0
    last = np.zeros_like(draft.l1)
    last[max(0, kept - 1) : kept] = draft.l1[max(0, kept - 1) : kept]
    first_gone = -(-(size - max(0, kept - 1) * geometry.l2_coverage) // geometry.cluster_size)
    async for group in draft.walk(last):
        await _cut_table(draft, group, first_gone * (geometry.l2_entry_size // 8))


async def _cut_table(draft: Draft, group: L2Group, first: int) -> None:
    """Move a table to where its entries from a word on are clear; if it is shared, the others keep it."""
    gone = L2Group(group.geometry, group.l1_indices, group.clusters, group.words.copy())
    gone.words[:, :first] = 0
    if not gone.words.any():
        return
    group.words[:, first:] = 0
    draft.counts.lower_by_one(gone.references())
    await draft.move(group, np.ones(len(group.clusters), bool), references=1)


def _check_size(draft: Draft, size: int) -> None:
    if size <= 0 or size % SECTOR_SIZE:
        raise UsageError(f"a size of {size} bytes: a disk has whole sectors of {SECTOR_SIZE} bytes")
    if draft.header.geometry.l1_entries_for(size) * 8 > MAX_L1_BYTES:
        raise UsageError(f"a size of {size} bytes needs an L1 table over the limit of {MAX_L1_BYTES} bytes")
    if draft.header.version < 3 and draft.snapshots:
        raise UnsupportedFeature("version 2 with snapshots keeps one size for all; delete them or convert it")
    if draft.header.has_data_file:
        raise UnsupportedFeature("the size of an image with an external data file cannot be changed")


def _refuse_second_reference(draft: Draft, group: L2Group) -> None:
    if draft.counts.maximum < 2:
        place = int(group.clusters[0]) * draft.header.geometry.cluster_size
        raise UsageError(f"host offset {place:#x}: refcounts of 1 bit hold no second reference")


def _refuse_data_file(draft: Draft) -> None:
    if draft.header.has_data_file:
        raise UnsupportedFeature("internal snapshots cannot hold an external data file")


def _check_name(name: bytes) -> None:
    if len(name) > MAX_NAME:
        raise UsageError(f"a snapshot name of {len(name)} bytes, over {MAX_NAME}")


def _check_table(draft: Draft) -> None:
    if len(draft.snapshots) > MAX_SNAPSHOTS:
        raise UsageError(f"an image holds at most {MAX_SNAPSHOTS} snapshots")
    if sum(len(s.pack()) for s in draft.snapshots) > MAX_TABLE_BYTES:
        raise UsageError(f"the snapshot table would be over {MAX_TABLE_BYTES} bytes")


def _next_id(snapshots: list[Snapshot]) -> bytes:
    numbers = [int(s.id) for s in snapshots if s.id.isdigit() and len(s.id) < MAX_ID]
    return b"%d" % (max(numbers, default=0) + 1)


def _extra(size: int) -> bytes:
    """VM state size, disk size, instruction count: as QEMU stores them for a snapshot without VM."""
    return b"".join(value.to_bytes(8, "big") for value in (0, size, NO_ICOUNT))


async def _l1_of(draft: Draft, snapshot: Snapshot, size: int = 0) -> Words:
    """A snapshot's L1 table; raises `CorruptImage` where it cannot be that of a disk of `size` bytes."""
    snapshot.check(draft.header.geometry, size)
    end = draft.header.geometry.cluster_round_up(draft.file.facts().size)
    if snapshot.l1_table_offset + snapshot.l1_size * 8 > end:
        raise CorruptImage(
            f"the snapshot's L1 table at {snapshot.l1_table_offset:#x} lies past the end of the file; "
            "repair the image with check"
        )
    l1 = await load_words(draft.file, snapshot.l1_table_offset, snapshot.l1_size)
    return l1 & ~np.uint64(COPIED)
