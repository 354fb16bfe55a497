"""Reading a disk's layers past the engine: whole runs, in worker threads.

Owns which extents can be read so, and inflating many clusters in a row. Must not know what the bytes are for.
What looks wrong is left to the engine, which says what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcowfs.codecs.compression import inflater
from qcowfs.data.backing import GuestReader, RawBacking
from qcowfs.data.views import ImageView
from qcowfs.disk.disks import Disk
from qcowfs.disk.extents import DiskExtent
from qcowfs.disk.image import Image
from qcowfs.errors import CorruptImage
from qcowfs.geometry import GuestOffset, HostOffset
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.waiting import run_in_loop
from qcowfs.metadata.mapping import COMPRESSED_KIND, Extent

_DENSEST = 2
"""How much longer than the stored bytes a range may be for one read to fetch them all."""


@dataclass(frozen=True)
class Layer:
    """One image of a chain: the file that its extents' offsets point into and, for qcow2, the view of it."""

    file: OsHostFile
    view: ImageView | None = None
    compression_type: int = 0

    def holds(self, extent: DiskExtent) -> bool:
        """Whether `read_data` can read the whole extent."""
        if extent.offset is None or extent.damage or extent.zero or not extent.data:
            return False
        return self.view is None or extent.offset + extent.length <= self.file.facts().size

    def read_compressed(self, guest: GuestOffset, buffer: memoryview) -> bool:
        """Inflate compressed clusters into the buffer; False where the engine has to be asked instead."""
        if self.view is None:
            return False
        extents = run_in_loop(self.view.mapping.resolve, guest, len(buffer))
        if any(extent.kind is not COMPRESSED_KIND for extent in extents):
            return False
        inflate, size = inflater(self.compression_type), self.view.cluster_size
        start, stored = self._read_stored(extents)
        try:
            for extent in extents:
                place = extent.host_offset - start
                cluster = inflate(stored[place : place + extent.stored], size)
                skipped, at = extent.guest_offset % size, extent.guest_offset - guest
                buffer[at : at + extent.length] = cluster[skipped : skipped + extent.length]
        except CorruptImage:
            return False
        return True

    def _read_stored(self, extents: list[Extent]) -> tuple[HostOffset, memoryview]:
        """The stored bytes of clusters, and the host offset of the first of them."""
        start = min(extent.host_offset for extent in extents)
        end = min(max(e.host_offset + e.stored for e in extents), self.file.facts().size)
        stored = memoryview(bytearray(max(0, end - start)))
        if len(stored) <= _DENSEST * sum(extent.stored for extent in extents):
            self.file.read_here(start, stored)
        else:
            for extent in extents:
                place = extent.host_offset - start
                self.file.read_here(extent.host_offset, stored[place : place + extent.stored])
        return start, stored


def layers_of(disk: Disk) -> list[Layer | None]:
    """The layers of a disk by depth; None where one cannot be read directly."""
    layers: list[Layer | None] = []
    reader: GuestReader | ImageView | None = disk.image or disk.reader
    while isinstance(reader, Image):
        view = disk.view if not layers and disk.view is not None else reader.active
        file = reader.data_file
        kind = reader.header.compression_type
        if isinstance(file, OsHostFile) and not reader.header.crypt_method:
            layers.append(Layer(file, view, kind))
        else:
            layers.append(None)
        reader = reader.backing
    if isinstance(reader, RawBacking):
        layers.append(Layer(reader.file) if isinstance(reader.file, OsHostFile) else None)
    return layers
