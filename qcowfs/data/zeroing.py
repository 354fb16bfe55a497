"""Zeroing and discarding: whole clusters by their entries, the rest by writing zeros.

Owns which entry a cluster gets, for each version and kind. Must not know how data is written. What a
discarded cluster reads as, and when it keeps its place, is as in QEMU; what reads as zeros already stays.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qcowfs.data.cluster_locks import ClusterLocks
from qcowfs.data.writing import ALL_SUBCLUSTERS, MOST_DIRTY_BYTES, Target, Writer
from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from qcowfs.geometry import SUBCLUSTERS, GuestOffset
from qcowfs.metadata.linking import Entry, Linker

Change = Callable[[Entry], Entry | None]
Part = Callable[[int, int], Awaitable[None]]


_ZEROS = bytes(1 << 20)


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Whether all bytes are zero; most data tell by their first few."""
    view = memoryview(data)
    if any(view[:16]):
        return False
    return all(view[i : i + len(_ZEROS)] == _ZEROS[: len(view) - i] for i in range(0, len(view), len(_ZEROS)))


class Zeroer:
    """Zeroes and discards on an image's live disk."""

    def __init__(
        self, writer: Writer, linker: Linker, target: Target, locks: ClusterLocks, size: int
    ) -> None:
        """Change a disk of `size` bytes; what is no whole cluster is written by `writer`."""
        self._writer = writer
        self._linker = linker
        self._to = target
        self._geometry = target.geometry
        self._locks = locks
        self._size = size

    async def zero(self, guest: GuestOffset, length: int, *, unmap: bool) -> None:
        """Make the range read as zeros; whole clusters lose their data, and with `unmap` their place.

        Raises as `write` does.
        """
        await self._by_clusters(guest, length, self._zero_part, lambda e: self._zeroed(e, unmap=unmap))

    async def discard(self, guest: GuestOffset, length: int) -> None:
        """Give back the whole clusters of the range, as the specification's readers expect of a discard.

        Raises as `write` does.
        """
        await self._by_clusters(guest, length, None, self._discarded)

    async def _by_clusters(self, guest: GuestOffset, length: int, part: Part | None, change: Change) -> None:
        """Apply `change` to whole clusters and `part` to what is left of the range at its ends."""
        geometry, end = self._geometry, guest + length
        whole_end = end if end == self._size else geometry.cluster_start(end)
        while guest < end:
            if geometry.in_cluster(guest) or guest >= whole_end:
                stop = min(end, geometry.cluster_start(guest) + geometry.cluster_size)
                if part is not None:
                    await part(guest, stop - guest)
            elif not self._to.has_backing and await self._linker.is_absent(guest):
                stop = min(whole_end, geometry.l2_coverage_end(guest))
            else:
                stop = await self._change_run(guest, min(whole_end, geometry.slice_end(guest)), part, change)
            guest = stop
            if self._to.flusher.dirty_bytes > MOST_DIRTY_BYTES:
                await self._to.flusher.flush()

    async def _change_run(self, guest: GuestOffset, end: int, part: Part | None, change: Change) -> int:
        """Change the entries of whole clusters of one slice, up to one that cannot be; where that ended."""
        size = self._geometry.cluster_size
        clusters = range(guest >> self._geometry.cluster_bits, -(-end // size))
        await self._locks.hold(clusters)
        try:
            await self._linker.ensure_table(guest)
            while guest < end and self._change_entry(guest, change):
                guest += size
        finally:
            self._locks.release(clusters)
        if guest < end:  # no entry says what is wanted
            stop = min(end, guest + size)
            if part is not None:
                await part(guest, stop - guest)
            return stop
        return end

    def _change_entry(self, guest: GuestOffset, change: Change) -> bool:
        old = self._linker.get(guest)
        new = change(old)
        if new is not None and new != old:
            self._writer.link(guest, new)
            if not new.word & OFFSET_MASK:
                self._writer.drop(old)
        return new is not None

    async def _zero_part(self, guest: GuestOffset, length: int) -> None:
        """Zero a part of one cluster: its whole subclusters by their bits, where there are any."""
        if await self._writer.reads_as_zeros(guest, length):
            return
        end, size = guest + length, self._geometry.subcluster_size
        low = -(-guest // size) * size
        high = end if end == self._size else end // size * size
        if low < high and self._geometry.extended_l2 and await self._zero_subclusters(low, high):
            await self._write_zeros(guest, low)
            await self._write_zeros(high, end)
        else:
            await self._write_zeros(guest, end)

    async def _write_zeros(self, guest: GuestOffset, end: GuestOffset) -> None:
        if guest < end:
            await self._writer.write(guest, memoryview(bytes(end - guest)))

    async def _zero_subclusters(self, guest: GuestOffset, end: GuestOffset) -> bool:
        """Mark subclusters of one cluster as zeros; False where its entry cannot tell."""
        geometry = self._geometry
        start, number = geometry.cluster_start(guest), guest >> geometry.cluster_bits
        first = geometry.subcluster_index(guest)
        bits = (1 << -(-(end - start) // geometry.subcluster_size)) - (1 << first)
        await self._locks.hold(range(number, number + 1))
        try:
            await self._linker.ensure_table(start)
            return self._change_entry(start, lambda old: self._partly_zeroed(old, bits))
        finally:
            self._locks.release(range(number, number + 1))

    def _partly_zeroed(self, old: Entry, bits: int) -> Entry | None:
        """The entry of a cluster that keeps its place, if it has one, with these subclusters zero."""
        if self._to.external or old.word & COMPRESSED:
            return None
        return Entry(old.word, old.bitmap & ~bits | bits << SUBCLUSTERS)

    def _zeroed(self, old: Entry, *, unmap: bool) -> Entry | None:
        """The entry of a cluster that reads as zeros; None where the format has none for that."""
        keeps = bool(old.word & COPIED) and not old.word & COMPRESSED and not unmap
        place = old.word & (OFFSET_MASK | COPIED) if keeps else 0
        if not old.word and not old.bitmap and not self._to.has_backing:
            return old
        if self._to.external:
            return None
        if self._geometry.extended_l2:
            return Entry(place, ALL_SUBCLUSTERS << SUBCLUSTERS)
        if self._to.zero_flag:
            return Entry(place | ZERO)
        return None if self._to.has_backing else Entry(0)

    def _discarded(self, old: Entry) -> Entry | None:
        if self._to.external:
            return old
        if not self._to.zero_flag and self._to.has_backing:
            return old
        return self._zeroed(old, unmap=True)
