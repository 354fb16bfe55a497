"""A writable live disk: what is checked before the first write, and the parts put together.

Owns a writer's duties to the header: features it must clear, states it must refuse, the corrupt bit. Must not
know how bytes find their clusters.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from qcowfs.data.cluster_locks import ClusterLocks
from qcowfs.data.in_place import InPlace
from qcowfs.data.writing import Target, Writer
from qcowfs.data.zeroing import Zeroer, is_zero
from qcowfs.disk.gate import Gate
from qcowfs.disk.parts import DetectZeroes, Parts
from qcowfs.errors import CorruptImage, MetadataOverlap, UsageError
from qcowfs.format import extensions as ext
from qcowfs.format.bitmaps import BitmapDirectory
from qcowfs.format.entries import OFFSET_MASK
from qcowfs.format.features import Autoclear, Incompatible
from qcowfs.format.luks import unpack_pointer
from qcowfs.format.words import TABLE_WORDS, Words
from qcowfs.metadata.bitmaps import KeptBitmaps
from qcowfs.metadata.cache import TableCache
from qcowfs.metadata.flush import Flusher
from qcowfs.metadata.linking import Linker, Tables
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.metadata.refcounts import Refcounts

log = logging.getLogger(__name__)

_L1_PIECE = 1 << 20
_CORRUPT = Incompatible.CORRUPT.value
INCOMPATIBLE_FIELD, AUTOCLEAR_FIELD = 72, 88


class DiskWriter:
    """The live disk's writing side: what `Image` offers to its users."""

    def __init__(
        self, parts: Parts, writer: Writer, zeroer: Zeroer, flusher: Flusher, metadata: MetadataMap,
        bitmaps: KeptBitmaps,
    ) -> None:  # fmt: skip
        """For `make_writer` only."""
        self._metadata = metadata
        self._parts = parts
        self._writer = writer
        self._zeroer = zeroer
        self._flusher = flusher
        self._bitmaps = bitmaps
        self._incompatible = parts.header.incompatible
        self._prepared = self._forbidden = False
        self._detect = parts.detect_zeroes
        self._gate = Gate()
        self.turn = trio.Lock()
        """Held around each change of the image as a whole, from its first look on."""
        self.writes = 0
        """How many changes were asked for so far."""

    @property
    def _may_write_now(self) -> bool:
        return self._prepared and not self._incompatible & _CORRUPT and self._gate.is_open

    def write_now(self, guest: int, data: bytes | memoryview) -> bool:
        """Write bytes if that takes no waiting; False leaves it to `write`, as it does what that refuses."""
        if not self._may_write_now or not 0 <= guest < guest + len(data) <= self._parts.view.size:
            return False
        if self._detect is not DetectZeroes.OFF and is_zero(data):
            return False
        self.writes += 1
        self._bitmaps.add(guest, len(data))
        return self._writer.write_now(guest, data)

    def in_place(self) -> InPlace | None:
        """Where clusters may be overwritten until the next await; None if each write has to be seen."""
        if not self._may_write_now or self._detect is not DetectZeroes.OFF or self._bitmaps.keeps_any:
            return None
        return self._writer.in_place()

    def note_written(self, count: int, where: range, length: int) -> None:
        """Note that `count` writes of so many bytes were made in place, in a range of the data file."""
        self.writes += count
        self._writer.note_written(where, length)

    async def write(self, guest: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at a guest offset. Raises `UsageError` for a range beyond the disk.

        Raises `CorruptImage` where the image contradicts itself, `OSError` as the host does.
        """
        if self._detect is not DetectZeroes.OFF and is_zero(data):
            await self.zero(guest, len(data), unmap=self._detect is DetectZeroes.UNMAP)
            return
        await self._change(guest, len(data), lambda: self._writer.write(guest, memoryview(data)))

    async def zero(self, guest: int, length: int, *, unmap: bool = False) -> None:
        """Make a range read as zeros, giving its clusters back with `unmap`; raises as `write` does."""
        await self._change(guest, length, lambda: self._zeroer.zero(guest, length, unmap=unmap))

    async def discard(self, guest: int, length: int) -> None:
        """Give back the whole clusters of a range; raises as `write` does."""
        await self._change(guest, length, lambda: self._zeroer.discard(guest, length))

    async def flush(self) -> None:
        """Return when everything written so far is on disk. Raises `OSError` as the host does."""
        await self._gate.enter()
        try:
            self._refuse_if_forbidden()
            await self._flusher.flush()
        finally:
            self._gate.leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[MetadataMap]:
        """Keep every change out, with all tables on disk; what is protected there.

        Raises as `write` does where the image must not be changed.
        """
        async with self._gate.alone():
            await self._prepare(0, 0)
            await self._flusher.write_tables_back()
            yield self._metadata

    async def clear_tail(self) -> None:
        """Make what lies between the end of the disk and of its last cluster zeros, before it grows."""
        size = self._parts.view.size
        length = -size % self._parts.header.geometry.cluster_size
        if not length:
            return
        if not await self._writer.reads_as_zeros(size - 1, length + 1):
            await self._change(size, 0, lambda: self._writer.write(size, memoryview(bytes(length))))

    @property
    def dropped(self) -> list[range]:
        """Host clusters that are counted only until those who read them have ended."""
        return self._flusher.dropped

    def take_over(self, successor: DiskWriter, freed: list[range]) -> None:
        """Go on as `successor`, which was made of the image's new state; `freed` is not used any more.

        The new state counts `dropped` no more but for what is in `freed`.
        """
        for clusters in freed:
            successor._flusher.drop(clusters)
        successor._writer.linked = self._writer.linked
        self._parts, self._metadata = successor._parts, successor._metadata
        self._writer, self._zeroer, self._flusher = successor._writer, successor._zeroer, successor._flusher
        self._bitmaps.follow(successor._bitmaps)
        self.writes += 1

    def note_all_changed(self) -> None:
        """Let every bitmap know that the whole disk may have changed."""
        self._bitmaps.add(0, self._parts.view.size)

    def forbid(self) -> None:
        """Let nothing more be written, at the end neither: the state on disk is not the one in memory."""
        self._incompatible |= _CORRUPT
        self._forbidden = True

    def _refuse_if_forbidden(self) -> None:
        if self._forbidden:
            raise CorruptImage(
                f"{self._parts.label}: nothing more is written, since a change of its state failed half-way; "
                "unmount it, then run qcowfs check"
            )

    async def finish(self) -> None:
        """Write everything back before the files are closed; raises as `flush` does."""
        self._refuse_if_forbidden()
        await self._flusher.flush_all()
        self._prepared = False
        if not self._incompatible & _CORRUPT:
            await self._bitmaps.store()

    @property
    def allocated_since_open(self) -> int:
        """Bytes of guest clusters that took a host cluster since the image was opened, less those freed."""
        return self._writer.linked * self._parts.header.geometry.cluster_size

    @property
    def is_dirty(self) -> bool:
        """Whether anything waits to reach the disk."""
        return self._flusher.is_dirty and not self._forbidden

    async def _change(self, guest: int, length: int, work: Callable[[], Awaitable[None]]) -> None:
        """Run what changes a range of the disk, beside other changes.

        It is looked up only when it is its turn: a new state may have come in force meanwhile.
        """
        await self._gate.enter()
        try:
            await self._prepare(guest, length)
            await work()
        except MetadataOverlap as error:
            raise await self._marked_corrupt(str(error)) from None
        finally:
            self._gate.leave()

    async def _prepare(self, guest: int, length: int) -> None:
        """What has to be so before any change."""
        self.writes += 1
        if guest < 0 or guest + length > self._parts.view.size:
            raise UsageError(f"{self._parts.label}: bytes {guest}+{length} lie beyond the end of the disk")
        if self._incompatible & _CORRUPT:
            raise CorruptImage(f"{self._parts.label}: was marked corrupt; nothing more is written")
        if not self._prepared:
            await self._clear_autoclear()
        self._bitmaps.add(guest, length)

    async def _clear_autoclear(self) -> None:
        """Clear the bits whose structures this writer does not keep right: unknown ones, lost bitmaps."""
        header = self._parts.header
        kept = header.autoclear & Autoclear.RAW_EXTERNAL_DATA
        if await self._bitmaps.begin(self._parts.label):
            kept |= Autoclear.BITMAPS
        if header.version >= 3 and kept != header.autoclear:
            await self._parts.file.write_from([(AUTOCLEAR_FIELD, kept.to_bytes(8, "big"))])
            await self._parts.file.sync()
        self._prepared = True

    async def _marked_corrupt(self, rule: str) -> CorruptImage:
        """Set the corrupt bit, where the version has one; the error to raise."""
        text = f"{self._parts.label}: write refused: {rule}"
        log.error("%s; marked corrupt, repair it with qcowfs check --repair all", text)
        self._incompatible |= _CORRUPT
        if self._parts.header.version >= 3:
            field = self._incompatible.to_bytes(8, "big")
            await self._parts.file.write_from([(INCOMPATIBLE_FIELD, field)])
            await self._parts.file.sync()
        return CorruptImage(text)


async def make_writer(parts: Parts, *, at_open: bool = False) -> DiskWriter:
    """The writing side of an image that was opened for it; `at_open` its file is looked at as well.

    Raises `CorruptImage` where its state does not permit writing.
    """
    _refuse_states(parts)
    header, geometry = parts.header, parts.header.geometry
    metadata = MetadataMap(header.cluster_bits)
    blocks = TableCache(parts.file, geometry, parts.slices, Words(1 << header.refcount_order))
    refcounts = Refcounts(header, blocks, metadata)
    await refcounts.load(parts.file)
    if at_open:
        await _refuse_cut(parts, refcounts)
    await _protect(parts, metadata, refcounts)
    caches = (blocks, parts.l2_tables, parts.l1_tables)
    flusher = Flusher(parts.file, parts.data_file, refcounts, caches, parts.epochs)
    tables = Tables(
        geometry, header.l1_table_offset, parts.l1_tables, parts.l2_tables, refcounts, flusher, metadata
    )
    target = Target(
        geometry=geometry,
        data=parts.data,
        external=header.has_data_file,
        zero_flag=header.version >= 3,
        has_backing=parts.has_backing,
        refcounts=refcounts,
        flusher=flusher,
        metadata=metadata,
        epochs=parts.epochs,
    )
    linker, locks = Linker(tables, parts.view.mapping), ClusterLocks()
    writer = Writer(parts.view, linker, target, locks)
    zeroer = Zeroer(writer, linker, target, locks, parts.view.size)
    bitmaps = KeptBitmaps(parts.file, header, refcounts, flusher, metadata)
    return DiskWriter(parts, writer, zeroer, flusher, metadata, bitmaps)


def _refuse_states(parts: Parts) -> None:
    how = "repair it with qcowfs check --repair all, or open it read-only"
    if parts.header.corrupt:
        raise CorruptImage(f"{parts.label}: is marked corrupt, so nothing may be written; {how}")
    if parts.header.dirty:
        raise CorruptImage(
            f"{parts.label}: is marked dirty (not closed cleanly), its refcounts may be wrong; {how}"
        )


async def _refuse_cut(parts: Parts, refcounts: Refcounts) -> None:
    """Refuse a file whose end is gone: growing, it would give other bytes where reads have failed.

    Counts beyond its end are a hint, which a crash may leave as well; then all entries are looked at.
    """
    end = parts.header.geometry.cluster_round_up(parts.file.facts().size) >> parts.header.cluster_bits
    if not await refcounts.counts_any_from(parts.file, end):
        return
    from qcowfs.check.checker import inspect
    from qcowfs.check.subject import NOBODY

    subject = (await inspect(parts.file)).subject
    if subject.first_gone != NOBODY:
        raise CorruptImage(
            f"{parts.label}: the end of its file is gone, so nothing may be written: what was lost would "
            f"read as other bytes ({subject.who_is_gone}); put the end back, give up what is lost with "
            "qcowfs check --repair all --drop-lost --data, or open it read-only"
        )


async def _protect(parts: Parts, metadata: MetadataMap, refcounts: Refcounts) -> None:
    """Note every cluster of metadata that lies in the file."""
    header, end = parts.header, parts.header.geometry.cluster_round_up(parts.file.facts().size)
    ranges = [(0, 1), refcounts.table_extent, (header.l1_table_offset, header.l1_size * 8)]
    ranges += [(s.l1_table_offset, s.l1_size * 8) for s in parts.snapshots]
    if parts.snapshots:
        ranges.append((header.snapshots_offset, sum(len(s.pack()) for s in parts.snapshots)))
    pointer = header.extension(ext.ENCRYPTION_HEADER)
    if pointer is not None:
        ranges.append(unpack_pointer(pointer))
    bitmaps = header.extension(ext.BITMAPS)
    if bitmaps is not None:
        directory = BitmapDirectory.unpack(bitmaps)
        ranges.append((directory.offset, directory.size))
    ranges += [(offset, 1) for offset in refcounts.blocks]
    ranges += [(offset, 1) for offset in await _l2_tables(parts)]
    for offset, size in ranges:
        if size and offset + size <= end:
            metadata.add(offset, size)


async def _l2_tables(parts: Parts) -> list[int]:
    """Where the L2 tables of the live disk lie; the L1 table is read in pieces."""
    found: list[int] = []
    header, end = parts.header, parts.header.l1_size * 8
    for start in range(0, end, _L1_PIECE):
        data = bytearray(min(_L1_PIECE, end - start))
        await parts.file.read_into([(header.l1_table_offset + start, memoryview(data))])
        entries = TABLE_WORDS.unpack(bytes(data))
        found += [entry & OFFSET_MASK for entry in entries if entry & OFFSET_MASK]
    return found
