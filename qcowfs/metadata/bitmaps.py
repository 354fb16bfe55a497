"""Persistent bitmaps: listing them, and keeping the enabled ones right through writes.

Owns the bitmaps' life as QEMU has it: the in-use flag is on disk before the first write, the bits are stored
and the flag is cleared when the image is closed; after a crash the flag tells that the bitmap cannot be
trusted. Must not know how data is written. Implements the section "Bitmaps".
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from qcowfs.errors import CorruptImage
from qcowfs.format import extensions as ext
from qcowfs.format.bitmaps import (
    FLAG_AUTO,
    FLAG_IN_USE,
    FLAGS_AT,
    TABLE_ALL_ONES,
    TABLE_SIZE_AT,
    BitmapDirectory,
    BitmapEntry,
    unpack_directory,
)
from qcowfs.format.entries import OFFSET_MASK
from qcowfs.format.features import Autoclear
from qcowfs.format.header import Header
from qcowfs.format.words import TABLE_WORDS
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import new_lock
from qcowfs.metadata.flush import Flusher
from qcowfs.metadata.granules import Granules
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.metadata.refcounts import Refcounts

log = logging.getLogger(__name__)

MAX_TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class BitmapRecord:
    """What there is to say of a bitmap; `dirty_bytes` is None where its bits cannot be trusted."""

    name: bytes
    granularity: int
    flags: list[str]
    dirty_bytes: int | None


async def load_entries(file: HostFile, header: Header) -> tuple[BitmapDirectory | None, list[BitmapEntry]]:
    """The directory of an image's bitmaps, whether they can be trusted or not.

    Raises `CorruptImage` where it cannot be read.
    """
    extension = header.extension(ext.BITMAPS)
    if extension is None:
        return None, []
    directory = BitmapDirectory.unpack(extension)
    if directory.offset + directory.size > header.geometry.cluster_round_up(file.facts().size):
        raise CorruptImage(f"bitmap directory at {directory.offset:#x}: lies past the end of the file")
    data = await _read(file, directory.offset, directory.size)
    return directory, unpack_directory(data, directory.count)


async def list_bitmaps(file: HostFile, header: Header) -> list[BitmapRecord]:
    """Every bitmap of an image, with how much of the disk it calls dirty."""
    _, entries = await load_entries(file, header)
    records = []
    for entry in entries:
        usable = is_in_order(header, entry)
        dirty = await _count(file, header, entry) if usable else None
        records.append(BitmapRecord(entry.name, entry.granularity, entry.flag_names, dirty))
    return records


def is_in_order(header: Header, entry: BitmapEntry) -> bool:
    """Whether a bitmap can be understood and its bits be trusted."""
    return bool(header.autoclear & Autoclear.BITMAPS) and entry.plain and not entry.flags & FLAG_IN_USE


async def _count(file: HostFile, header: Header, entry: BitmapEntry) -> int:
    """Bytes of the disk in dirty granules."""
    size, geometry = header.virtual_size, header.geometry
    granules = -(-size // entry.granularity)
    per_cluster = geometry.cluster_size * 8
    found = 0
    for index, word in enumerate(await load_table(file, header, entry)):
        here = max(0, min(per_cluster, granules - index * per_cluster))
        if word & OFFSET_MASK:
            bits = int.from_bytes(await _read(file, word & OFFSET_MASK, geometry.cluster_size), "little")
            found += (bits & ((1 << here) - 1)).bit_count()
        elif word & TABLE_ALL_ONES:
            found += here
    return min(size, found * entry.granularity)


async def load_table(file: HostFile, header: Header, entry: BitmapEntry) -> array[int]:
    """The bitmap's table; raises `CorruptImage` if it is short of the disk or names what is no cluster."""
    geometry, label = header.geometry, f"bitmap table at {entry.table_offset:#x}"
    end = geometry.cluster_round_up(file.facts().size)
    size = entry.table_size * 8
    if size > MAX_TABLE_BYTES or entry.table_offset + size > end:
        raise CorruptImage(f"{label}: lies past the end of the file, or is over {MAX_TABLE_BYTES} bytes")
    if entry.table_size * geometry.cluster_size * 8 * entry.granularity < header.virtual_size:
        raise CorruptImage(f"{label}: is too short for the disk")
    table = TABLE_WORDS.unpack(await _read(file, entry.table_offset, size))
    for word in table:
        offset = word & OFFSET_MASK
        if not geometry.is_cluster_aligned(offset) or offset >= end:
            raise CorruptImage(f"{label}: names {offset:#x}, where no cluster of the file starts")
    return table


async def _read(file: HostFile, offset: int, size: int) -> bytes:
    data = bytearray(size)
    await file.read_into([(offset, memoryview(data))])
    return bytes(data)


# -- kept right through writes


@dataclass(frozen=True)
class _Kept:
    """A bitmap, its table, and if it is enabled what was written to since it was in use."""

    entry: BitmapEntry
    table: array[int]
    granules: Granules


class KeptBitmaps:
    """The bitmaps of an image that is written to; enabled ones note each change, all follow its size."""

    def __init__(
        self, file: HostFile, header: Header, refcounts: Refcounts, flusher: Flusher, metadata: MetadataMap
    ) -> None:
        """Keep the bitmaps of the image in `file`; nothing happens before `begin`."""
        self._file = file
        self._header = header
        self._refcounts = refcounts
        self._flusher = flusher
        self._metadata = metadata
        self._directory_offset = 0
        self._kept: list[_Kept] = []
        self._answer: bool | None = None
        self._lock = new_lock()

    @property
    def keeps_any(self) -> bool:
        """Whether any bitmap wants to know of every change."""
        return bool(self._kept)

    async def begin(self, label: str) -> bool:
        """Put the in-use flags on disk; whether the bitmaps stay right from now on.

        False means that they must be given up: they were out of date already, or cannot be understood.
        Whoever comes second waits, and gets the same answer.
        """
        async with self._lock:
            if self._answer is None:
                self._answer = await self._begin(label)
            return self._answer

    async def _begin(self, label: str) -> bool:
        if not self._header.autoclear & Autoclear.BITMAPS:
            return False
        try:
            self._kept = await self._load()
        except CorruptImage as error:
            log.warning("%s: its bitmaps are given up: %s", label, error)
            return False
        await self._store_flags(in_use=True)
        return True

    async def _load(self) -> list[_Kept]:
        directory, entries = await load_entries(self._file, self._header)
        if directory is None:
            raise CorruptImage("the header promises them but names none")
        self._directory_offset = directory.offset
        kept = []
        for entry in entries:
            if entry.flags & FLAG_IN_USE:
                continue  # nobody can use it any more
            if not entry.plain and entry.flags & FLAG_AUTO:
                raise CorruptImage("one is of an unknown kind")
            if entry.plain:
                table = await load_table(self._file, self._header, entry)
                self._protect(entry, table)
                kept.append(_Kept(entry, table, Granules(entry.granularity)))
        return kept

    def _protect(self, entry: BitmapEntry, table: array[int]) -> None:
        """Let nobody write data over a bitmap."""
        if table:
            self._metadata.add(entry.table_offset, entry.table_size * 8)
        for word in table:
            if word & OFFSET_MASK:
                self._metadata.add(word & OFFSET_MASK, 1)

    async def _store_flags(self, *, in_use: bool) -> None:
        for kept in self._kept:
            flags = kept.entry.flags | FLAG_IN_USE if in_use else kept.entry.flags
            place = self._directory_offset + kept.entry.start + FLAGS_AT
            await self._file.write_from([(place, flags.to_bytes(4, "big"))])
        if self._kept:
            await self._file.sync()

    def add(self, guest: int, length: int) -> None:
        """Note that a range of the disk is about to change."""
        for kept in self._kept:
            if kept.entry.flags & FLAG_AUTO:
                kept.granules.add(guest, length)

    def follow(self, other: KeptBitmaps) -> None:
        """Go on with the image's new state, for which `other` was made: its counts, its disk's size."""
        self._header, self._metadata = other._header, other._metadata
        self._refcounts, self._flusher = other._refcounts, other._flusher
        for kept in self._kept:
            self._protect(kept.entry, kept.table)
        self._kept = [kept for kept in self._kept if self._fits(kept)]

    def _fits(self, kept: _Kept) -> bool:
        """Whether the bitmap covers the disk, its table enlarged within its clusters if need be."""
        geometry = self._header.geometry
        needed = -(-self._header.virtual_size // (geometry.cluster_size * 8 * kept.entry.granularity))
        if needed * 8 > geometry.cluster_round_up(kept.entry.table_size * 8):
            log.warning("a bitmap is given up: its table has no room for the larger disk")
            return False
        kept.table.extend([0] * (needed - len(kept.table)))
        return True

    async def store(self) -> None:
        """Store the bits, then clear the in-use flags; for the time when nothing changes any more.

        Raises `OSError` as the host does; the flags then stay. A later change needs `begin` again.
        """
        if self._kept:
            await self._store_all()
        self._kept, self._answer = [], None

    async def _store_all(self) -> None:
        for kept in self._kept:
            await self._store_bits(kept)
        self._flusher.note_write()
        await self._flusher.flush_all()  # bits and counts, before a table names them
        for kept in self._kept:
            if kept.granules or len(kept.table) > kept.entry.table_size:
                await self._file.write_from([(kept.entry.table_offset, TABLE_WORDS.pack(kept.table))])
        await self._file.sync()
        for kept in self._kept:
            place = self._directory_offset + kept.entry.start + TABLE_SIZE_AT
            await self._file.write_from([(place, len(kept.table).to_bytes(4, "big"))])
        await self._store_flags(in_use=False)

    async def _store_bits(self, kept: _Kept) -> None:
        """Write the clusters of bits that change, to new places where there were none."""
        size = self._header.geometry.cluster_size
        for index, pieces in _by_cluster(kept.granules, size):
            word = kept.table[index]
            if word & TABLE_ALL_ONES and not word & OFFSET_MASK:
                continue
            offset = word & OFFSET_MASK
            bits = bytearray(await _read(self._file, offset, size) if offset else bytes(size))
            for start, new in pieces:
                old = int.from_bytes(bits[start : start + len(new)], "big")
                merged = old | int.from_bytes(new, "big")
                bits[start : start + len(new)] = merged.to_bytes(len(new), "big")
            if not offset:
                offset, _ = await self._refcounts.allocate(1)
                self._metadata.add(offset, 1)
                kept.table[index] = offset
            await self._file.write_from([(offset, bytes(bits))])


def _by_cluster(granules: Granules, size: int) -> Iterator[tuple[int, list[tuple[int, bytes]]]]:
    """(table index, pieces within that cluster); chunks never straddle clusters."""
    index, pieces = -1, list[tuple[int, bytes]]()
    for offset, bits in granules.pieces():
        if offset // size != index:
            if pieces:
                yield index, pieces
            index, pieces = offset // size, []
        pieces.append((offset % size, bits))
    if pieces:
        yield index, pieces
