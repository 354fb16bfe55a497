"""All L2 tables of a view in bulk: to runs of clusters that are of one kind and follow each other.

Owns decoding many entries at once, past the caches. Must not know backing files or what runs are for. Where
one cluster is asked for, `mapping` is the one to ask; both implement "Cluster mapping" of the specification.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import trio
from numpy.typing import NDArray

from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from qcowfs.format.header import Header
from qcowfs.geometry import SUBCLUSTERS, TABLE_ENTRY_SIZE, GuestOffset, HostOffset
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.mapping import COMPRESSED_KIND, DATA, LOST, UNALLOCATED, ZERO_KIND, ExtentKind

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]

KINDS = (UNALLOCATED, DATA, ZERO_KIND, COMPRESSED_KIND, LOST)
_UNALLOCATED, _DATA, _ZERO, _COMPRESSED, _LOST = range(len(KINDS))
_CHUNK_BYTES = 1 << 19


class Run(NamedTuple):
    """Guest bytes of one kind; `host` is None where nothing is set aside for them in the file.

    Where there is a host offset, the run is contiguous from there on. `shared` clusters have more users
    than this view's live disk, `stored` is how many bytes compressed ones take at most.
    """

    guest: GuestOffset
    length: int
    kind: ExtentKind
    host: HostOffset | None
    shared: bool
    stored: int


@dataclass(frozen=True)
class Units:
    """Clusters or subclusters of a stretch of the disk: a kind and a host offset for each."""

    size: int
    kind: NDArray[np.uint8]
    host: Words
    has_host: Flags
    shared: Flags
    stored: Words


class TableWalk:
    """The tables of one view, decoded chunk by chunk; the last chunk is kept for who asks on."""

    def __init__(self, file: HostFile, header: Header, l1_table_offset: int, l1_size: int) -> None:
        """Read the tables of `file` whose L1 table lies there and has that many entries."""
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self._place = (l1_table_offset, l1_size)
        self._tables_at_once = max(1, _CHUNK_BYTES // self._geometry.cluster_size)
        self._l1: Words | None = None
        self._present = np.empty(0, np.int64)
        self._chunk: tuple[int, list[Run]] = (-1, [])

    async def runs(self, start: GuestOffset, end: GuestOffset) -> AsyncIterator[Run]:
        """The runs that cover `[start, end)`, each cut to it. Raises `OSError` as the host does."""
        if self._l1 is None:
            await self._load_l1()
        while start < end:
            chunk = self._geometry.l1_index(start) // self._tables_at_once
            stop = min(end, self._next_present(chunk))
            if stop > start:
                yield Run(start, stop - start, UNALLOCATED, None, shared=False, stored=0)
            else:
                stop = min(end, self._chunk_start(chunk + 1))
                for run in await self._load_chunk(chunk):
                    cut = _cut(run, start, stop)
                    if cut is not None:
                        yield cut
            start = stop

    async def _load_l1(self) -> None:
        offset, size = self._place
        data = bytearray(size * TABLE_ENTRY_SIZE)
        await self._file.read_into([(offset, memoryview(data))])
        self._l1 = _words(data)
        self._present = np.flatnonzero(self._l1 & np.uint64(OFFSET_MASK)) // self._tables_at_once

    def _chunk_start(self, chunk: int) -> GuestOffset:
        return chunk * self._tables_at_once * self._geometry.l2_coverage

    def _next_present(self, chunk: int) -> GuestOffset:
        """Where the first chunk from `chunk` on starts that has any L2 table."""
        index = int(np.searchsorted(self._present, chunk))
        found = int(self._present[index]) if index < len(self._present) else 1 << 62
        return self._chunk_start(found)

    async def _load_chunk(self, chunk: int) -> list[Run]:
        if self._chunk[0] != chunk:
            await trio.lowlevel.checkpoint()
            self._chunk = (chunk, list(_runs(await self._read_units(chunk), self._chunk_start(chunk))))
        return self._chunk[1]

    async def _read_units(self, chunk: int) -> Units:
        """Every unit of the chunk; a table that cannot be read leaves its units lost."""
        assert self._l1 is not None  # noqa: S101 - for the type checker: `runs` has loaded it
        geometry = self._geometry
        size, first = geometry.cluster_size, chunk * self._tables_at_once
        tables = (self._l1[first : first + self._tables_at_once] & np.uint64(OFFSET_MASK)).tolist()
        data = bytearray(len(tables) * size)
        view, file_size = memoryview(data), self._file.facts().size
        lost = [bool(at) and (not geometry.is_cluster_aligned(at) or at >= file_size) for at in tables]
        requests = [
            (at, view[i * size : (i + 1) * size])
            for i, at in enumerate(tables)
            if at and not lost[i]
        ]  # fmt: skip
        await self._file.read_into(requests)
        units = decode(_words(data), self._header, self._chunk_start(chunk))
        for i in (i for i, is_lost in enumerate(lost) if is_lost):
            per_table = geometry.l2_coverage // units.size
            units.kind[i * per_table : (i + 1) * per_table] = _LOST
        return units


def _words(data: bytearray) -> Words:
    return np.frombuffer(data, ">u8").astype(np.uint64)


def decode(words: Words, header: Header, guest: GuestOffset) -> Units:
    """What L2 entries say whose first covers the guest offset."""
    geometry = header.geometry
    if geometry.extended_l2:
        return _decode_extended(words, header, guest)
    kind, host, stored = _decode_entries(words, header, guest)
    is_zero = (words & np.uint64(ZERO)).astype(bool) & (kind != _COMPRESSED)
    kind[is_zero] = _ZERO if header.version >= 3 else _LOST
    return _units(geometry.cluster_size, kind, host, words, stored, header)


def _decode_entries(
    words: Words, header: Header, guest: GuestOffset
) -> tuple[NDArray[np.uint8], Words, Words]:
    """Kind, host offset and stored bytes by the entries alone, as if no zero flag and bitmap existed."""
    geometry: Any = header.geometry
    host = words & np.uint64(OFFSET_MASK)
    compressed = (words & np.uint64(COMPRESSED)).astype(bool)
    allocated = host != 0
    broken = (host & np.uint64(geometry.cluster_size - 1)) != 0
    if header.has_data_file:
        allocated |= (words & np.uint64(COPIED)).astype(bool)
        own = np.arange(len(words), dtype=np.uint64) * np.uint64(geometry.cluster_size) + np.uint64(guest)
        broken |= host != own
    kind = np.where(allocated, _DATA, _UNALLOCATED).astype(np.uint8)
    kind[broken & allocated] = _LOST
    kind[compressed] = _COMPRESSED
    stored = np.where(compressed, geometry.compressed_location(words)[1], 0).astype(np.uint64)
    return kind, host, stored


def _decode_extended(words: Words, header: Header, guest: GuestOffset) -> Units:
    """Entries with their bitmaps, one unit for each subcluster."""
    entries, bitmaps = words[0::2], words[1::2]
    of_clusters = _decode_entries(entries, header, guest)
    kind, stored = np.repeat(of_clusters[0], SUBCLUSTERS), np.repeat(of_clusters[2], SUBCLUSTERS)
    places = np.arange(SUBCLUSTERS, dtype=np.uint64)
    allocated, zeros = _bits(bitmaps, places), _bits(bitmaps, places + np.uint64(SUBCLUSTERS))
    broken = (allocated & zeros).any(axis=1)
    broken |= allocated.any(axis=1) & (of_clusters[0] == _UNALLOCATED)
    standard = kind != _COMPRESSED
    stored_as = of_clusters[0][:, None]  # data, or lost where the entry's offset is broken
    by_bits = np.where(zeros, _ZERO, np.where(allocated, stored_as, _UNALLOCATED)).astype(np.uint8).ravel()
    kind[standard] = by_bits[standard]
    kind[standard & np.repeat(broken, SUBCLUSTERS)] = _LOST
    within = np.tile(places * np.uint64(header.geometry.subcluster_size), len(entries))
    host = np.repeat(of_clusters[1], SUBCLUSTERS) + within
    stored[within != 0] = 0
    return _units(
        header.geometry.subcluster_size, kind, host, np.repeat(entries, SUBCLUSTERS), stored, header
    )


def _bits(bitmaps: Words, places: Words) -> Flags:
    return ((bitmaps[:, None] >> places[None, :]) & np.uint64(1)).astype(bool)


def _units(
    size: int, kind: NDArray[np.uint8], host: Words, entries: Words, stored: Words, header: Header
) -> Units:
    has_host = ((entries & np.uint64(OFFSET_MASK)) != 0) & (kind != _COMPRESSED) & (kind != _LOST)
    copied = (entries & np.uint64(COPIED)).astype(bool)
    if header.has_data_file:
        has_host |= copied
        copied[:] = True
    return Units(size, kind, host, has_host, has_host & ~copied, stored)


def _runs(units: Units, guest: GuestOffset) -> Iterator[Run]:
    """Units as runs, the first of which starts at the guest offset."""
    same = (units.kind[1:] == units.kind[:-1]) & (units.has_host[1:] == units.has_host[:-1])
    same &= units.shared[1:] == units.shared[:-1]
    same &= ~units.has_host[1:] | (units.host[1:] == units.host[:-1] + np.uint64(units.size))
    starts = np.concatenate(([0], np.flatnonzero(~same) + 1))
    ends = np.concatenate((starts[1:], [len(units.kind)]))
    stored = np.add.reduceat(units.stored, starts)
    columns = (starts, ends, units.kind[starts], units.host[starts], units.has_host[starts],
               units.shared[starts], stored)  # fmt: skip
    for start, end, kind, host, has_host, shared, size in zip(*(c.tolist() for c in columns), strict=True):
        length, place = (end - start) * units.size, host if has_host else None
        yield Run(guest + start * units.size, length, KINDS[kind], place, shared, size)


def _cut(run: Run, start: GuestOffset, end: GuestOffset) -> Run | None:
    """The part of a run that lies in `[start, end)`."""
    low, high = max(run.guest, start), min(run.guest + run.length, end)
    if low >= high:
        return None
    if high - low == run.length:
        return run
    host = None if run.host is None else run.host + low - run.guest
    return Run(low, high - low, run.kind, host, run.shared, run.stored * (high - low) // run.length)
