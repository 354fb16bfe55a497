"""Flush order: which metadata reaches the disk before which.

Owns the chain of dependencies and the clusters that wait to be freed. Must not know what entries mean. The
chain: data, refcount blocks and L2 tables that nothing on disk names, sync, refcount table, sync, its
place in the header, sync, the other L2 slices and L1 slices, sync, only then are dropped clusters free. What
is captured together goes down the chain together, so a crash leaves at worst clusters that are counted, not
referenced.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from qcowfs.errors import CorruptImage
from qcowfs.host.hostfile import HostFile, WriteRequest
from qcowfs.host.waiting import new_lock
from qcowfs.metadata.cache import Batch, TableCache
from qcowfs.metadata.epochs import ReadEpochs
from qcowfs.metadata.refcounts import Refcounts, TableChange

log = logging.getLogger(__name__)

REFCOUNT_TABLE_FIELD = 48
_MOST_PASSES = 4
"""Freeing dirties counts once more; a read under way may hold a cluster back, which then leaks."""
_TABLE_PLACE = struct.Struct(">QI")

Dropped = tuple[int, range]
"""Host clusters, by index, that no entry names any more, and the epoch in which that became so."""


class Flusher:
    """Writes one image's dirty metadata back, in order, one flush at a time."""

    def __init__(
        self, file: HostFile, data_file: HostFile, refcounts: Refcounts,
        caches: Sequence[TableCache], epochs: ReadEpochs,
    ) -> None:  # fmt: skip
        """`caches` in the order of the chain: refcount blocks, then L2, then L1 tables."""
        self._file = file
        self._data_file = data_file
        self._refcounts = refcounts
        self._blocks, *self._tables = caches
        self._epochs = epochs
        self._lock = new_lock()
        self._dropped: list[Dropped] = []
        self._unsynced = False

    def note_write(self) -> None:
        """Note that guest data went to the host file."""
        self._unsynced = True

    def drop(self, clusters: range) -> None:
        """Lower the counts of clusters once the entries that named them are gone from the disk."""
        if clusters:
            self._dropped.append((self._epochs.current, clusters))

    @property
    def dropped(self) -> list[range]:
        """What still waits to be freed."""
        return [clusters for _, clusters in self._dropped]

    @property
    def dirty_bytes(self) -> int:
        """Memory that waits for a flush."""
        caches = [self._blocks, *self._tables]
        return sum(cache.dirty_bytes for cache in caches) + 16 * len(self._dropped)

    @property
    def is_dirty(self) -> bool:
        """Whether anything waits to be written, synced or freed."""
        return bool(self.dirty_bytes or self._unsynced)

    async def flush(self) -> None:
        """Return when everything that was written or dropped before the call is on disk.

        Raises `OSError` as the host does; what may not have reached the disk is then dirty again.
        """
        async with self._turn():
            await self._flush_captured()

    async def flush_all(self) -> None:
        """Flush until nothing is left, not even clusters to be freed."""
        async with self._turn():
            for _ in range(_MOST_PASSES):
                if not self.is_dirty:
                    return
                await self._flush_captured()

    async def write_tables_back(self) -> None:
        """Flush until no table differs from the disk; what readers still use may wait to be freed."""
        async with self._turn():
            while self._unsynced or any(cache.dirty_bytes for cache in (self._blocks, *self._tables)):
                await self._flush_captured()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Hold the lock; unlike its own way, that lets no other task run where it is free."""
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()
        try:
            yield
        finally:
            self._lock.release()

    async def _flush_captured(self) -> None:
        """One pass down the chain with what is dirty as of now."""
        if not self.dirty_bytes and not self._refcounts.is_changed:
            await self._sync_data()
            return
        blocks = self._blocks.take_dirty()
        change = self._refcounts.take_change()
        tables = [(cache, cache.take_dirty()) for cache in self._tables]
        dropped, self._dropped = self._dropped, []
        unsynced, self._unsynced = self._unsynced, False
        try:
            parts = [(cache, *cache.split(batch)) for cache, batch in tables]
            for cache, early, _ in parts:
                await cache.write(early)
            await self._write_counts(blocks, change, sync=unsynced or any(b for _, b in tables))
            for cache, early, _ in parts:
                cache.mark_referenced(early)
            for cache, _, late in parts:
                await cache.write(late)
            if any(late for _, _, late in parts):
                await self._file.sync()
        except BaseException:
            self._give_back(blocks, change, tables, dropped)
            raise
        self._blocks.settle(blocks)
        for cache, batch in tables:
            cache.settle(batch)
        if change is not None:
            for old in change.old_tables:
                self._refcounts.unprotect(old)
                dropped.append((self._epochs.current, old))
        await self._free(dropped)

    async def _sync_data(self) -> None:
        """The whole pass where no table is dirty."""
        unsynced, self._unsynced = self._unsynced, False
        try:
            await self._write_counts(Batch({}), None, sync=unsynced)
        except BaseException:
            self._unsynced = True
            raise

    async def _write_counts(self, blocks: Batch, change: TableChange | None, *, sync: bool) -> None:
        if blocks:
            await self._blocks.write(blocks)
        if self._data_file is not self._file and sync:
            await self._data_file.sync()
        if blocks or sync or change is not None:
            await self._file.sync()
        if change is None:
            return
        await self._file.write_from(list(change.pieces.items()))
        await self._file.sync()
        if change.moved_to is not None:
            place: WriteRequest = (
                REFCOUNT_TABLE_FIELD, _TABLE_PLACE.pack(change.moved_to[0], change.moved_to[1])
            )  # fmt: skip
            await self._file.write_from([place])
            await self._file.sync()

    def _give_back(
        self, blocks: Batch, change: TableChange | None,
        tables: list[tuple[TableCache, Batch]], dropped: list[Dropped],
    ) -> None:  # fmt: skip
        self._blocks.give_back(blocks)
        if change is not None:
            self._refcounts.give_back(change)
        for cache, batch in tables:
            cache.give_back(batch)
        self._dropped[:0] = dropped
        self._unsynced = True

    async def _free(self, dropped: list[Dropped]) -> None:
        """Lower the counts of what no entry on disk names and no reader uses any more."""
        oldest = self._epochs.advance()
        waiting = [(epoch, clusters) for epoch, clusters in dropped if epoch >= oldest]
        self._dropped[:0] = waiting
        ready = _joined([clusters for epoch, clusters in dropped if epoch < oldest])
        while ready:
            part = self._refcounts.first_part(ready[-1])
            try:
                await self._free_part(part)
            except CorruptImage as error:
                log.warning("cannot free a cluster: %s", error)
            except BaseException:
                self._dropped += [(self._epochs.current, clusters) for clusters in ready]
                raise
            ready[-1:] = [rest] if (rest := ready[-1][len(part) :]) else []

    async def _free_part(self, clusters: range) -> None:
        """Give the host's blocks back while nobody else can take the clusters, then free these.

        They are counted by one slice, so whoever fails or is cancelled has lowered all of them or none.
        """
        size = self._refcounts.cluster_size
        for last in await self._refcounts.last_references(clusters):
            await self._file.punch_hole(last.start * size, len(last) * size)
        await self._refcounts.lower(clusters)


def _joined(ranges: list[range]) -> list[range]:
    """The same clusters in fewer ranges; one that is named twice stays twice."""
    joined: list[range] = []
    for clusters in sorted(ranges, key=lambda r: (r.start, r.stop)):
        if joined and joined[-1].stop == clusters.start:
            joined[-1] = range(joined[-1].start, clusters.stop)
        else:
            joined.append(clusters)
    return joined
