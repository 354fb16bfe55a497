"""Writing to the live disk: in place where a cluster is this disk's own, else to a copy of it.

Owns how guest bytes find their clusters and copy-on-write of every kind of cluster. Must
not know FUSE, nor when metadata reaches the disk. New data is written before the entry that names it is set.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from qcowfs.data.cluster_locks import ClusterLocks
from qcowfs.data.guest_data import DataPort, DataWrite
from qcowfs.data.in_place import InPlace
from qcowfs.data.views import ImageView
from qcowfs.errors import MetadataOverlap
from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, subcluster_bitmaps
from qcowfs.geometry import SUBCLUSTERS, Geometry, GuestOffset, HostOffset
from qcowfs.metadata.epochs import ReadEpochs
from qcowfs.metadata.flush import Flusher
from qcowfs.metadata.linking import Entry, Linker
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.metadata.places import Places
from qcowfs.metadata.refcounts import Refcounts

MOST_DIRTY_BYTES = 8 << 20
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1


@dataclass(frozen=True)
class Target:
    """Where a writer puts things, and whom it tells."""

    geometry: Geometry
    data: DataPort
    external: bool
    zero_flag: bool
    has_backing: bool
    refcounts: Refcounts
    flusher: Flusher
    metadata: MetadataMap
    epochs: ReadEpochs


@dataclass(frozen=True)
class Place:
    """A run of host clusters for a run of guest clusters; `fresh` ones read as zeros so far."""

    host: HostOffset
    clusters: int
    fresh: bool


class Writer:
    """Changes the content of an image's live disk."""

    def __init__(self, view: ImageView, linker: Linker, target: Target, locks: ClusterLocks) -> None:
        """Write to what `view` reads, linking clusters by `linker`."""
        self._view = view
        self._linker = linker
        self._to = target
        self._geometry = target.geometry
        self._locks = locks
        self._places = Places(self._look_up)
        self.linked = 0
        """Guest clusters that got a host cluster, less those that lost theirs."""

    def write_now(self, guest: GuestOffset, data: bytes | memoryview) -> bool:
        """Write bytes that lie in one cluster, our own or a new one, if that takes no waiting.

        Whether it was done. Raises `OSError` as the host does.
        """
        cluster = guest >> self._geometry.cluster_bits
        within = guest & (self._geometry.cluster_size - 1)
        if within + len(data) > self._geometry.cluster_size:
            return False
        start = self._places.known.get(cluster)
        if start is None:
            if self._linker.is_unallocated(guest):
                return self._write_new_now(guest, data)
            start = self._places.find(cluster)
        if start is None:
            return False
        self._to.flusher.note_write()
        return self._to.data.write_now(guest, start + within, data)

    def _write_new_now(self, guest: GuestOffset, data: bytes | memoryview) -> bool:
        """Write to a new cluster behind the end of the file, if nothing else need be written with it."""
        to, cluster = self._to, guest >> self._geometry.cluster_bits
        if to.has_backing or to.external or to.data.encrypted or not self._locks.is_free(cluster):
            return False
        if to.flusher.dirty_bytes > MOST_DIRTY_BYTES:
            return False
        facts = to.data.facts()
        host = to.refcounts.next_fresh(facts.size) if facts.regular else None
        if host is None or not to.data.write_now(guest, host + self._geometry.in_cluster(guest), data):
            return False
        to.refcounts.take_next()
        to.flusher.note_write()
        self._linker.link_run(guest, host, 1)
        self.linked += 1
        self._places.note(cluster, host)
        return True

    def in_place(self) -> InPlace | None:
        """Where clusters of our own may be overwritten past this writer, until the next await."""
        descriptor = self._to.data.descriptor_now()
        if descriptor is None:
            return None
        return InPlace(self._places.known, self._geometry.cluster_bits, descriptor, self._view.size)

    def note_written(self, where: range, length: int) -> None:
        """Note that so many bytes were overwritten in place, in a range of the data file."""
        self._to.flusher.note_write()
        self._to.data.note_written(where, length)

    async def write(self, guest: GuestOffset, data: memoryview) -> None:
        """Write bytes; the range must lie within the disk.

        Raises `MetadataOverlap` before a write that would land on metadata, `CorruptImage` where the
        image contradicts itself, `OSError` as the host does; then any part may have been written.
        """
        end = guest + len(data)
        pos = guest
        while pos < end:
            part = data[pos - guest :]
            pos += await self._write_in_place(pos, part) or await self._write_elsewhere(pos, part)
        if self._to.flusher.dirty_bytes > MOST_DIRTY_BYTES:
            await self._to.flusher.flush()

    # -- in place

    async def _write_in_place(self, guest: GuestOffset, data: memoryview) -> int:
        """Write the first bytes that lie in clusters of our own; how many that were."""
        size = self._geometry.cluster_size
        start = self._own_cluster(guest)
        if start is None:
            return 0
        length = size - self._geometry.in_cluster(guest)
        while length < len(data) and self._own_cluster(guest + length) == start + length + (
            self._geometry.in_cluster(guest)
        ):
            length += size
        part = data[:length]
        epoch = self._to.epochs.enter()  # nobody may reuse the cluster meanwhile
        try:
            await self._store([(guest, start + self._geometry.in_cluster(guest), part)])
        finally:
            self._to.epochs.leave(epoch)
        return len(part)

    def _own_cluster(self, guest: GuestOffset) -> HostOffset | None:
        """Where the guest offset's cluster starts, if it may be written in place; never waits."""
        return self._places.find(guest >> self._geometry.cluster_bits)

    def _look_up(self, cluster: int) -> HostOffset | None:
        guest = cluster << self._geometry.cluster_bits
        entry = self._linker.find(guest)
        if not self._locks.is_free(cluster) or entry is None:
            return None
        start = entry.word & OFFSET_MASK
        whole = not self._geometry.extended_l2 or entry.bitmap == ALL_SUBCLUSTERS
        zero = entry.word & ZERO and not self._geometry.extended_l2
        if not entry.word & COPIED or entry.word & COMPRESSED or zero or not whole:
            return None
        if not self._is_sound(guest, start):
            return None
        return start

    def _refuse_unsound(self, guest: GuestOffset, entry: Entry) -> None:
        start = entry.word & OFFSET_MASK
        if not self._is_sound(guest, start):
            raise MetadataOverlap(f"guest offset {guest:#x}, host offset {start:#x}: metadata, or unaligned")

    def _is_sound(self, guest: GuestOffset, start: HostOffset) -> bool:
        if self._to.external:
            return start == self._geometry.cluster_start(guest)
        return (
            bool(start)
            and self._geometry.is_cluster_aligned(start)
            and not (self._to.metadata.overlaps(start, 1))
        )

    # -- elsewhere

    async def _write_elsewhere(self, guest: GuestOffset, data: memoryview) -> int:
        """Write the first bytes to clusters that get a new entry; how many that were."""
        geometry = self._geometry
        end = min(guest + len(data), geometry.slice_end(guest))
        clusters = range(guest >> geometry.cluster_bits, ((end - 1) >> geometry.cluster_bits) + 1)
        await self._locks.hold(clusters)
        try:
            return await self._write_held(guest, data[: end - guest], len(clusters))
        finally:
            self._locks.release(clusters)

    async def _write_held(self, guest: GuestOffset, data: memoryview, most: int) -> int:
        """Write to the first clusters of one kind; nobody else changes their entries meanwhile."""
        await self._linker.ensure_table(guest)
        count = self._linker.count_unallocated(guest, most)
        if count:
            return await self._write_unallocated(guest, data, count)
        count = self._count_to_link(guest, most)
        if not count:
            self._refuse_unsound(guest, self._entry(guest, 0))
            return 0
        old = [self._entry(guest, n) for n in range(count)]
        if self._is_partial_kind(old[0]) or self._reuses(old[0]):
            return await self._write_into_own(guest, data, old[0])
        return await self._write_into_new(guest, data, old)

    async def _write_unallocated(self, guest: GuestOffset, data: memoryview, most: int) -> int:
        """Write to new clusters where the guest had none: the commonest case by far."""
        place = await self._allocate(guest, most)
        length = min(
            len(data), place.clusters * self._geometry.cluster_size - self._geometry.in_cluster(guest)
        )
        try:
            if place.fresh and not self._to.has_backing:
                at = place.host + self._geometry.in_cluster(guest)
                await self._store([(guest, at, data[:length])])
            else:
                await self._fill(guest, data[:length], place, self._geometry.cluster_size)
            await self._linker.ensure_table(guest)
        except BaseException:
            await self._release(place)
            raise
        self._linker.link_run(guest, place.host, place.clusters)
        self.linked += place.clusters
        first = guest >> self._geometry.cluster_bits
        for number in range(place.clusters):
            self._places.note(first + number, place.host + number * self._geometry.cluster_size)
        return length

    async def _release(self, place: Place) -> None:
        """Take an allocation back since what should use it has failed."""
        if not self._to.external:
            with trio.CancelScope(shield=True):
                await self._to.refcounts.release(place.host, place.clusters)

    def _entry(self, guest: GuestOffset, number: int) -> Entry:
        return self._linker.get(guest + number * self._geometry.cluster_size)

    def _count_to_link(self, guest: GuestOffset, most: int) -> int:
        """How many clusters from the guest offset's on need a new entry of one kind."""
        first = self._entry(guest, 0)
        if self._is_own_data(first):
            return 0
        if self._is_partial_kind(first) or self._reuses(first):
            return 1
        count = 1
        while count < most:
            entry = self._entry(guest, count)
            if self._is_own_data(entry) or self._is_partial_kind(entry) or self._reuses(entry):
                break
            count += 1
        return count

    def _is_own_data(self, entry: Entry) -> bool:
        if not entry.word & COPIED or entry.word & COMPRESSED:
            return False
        return entry.bitmap == ALL_SUBCLUSTERS if self._geometry.extended_l2 else not entry.word & ZERO

    def _reuses(self, entry: Entry) -> bool:
        """Whether a zero cluster has a host cluster of its own to write to."""
        return bool(entry.word & COPIED and entry.word & ZERO) and not self._geometry.extended_l2

    def _is_partial_kind(self, entry: Entry) -> bool:
        """Whether an extended entry has a host cluster of its own, not all of it in use."""
        own = bool(entry.word & COPIED) and not entry.word & COMPRESSED
        return self._geometry.extended_l2 and own and entry.bitmap != ALL_SUBCLUSTERS

    async def _write_into_own(self, guest: GuestOffset, data: memoryview, old: Entry) -> int:
        """Write to the unused host cluster, or subclusters, that the entry already has."""
        start = old.word & OFFSET_MASK
        length = min(len(data), self._geometry.cluster_size - self._geometry.in_cluster(guest))
        self._refuse_unsound(guest, old)
        place = Place(start, 1, fresh=False)
        unit = self._geometry.subcluster_size if self._geometry.extended_l2 else self._geometry.cluster_size
        await self._fill(guest, data[:length], place, unit)
        await self._linker.ensure_table(guest)
        bitmap = self._bitmap_after(old, guest, length)
        self.link(guest, Entry(start | COPIED, bitmap))
        return length

    async def _write_into_new(self, guest: GuestOffset, data: memoryview, old: list[Entry]) -> int:
        """Write to newly allocated clusters and drop what the entries named before."""
        geometry = self._geometry
        place = await self._allocate(guest, len(old))
        length = min(len(data), place.clusters * geometry.cluster_size - geometry.in_cluster(guest))
        unit = self._unit(old[: place.clusters])
        try:
            await self._fill(guest, data[:length], place, unit)
            await self._linker.ensure_table(guest)
        except BaseException:
            await self._release(place)
            raise
        first = geometry.cluster_start(guest)
        for number in range(place.clusters):
            at = first + number * geometry.cluster_size
            covered = self._covered(guest, length, at, unit)
            bitmap = self._bitmap_after(old[number], *covered) if geometry.extended_l2 else 0
            self.link(at, Entry((place.host + at - first) | COPIED, bitmap))
            self.drop(old[number])
        return length

    def _unit(self, old: list[Entry]) -> int:
        """What is filled around the data: a subcluster where nothing has to be copied, else the cluster."""
        if not self._geometry.extended_l2:
            return self._geometry.cluster_size
        must_copy = any(entry.word & (COMPRESSED | OFFSET_MASK) for entry in old)
        return self._geometry.cluster_size if must_copy else self._geometry.subcluster_size

    def _covered(self, guest: int, length: int, at: int, unit: int) -> tuple[int, int]:
        """(guest offset, length) of what is written in the cluster at `at`, rounded out to units."""
        start = max(guest // unit * unit, at)
        end = min(-(-(guest + length) // unit) * unit, at + self._geometry.cluster_size)
        return start, end - start

    def _bitmap_after(self, old: Entry, guest: GuestOffset, length: int) -> int:
        """The subcluster bitmap once the range is allocated, keeping what the rest was."""
        if not self._geometry.extended_l2:
            return 0
        size = self._geometry.subcluster_size
        first = self._geometry.in_cluster(guest) // size
        last = self._geometry.in_cluster(guest + length - 1) // size
        touched = ((1 << (last - first + 1)) - 1) << first
        allocated, zeros = subcluster_bitmaps(0 if old.word & COMPRESSED else old.bitmap)
        return (allocated | touched) | (zeros & ~touched) << SUBCLUSTERS

    async def _allocate(self, guest: GuestOffset, most: int) -> Place:
        if self._to.external:
            return Place(self._geometry.cluster_start(guest), most, fresh=False)
        facts = self._to.data.facts()
        host, count = await self._to.refcounts.allocate(most)
        fresh = facts.regular and host >= facts.size and not self._to.data.encrypted
        return Place(host, count, fresh)

    async def _fill(self, guest: GuestOffset, data: memoryview, place: Place, unit: int) -> None:
        """Write the data, and around it what the guest had there up to whole units."""
        geometry = self._geometry
        host = place.host + geometry.in_cluster(guest)
        head = guest % unit
        tail = -(guest + len(data)) % unit
        requests: list[DataWrite] = []
        before = await self._old_bytes(guest - head, head, place)
        after = await self._old_bytes(guest + len(data), tail, place)
        if before is not None:
            requests.append((guest - head, host - head, before))
        requests.append((guest, host, data))
        if after is not None:
            requests.append((guest + len(data), host + len(data), after))
        await self._store(requests)

    async def _store(self, requests: list[DataWrite]) -> None:
        """Write to the data file; noted when it has ended, since a sync before that is not enough."""
        try:
            await self._to.data.write_from(requests)
        finally:
            self._to.flusher.note_write()

    async def _old_bytes(self, guest: GuestOffset, length: int, place: Place) -> bytearray | None:
        """What the guest has there; None if nothing need be written since it is zeros anyway."""
        if not length or (place.fresh and self._view.is_zero_now(guest, length)):
            return None
        buffer = bytearray(length)
        await self._view.read_into(guest, memoryview(buffer))
        return buffer

    async def reads_as_zeros(self, guest: GuestOffset, length: int) -> bool:
        """Whether the tables tell that the range reads as zeros, whatever the data file holds."""
        return await self._view.is_zero(guest, length)

    def link(self, guest: GuestOffset, entry: Entry) -> None:
        """Set a cluster's entry; its table must be ensured."""
        self._places.forget(guest >> self._geometry.cluster_bits)
        old = self._linker.get(guest)
        self.linked += bool(self._linker.clusters_of(entry)) - bool(self._linker.clusters_of(old))
        self._linker.set(guest, entry)

    def drop(self, old: Entry) -> None:
        """Free what an entry named, once the disk no longer does."""
        if not self._to.external:
            self._to.flusher.drop(self._linker.clusters_of(old))
