"""How much space an image would take, as `qemu-img measure` tells.

Owns what is counted. Must not know how the answer is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcowfs.creation.form import Creation
from qcowfs.creation.layout import Layout
from qcowfs.disk.disks import Disk
from qcowfs.disk.extents import disk_extents
from qcowfs.disk.image import Image
from qcowfs.format import extensions as ext
from qcowfs.format.bitmaps import BitmapDirectory, unpack_directory
from qcowfs.geometry import TABLE_ENTRY_SIZE, Geometry


@dataclass(frozen=True)
class Measure:
    """Bytes of host files: what the data of now needs, what a full disk needs, and bitmaps beside that.

    `bitmaps` is None where the source can have none.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None

    def record(self) -> dict[str, int]:
        """The figures under the keys of `qemu-img measure --output=json`."""
        record = {"required": self.required, "fully-allocated": self.fully_allocated}
        return record if self.bitmaps is None else {"bitmaps": self.bitmaps} | record


def measure_raw(size: int) -> Measure:
    """A raw file of `size` bytes."""
    return Measure(size, size)


def measure_empty(form: Creation, size: int) -> Measure:
    """A new image of that form whose disk has `size` bytes; raises `UsageError` if it cannot have."""
    form.check_size(size)
    full = Layout.plan(form.geometry, size, tables=True, data=True, luks_clusters=form.luks_clusters).end
    data = form.geometry.cluster_round_up(size)
    return Measure(full if form.preallocation in ("falloc", "full") else full - data, full)


async def measure_copy(form: Creation, disk: Disk) -> Measure:
    """An image of that form with the content of a disk; what reads as zeros needs nothing.

    Raises `OSError` as the host does.
    """
    empty = measure_empty(form, disk.size)
    required = empty.required
    if required < empty.fully_allocated:
        required += await _data_bytes(disk, form.geometry)
    return Measure(required, empty.fully_allocated, await _bitmap_bytes(disk, form.geometry))


async def _data_bytes(disk: Disk, geometry: Geometry) -> int:
    """Bytes of the clusters that hold any data of the disk."""
    total = end = 0
    async for extent in disk_extents(disk):
        if extent.zero or not extent.present:
            continue
        start = max(geometry.cluster_start(extent.start), end)
        end = max(geometry.cluster_round_up(extent.start + extent.length), end)
        total += end - start
    return total


async def _bitmap_bytes(disk: Disk, geometry: Geometry) -> int | None:
    """What the source's persistent bitmaps would take beside the rest."""
    image = disk.image
    if image is None or image.header.version < 3:
        return None
    extension = image.header.extension(ext.BITMAPS)
    if extension is None:
        return 0
    directory = BitmapDirectory.unpack(extension)
    total = geometry.cluster_round_up(directory.size)
    for granularity in await _granularities(image, directory):
        clusters = geometry.clusters_for(-(-disk.size // (8 * granularity)))
        total += geometry.cluster_round_up(clusters * TABLE_ENTRY_SIZE) + clusters * geometry.cluster_size
    return total


async def _granularities(image: Image, directory: BitmapDirectory) -> list[int]:
    data = bytearray(directory.size)
    await image.file.read_into([(directory.offset, memoryview(data))])
    return [entry.granularity for entry in unpack_directory(bytes(data), directory.count)]
