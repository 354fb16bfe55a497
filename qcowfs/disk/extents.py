"""Where the bytes of a disk lie, through all its layers: what `qemu-img map` tells.

Owns how the layers of a backing chain are laid over each other, and the keys of the record. Must not know how
it is shown.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from qcowfs.data.backing import GuestReader, RawBacking
from qcowfs.data.views import ImageView
from qcowfs.disk.disks import Disk
from qcowfs.disk.image import Image
from qcowfs.format.entries import REFCOUNT_TABLE_OFFSET_MASK
from qcowfs.format.words import TABLE_WORDS, Words
from qcowfs.geometry import SECTOR_SIZE
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.mapping import COMPRESSED_KIND, DATA, LOST, UNALLOCATED, ZERO_KIND
from qcowfs.metadata.runs import Run
from qcowfs.metadata.tables import TableWalk

Report = Callable[[int, int], None]
"""Called with the bytes that are done, and all there are."""


@dataclass(frozen=True)
class DiskExtent:
    """A run of a disk's bytes; `start`, `length` and `offset` are in bytes.

    `depth` is the layer that decides: 0 the image, 1 its backing file, and so on. `present` is whether that
    layer has the bytes or their absence written down, `zero` whether they read as zeros, `data` whether
    they are stored. `offset` is where in the layer's file, or None. `shared` clusters belong to a snapshot
    as well, `stored` is what compressed ones take at most, `damage` says why they cannot be read.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool = False
    offset: int | None = None
    shared: bool = False
    stored: int = 0
    damage: str = ""

    def record(self) -> dict[str, Any]:
        """The extent under the keys of `qemu-img map --output=json`, and `damage` where there is some."""
        record: dict[str, Any] = {
            "start": self.start, "length": self.length, "depth": self.depth, "present": self.present,
            "zero": self.zero, "data": self.data, "compressed": self.compressed,
        }  # fmt: skip
        if self.offset is not None:
            record["offset"] = self.offset
        if self.damage:
            record["damage"] = self.damage
        return record

    def continues(self, last: DiskExtent) -> bool:
        """Whether the extent is of the last one's kind and lies right behind it."""
        expected = None if last.offset is None else last.offset + last.length
        return self._kind == last._kind and self.offset == expected

    @property
    def _kind(self) -> tuple[object, ...]:
        return (self.depth, self.present, self.zero, self.data, self.compressed, self.shared, self.damage)


async def disk_extents(
    disk: Disk, start: int = 0, end: int | None = None, *, sharing: bool = False,
    report: Report | None = None,
) -> AsyncIterator[DiskExtent]:  # fmt: skip
    """The extents of a disk from `start` to `end` (its own end by default), without gaps, merged.

    With `sharing` an extent ends where `shared` changes, else that is not told. `report` hears the bytes of
    the range that are done, and all there are. Raises `OSError` as the
    host does; damage is told in the extent.
    """
    layers = await _layers(disk)
    size = -(-disk.size // SECTOR_SIZE) * SECTOR_SIZE
    end = size if end is None else min(end, size)
    last: DiskExtent | None = None
    async for extent in _over(layers, 0, start, end):
        if report is not None:
            report(extent.start + extent.length - start, end - start)
        found = extent if sharing else replace(extent, shared=False)
        if last is not None and found.continues(last):
            last = replace(last, length=last.length + found.length, stored=last.stored + found.stored)
            continue
        if last is not None:
            yield last
        last = found
    if last is not None:
        yield last


@dataclass
class _TableLayer:
    """A qcow2 image of the chain."""

    size: int
    file: HostFile
    walk: TableWalk
    view: ImageView
    has_holes: bool
    encrypted: bool


@dataclass
class _RawLayer:
    """A raw file at the bottom of the chain."""

    size: int
    file: HostFile


_Layer = _TableLayer | _RawLayer


async def _layers(disk: Disk) -> list[_Layer]:
    """The disk's own image first, then what it stands on."""
    layers: list[_Layer] = []
    reader: GuestReader | ImageView | None = disk.image or disk.reader
    while isinstance(reader, Image):
        view = disk.view if not layers and disk.view is not None else reader.active
        walk = TableWalk(reader.file, reader.header, *view.mapping.l1_table)
        holes, encrypted = await _looks_preallocated(reader), bool(reader.header.crypt_method)
        layers.append(_TableLayer(view.size, reader.data_file, walk, view, holes, encrypted))
        reader = reader.backing
    if isinstance(reader, RawBacking):
        layers.append(_RawLayer(-(-reader.size // SECTOR_SIZE) * SECTOR_SIZE, reader.file))
    return layers


async def _over(layers: list[_Layer], depth: int, start: int, end: int) -> AsyncIterator[DiskExtent]:
    """The extents of a range from the layer `depth` down."""
    layer = layers[depth]
    if isinstance(layer, _RawLayer):
        for extent in await _of_raw(layer.file, depth, start, end, start):
            yield extent
        return
    async for run in layer.walk.runs(start, end):
        if run.kind is not UNALLOCATED:
            for extent in await _of_run(layer, depth, run):
                yield extent
            continue
        stop = run.guest
        if depth + 1 < len(layers) and layers[depth + 1].size > run.guest:
            stop = min(run.guest + run.length, layers[depth + 1].size)
            async for extent in _over(layers, depth + 1, run.guest, stop):
                yield extent
        if stop < run.guest + run.length:
            yield _nothing(run, depth, stop)


def _nothing(run: Run, depth: int, start: int) -> DiskExtent:
    """The part of an unallocated run below which there is nothing either."""
    offset = None if run.host is None else run.host + start - run.guest
    length = run.guest + run.length - start
    return DiskExtent(start, length, depth, present=False, zero=True, data=False, offset=offset)


async def _of_run(layer: _TableLayer, depth: int, run: Run) -> list[DiskExtent]:
    """What a run that a layer has itself is."""
    zero, compressed = run.kind is ZERO_KIND, run.kind is COMPRESSED_KIND
    if run.kind is DATA and layer.has_holes and run.host is not None and not layer.encrypted:
        pieces = await _of_raw(layer.file, depth, run.host, run.host + run.length, run.guest)
        return [replace(piece, data=True, shared=run.shared) for piece in pieces]
    damage = ""
    if run.kind is LOST:
        damage = (await layer.view.mapping.resolve(run.guest, run.length))[0].damage or "cannot be read"
    return [
        DiskExtent(
            run.guest, run.length, depth, present=True, zero=zero, data=not zero and not damage,
            compressed=compressed, offset=None if layer.encrypted else run.host, shared=run.shared,
            stored=run.stored, damage=damage,
        )
    ]  # fmt: skip


async def _of_raw(file: HostFile, depth: int, host: int, end: int, guest: int) -> list[DiskExtent]:
    """A range of a file, by the holes that the host knows; it stands for guest bytes from `guest` on."""
    return [
        DiskExtent(
            low + guest - host, high - low, depth, present=True, zero=not is_data, data=is_data, offset=low
        )
        for low, high, is_data in await file.data_and_holes(host, end)
    ]


async def _looks_preallocated(image: Image) -> bool:
    """Whether the file takes so much less space than its clusters would that there must be holes in data."""
    geometry = image.geometry
    facts = image.file.facts()
    held = facts.allocated // geometry.cluster_size
    most = max(held * 10 // 9, held + 2)
    return await _counted(image, geometry.clusters_for(facts.size)) >= most


async def _counted(image: Image, clusters: int) -> int:
    """How many of the file's first clusters are in use by their refcounts."""
    header, geometry = image.header, image.geometry
    table = bytearray(header.refcount_table_clusters * geometry.cluster_size)
    await image.file.read_into([(header.refcount_table_offset, memoryview(table))])
    words, per_block, count = Words(1 << header.refcount_order), geometry.refcounts_per_block, 0
    needed = -(-clusters // per_block)
    for index, entry in enumerate(TABLE_WORDS.unpack(bytes(table))[:needed]):
        offset = entry & REFCOUNT_TABLE_OFFSET_MASK
        if 0 < offset < image.file.facts().size:
            block = bytearray(geometry.cluster_size)
            await image.file.read_into([(offset, memoryview(block))])
            values = words.unpack(bytes(block))[: clusters - index * per_block]
            count += len(values) - values.count(0)
    return count
