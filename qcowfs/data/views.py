"""A view: the active disk or one snapshot of an image, read as a raw disk.

Owns how extents become bytes: data file, zeros, inflated clusters, the backing file, and what happens to
damage. Must not know headers, locks or how anything was opened.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from qcowfs.data.backing import GuestReader
from qcowfs.data.guest_data import DataPort, DataRead
from qcowfs.data.in_place import InPlace
from qcowfs.data.inflate import InflatedClusters, Parts
from qcowfs.errors import CorruptImage, SnapshotGone
from qcowfs.geometry import Geometry
from qcowfs.host.waiting import checkpoint
from qcowfs.metadata.epochs import ReadEpochs
from qcowfs.metadata.mapping import COMPRESSED_KIND, DATA, LOST, UNALLOCATED, ZERO_KIND, Extent, Mapping
from qcowfs.metadata.usage import Usage

log = logging.getLogger(__name__)

_ZEROS = memoryview(bytearray(b"\1") * (1 << 20))
_ZEROS[:] = bytes(len(_ZEROS))  # in pages of its own: the kernel takes longer to send the one that all share
_ZEROS = _ZEROS.toreadonly()
_MOST_REPORTS = 10_000
_SEEK_WINDOW = 1 << 30

Inflating = list[tuple[Extent, memoryview]]


class Damage:
    """What is done about lost data: one log line for each place, then an error or zeros."""

    def __init__(self, label: str, *, as_zeros: bool) -> None:
        """Report damage of the image that messages call `label`."""
        self._label = label
        self._as_zeros = as_zeros
        self._reported: set[tuple[int, str]] = set()

    def handle(self, extent: Extent, buffer: memoryview) -> None:
        """Raise `CorruptImage`, or fill the buffer with zeros where the user asked for that."""
        text = (
            f"{self._label}: guest offset {extent.guest_offset:#x}, host offset "
            f"{extent.host_offset:#x}: {extent.damage}"
        )
        place = (extent.host_offset, extent.damage)
        if place not in self._reported and len(self._reported) < _MOST_REPORTS:
            self._reported.add(place)
            log.error("%s; %s", text, "reads as zeros" if self._as_zeros else "reads fail")
        if not self._as_zeros:
            raise CorruptImage(text)
        fill_zeros(buffer)


@dataclass(frozen=True)
class Sources:
    """Where the bytes of an image's views come from."""

    geometry: Geometry
    data: DataPort
    inflated: InflatedClusters
    backing: GuestReader | None
    damage: Damage
    epochs: ReadEpochs = field(default_factory=ReadEpochs)


class ImageView:
    """One raw disk: a mapping, a size in bytes and the sources that it shares with other views."""

    def __init__(self, mapping: Mapping, usage: Usage, size: int, label: str, sources: Sources) -> None:
        """Read `size` bytes through `mapping`."""
        self._usage = usage
        self._gone = False
        self.mapping = mapping
        self.size = size
        self.label = label
        self._sources = sources
        self._data_end = sources.data.facts().size
        self._read_cached = sources.data.read_cached

    def read_now(self, guest: int, buffer: memoryview) -> memoryview | None:
        """The guest's bytes from `guest` on, if they are one run that can be had without waiting.

        They are in the buffer or, for zeros, in a shared read-only one; None means `read_into` has to
        do it. The range must lie within the view's size.
        """
        length = len(buffer)
        if self._gone:
            return None
        host = self.mapping.translate(guest, length)
        if host is None:
            extents = self.mapping.get_extents(guest, length)
            if extents is None or len(extents) != 1:
                return None
            kind, host = extents[0].kind, extents[0].host_offset
            if kind is ZERO_KIND or (kind is UNALLOCATED and self._sources.backing is None):
                return _ZEROS[:length] if length <= len(_ZEROS) else None
            if kind is not DATA:
                return None
        cached = host + length <= self._data_end and self._read_cached(guest, host, buffer)
        return buffer if cached else None

    def in_place(self) -> InPlace | None:
        """Where known clusters may be read past this view, until the next await."""
        descriptor = None if self._gone else self._sources.data.descriptor_now()
        if descriptor is None:
            return None
        return InPlace(self.mapping.places, self._sources.geometry.cluster_bits, descriptor, self.size)

    def is_zero_now(self, guest: int, length: int) -> bool:
        """Whether tables in memory tell that the range reads as zeros, whatever the data file holds."""
        extents = self.mapping.get_extents(guest, min(length, self.size - guest))
        return extents is not None and self._are_zero(extents)

    async def is_zero(self, guest: int, length: int) -> bool:
        """As `is_zero_now`, with tables loaded where they are not in memory, up to the last cluster's end."""
        return self._are_zero(await self._resolve_safely(guest, length))

    def _are_zero(self, extents: list[Extent]) -> bool:
        zero = (ZERO_KIND,) if self._sources.backing is not None else (ZERO_KIND, UNALLOCATED)
        return all(extent.kind in zero for extent in extents)

    async def read_into(self, guest: int, buffer: memoryview) -> None:
        """Fill the buffer with the guest's bytes from `guest` on; zeros beyond the view's size.

        Raises `CorruptImage` for damage, naming image, guest and host offset and the rule, and
        `OSError` as the host does.
        """
        self._refuse_if_gone()
        epoch = self._sources.epochs.enter()
        try:
            await self._read_into(guest, buffer)
        finally:
            self._sources.epochs.leave(epoch)

    async def _read_into(self, guest: int, buffer: memoryview) -> None:
        within = max(0, min(len(buffer), self.size - guest))
        if within < len(buffer):
            fill_zeros(buffer[within:])
            buffer = buffer[:within]
        requests: list[DataRead] = []
        inflating: Inflating = []
        for extent in await self.mapping.resolve(guest, within):
            start = extent.guest_offset - guest
            part = buffer[start : start + extent.length]
            kind = extent.kind
            if kind is DATA:
                self._plan_data(extent, part, requests)
            elif kind is COMPRESSED_KIND:
                self._plan_inflating(extent, part, inflating)
            elif kind is LOST:
                self._sources.damage.handle(extent, part)
            elif kind is UNALLOCATED and self._sources.backing is not None:
                await self._sources.backing.read_into(extent.guest_offset, part)
            else:
                fill_zeros(part)
        if requests:
            await self._sources.data.read_into(requests)
        if inflating:
            await self._inflate(inflating)

    def _plan_data(self, extent: Extent, part: memoryview, requests: list[DataRead]) -> None:
        """Add the request for an extent; what lies past the readable end of the file is damage."""
        host, length = extent.host_offset, extent.length
        if host + length > self._data_end:
            self._data_end = self._sources.data.facts().size
            whole = max(0, self._sources.data.readable_end(self._data_end) - host)
            if whole < length:
                lost = _lost_from(extent, whole, self._data_end, self._sources.geometry)
                self._sources.damage.handle(lost, part[whole:])
                part = part[:whole]
        if len(part):
            requests.append((extent.guest_offset, host, part))

    def _plan_inflating(self, extent: Extent, part: memoryview, inflating: Inflating) -> None:
        """Add a cluster to inflate; of its stored bytes only those that the file holds count."""
        if extent.host_offset + extent.stored > self._data_end:
            self._data_end = self._sources.data.facts().size
            held = self._data_end - extent.host_offset
            if held <= 0:
                lost = _lost_from(extent, 0, self._data_end, self._sources.geometry)
                self._sources.damage.handle(lost, part)
                return
            extent = extent._replace(stored=min(extent.stored, held))
        inflating.append((extent, part))

    async def _inflate(self, inflating: Inflating) -> None:
        wanted: Parts = {}
        for extent, part in inflating:
            start = self._sources.geometry.in_cluster(extent.guest_offset)
            wanted.setdefault((extent.host_offset, extent.stored), []).append((start, part))
        failed = await self._sources.inflated.fill(wanted)
        for extent, part in inflating if failed else ():
            error = failed.get((extent.host_offset, extent.stored))
            if error is not None:
                self._sources.damage.handle(extent._replace(damage=str(error)), part)

    async def find_next(self, guest: int, end: int, *, data: bool) -> int | None:
        """The first offset in `[guest, end)` that holds data, or that reads as zeros; None if none does.

        Data of lower images of the chain counts too; damage counts as data.
        """
        end = min(end, self.size)
        while guest < end:
            window = min(_SEEK_WINDOW, end - guest)
            for extent in await self._resolve_safely(guest, window):
                found = await self._find_in(extent, data=data)
                if found is not None:
                    return found
            guest += window
            await checkpoint()
        return None

    async def _resolve_safely(self, guest: int, length: int) -> list[Extent]:
        """Extents by tables that nobody reuses meanwhile; their data may change at any time."""
        self._refuse_if_gone()
        epoch = self._sources.epochs.enter()
        try:
            return await self.mapping.resolve(guest, length)
        finally:
            self._sources.epochs.leave(epoch)

    def _refuse_if_gone(self) -> None:
        if self._gone:
            raise SnapshotGone(f"{self.label}: was deleted")

    def follow(self, successor: ImageView) -> None:
        """Read what `successor` reads from now on; reads under way end as they began."""
        self._usage, self.mapping, self.size = successor._usage, successor.mapping, successor.size

    def end(self) -> None:
        """Fail every later read, since the clusters may be used for something else."""
        self._gone = True

    async def _find_in(self, extent: Extent, *, data: bool) -> int | None:
        start, end = extent.guest_offset, extent.guest_offset + extent.length
        backing = self._sources.backing
        if extent.kind is not UNALLOCATED or backing is None:
            return None if self._are_zero([extent]) is data else start
        below = min(end, backing.size)
        found = await backing.find_next(start, below, data=data) if start < below else None
        if found is None and not data and below < end:
            return max(start, below)
        return found

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster, the unit in which the disk takes space."""
        return self._sources.geometry.cluster_size

    @property
    def counts_quickly(self) -> bool:
        """Whether `allocated_bytes` takes no longer than a user would wait for a status call."""
        return self._usage.is_small

    async def allocated_bytes(self) -> int:
        """How many bytes of the disk take space: this image's clusters, and the chain's at most."""
        own = await self._usage.allocated_bytes()
        backing = self._sources.backing
        if backing is None:
            return own
        below = min(await backing.allocated_bytes(), self.size, backing.size)
        return min(self.size, own + below)

    def close(self) -> None:
        """Nothing: the image that made the view owns its files."""


def fill_zeros(buffer: memoryview) -> None:
    """Overwrite the whole buffer with zeros."""
    for start in range(0, len(buffer), len(_ZEROS)):
        part = buffer[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


def _lost_from(extent: Extent, start: int, end: int, geometry: Geometry) -> Extent:
    """What of an extent lies past the end of the file, told by the cluster that it begins in."""
    within = geometry.in_cluster(extent.guest_offset + start)
    return extent._replace(
        kind=LOST,
        guest_offset=extent.guest_offset + start - within,
        host_offset=extent.host_offset + start - within * (extent.kind is DATA),
        length=extent.length - start,
        damage=f"the cluster lies past the end of the file ({end} bytes)",
    )
