"""A new image that is written in one pass: clusters get their places in the order in which they come.

Owns where everything goes and the tables that say so. Must not know files or where the content comes from.
Data and L2 tables follow the header and the LUKS area as they come; L1 table and refcounts come last, when
all is known.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

from qcowfs.copying.bitmaps import BitmapCopy
from qcowfs.creation.form import Creation
from qcowfs.creation.layout import plan_refcounts
from qcowfs.errors import UsageError
from qcowfs.format import extensions as ext
from qcowfs.format.bitmaps import BitmapDirectory, BitmapEntry
from qcowfs.format.entries import COMPRESSED, COPIED, ZERO
from qcowfs.format.extensions import Extension
from qcowfs.format.features import Autoclear
from qcowfs.format.words import TABLE_WORDS, Words
from qcowfs.geometry import TABLE_ENTRY_SIZE, GuestOffset, HostOffset

Write = tuple[HostOffset, bytes]
_ALL_ALLOCATED = 0xFFFF_FFFF
_ALL_ZERO = _ALL_ALLOCATED << 32
_MOST_COUNTED = 0xFFFF


class FreshImage:
    """The tables of a new image while its content comes in, in the order of guest offsets."""

    def __init__(self, form: Creation, size: int, bitmaps: Sequence[BitmapCopy] = ()) -> None:
        """An image with such a disk and bitmaps; raises `UsageError` if it cannot have them."""
        self.form = form
        self.size = size
        self.geometry = form.geometry
        if bitmaps and form.version < 3:
            raise UsageError("--bitmaps: version 2 images have none; use compat=v3")
        self._bitmaps = bitmaps
        place = BitmapDirectory(len(bitmaps), 0, 0)
        self._header = form.header(size, *([Extension(ext.BITMAPS, place.pack())] if bitmaps else []))
        self._words = self.geometry.l2_entry_size // TABLE_ENTRY_SIZE
        self._l1 = array("Q", [0]) * self.geometry.l1_entries_for(size)
        self._table: tuple[int, array[int]] | None = None
        # of every cluster up to the end; the first are the header's and the LUKS area's
        self._counts = array("H", [1]) * (1 + form.luks_clusters)
        self._most = min(Words(1 << self.geometry.refcount_order).maximum, _MOST_COUNTED)
        self._open: tuple[HostOffset, HostOffset] = (0, 0)
        self._writes: list[Write] = []

    @property
    def end(self) -> HostOffset:
        """Bytes of the image so far, in whole clusters."""
        return len(self._counts) * self.geometry.cluster_size

    def place_data(self, guest: GuestOffset, length: int) -> HostOffset:
        """Where a run of guest clusters goes as it is; `length` is in whole clusters."""
        size = self.geometry.cluster_size
        host = guest if self.form.data_file is not None else self._take(length // size)
        place, position, end = host, guest, guest + length
        while position < end:
            stop = min(end, self.geometry.l2_coverage_end(position))
            first = place | COPIED
            entries = array("Q", range(first, first + stop - position, size))
            self._set(position, entries, _ALL_ALLOCATED)
            place += stop - position
            position = stop
        return host

    def place_zeros(self, guest: GuestOffset, length: int) -> None:
        """Let a run of whole guest clusters read as zeros whatever the backing file has there."""
        size, position, end = self.geometry.cluster_size, guest, guest + length
        word, bitmap = (0, _ALL_ZERO) if self.geometry.extended_l2 else (ZERO, 0)
        while position < end:
            stop = min(end, self.geometry.l2_coverage_end(position))
            self._set(position, array("Q", [word]) * ((stop - position) // size), bitmap)
            position = stop

    def place_compressed(self, guest: GuestOffset, length: int) -> HostOffset:
        """Where a compressed cluster of that many bytes goes, close behind the last one."""
        host = self._take_bytes(length)
        descriptor = COMPRESSED | self.geometry.compressed_descriptor(host, length)
        self._set(guest, array("Q", [descriptor]), 0)
        return host

    def take_writes(self) -> list[Write]:
        """The tables that are complete and were not taken before."""
        writes, self._writes = self._writes, []
        return writes

    def finish(self) -> list[Write]:
        """All that remains to be written, the header last; `end` is final then."""
        self._finish_table()
        if self._bitmaps:
            self._place_bitmaps()
        geometry = self.geometry
        l1_table = self._take(geometry.clusters_for(len(self._l1) * TABLE_ENTRY_SIZE))
        plan = plan_refcounts(geometry, len(self._counts))
        table = self._take(plan.table_clusters)
        blocks = self._take(plan.blocks)
        header = replace(
            self._header,
            l1_table_offset=l1_table,
            refcount_table_offset=table,
            refcount_table_clusters=plan.table_clusters,
        )
        size = geometry.cluster_size
        self._writes.append((l1_table, TABLE_WORDS.pack(self._l1)))
        entries = array("Q", range(blocks, blocks + plan.blocks * size, size))
        self._writes.append((table, TABLE_WORDS.pack(entries)))
        self._writes += [(blocks + index * size, self._block(index)) for index in range(plan.blocks)]
        self._writes.append((0, header.pack()))
        return self.take_writes()

    def _place_bitmaps(self) -> None:
        """The bits, tables and directory of all bitmaps, and the header that names them."""
        size, directory = self.geometry.cluster_size, b""
        for bitmap in self._bitmaps:
            table = array("Q", [0]) * bitmap.clusters
            for index, bits in sorted(bitmap.bits.items()):
                table[index] = self._take(1)
                self._writes.append((table[index], bytes(bits)))
            place = self._take(-(-len(table) * TABLE_ENTRY_SIZE // size))
            self._writes.append((place, TABLE_WORDS.pack(table)))
            entry = BitmapEntry(place, len(table), bitmap.flags, bitmap.granularity, bitmap.name)
            directory += entry.pack()
        start = self._take(self.geometry.clusters_for(len(directory)))
        self._writes.append((start, directory))
        data = BitmapDirectory(len(self._bitmaps), len(directory), start).pack()
        named = [Extension(e.kind, data) if e.kind == ext.BITMAPS else e for e in self._header.extensions]
        autoclear = self._header.autoclear | Autoclear.BITMAPS
        self._header = replace(self._header, extensions=tuple(named), autoclear=autoclear)

    def _block(self, index: int) -> bytes:
        """One refcount block."""
        per_block = self.geometry.refcounts_per_block
        words = Words(1 << self.geometry.refcount_order)
        counts = self._counts[index * per_block : (index + 1) * per_block]
        values = words.unpack(bytes(self.geometry.cluster_size))
        values[: len(counts)] = array(values.typecode, counts)
        return words.pack(values)

    def _take(self, clusters: int) -> HostOffset:
        """New clusters at the end, used once."""
        start = self.end
        self._counts.extend(array("H", [1]) * clusters)
        return start

    def _take_bytes(self, length: int) -> HostOffset:
        """Room for compressed bytes: in the open cluster and those behind it, else in new ones.

        Each cluster counts those that it has bytes of; one that cannot count more is full.
        """
        size = self.geometry.cluster_size
        start, end = self._open
        crowded = end and start < end and self._counts[start // size] >= self._most
        if crowded or start == end or (start + length > end != self.end):
            start = end = self.end
        new = max(0, -(-(start + length - end) // size))
        if start < end:
            self._counts[start // size] += 1
        self._take(new)
        self._open = (start + length, end + new * size)
        return start

    def _set(self, guest: GuestOffset, entries: array[int], bitmap: int) -> None:
        """Set entries of one L2 table, which begins when its first cluster comes."""
        geometry = self.geometry
        index = geometry.l1_index(guest)
        if self._table is None or self._table[0] != index:
            self._finish_table()
            self._table = (index, array("Q", bytes(geometry.cluster_size)))
        words, step = self._table[1], self._words
        first = guest % geometry.l2_coverage // geometry.cluster_size * step
        last = first + len(entries) * step
        words[first:last:step] = entries
        if step == 2:
            words[first + 1 : last : step] = array("Q", [bitmap]) * len(entries)

    def _finish_table(self) -> None:
        if self._table is not None:
            index, words = self._table
            host = self._take(1)
            self._l1[index] = host | COPIED
            self._writes.append((host, TABLE_WORDS.pack(words)))
            self._table = None
