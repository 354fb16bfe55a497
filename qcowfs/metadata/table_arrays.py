"""L2 entries decoded many at a time, as numpy arrays.

Owns what the entries of whole tables say, damage included. Must not know how tables are found and read:
`tables` asks here where they are many, since loading numpy takes longer than decoding a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from qcowfs.format.header import Header
from qcowfs.geometry import SUBCLUSTERS, GuestOffset
from qcowfs.metadata.mapping import COMPRESSED_KIND, DATA, LOST, UNALLOCATED, ZERO_KIND
from qcowfs.metadata.runs import Run

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]

KINDS = (UNALLOCATED, DATA, ZERO_KIND, COMPRESSED_KIND, LOST)
_UNALLOCATED, _DATA, _ZERO, _COMPRESSED, _LOST = range(len(KINDS))


@dataclass(frozen=True)
class Units:
    """Clusters or subclusters of a stretch of the disk: a kind and a host offset for each."""

    size: int
    kind: NDArray[np.uint8]
    host: Words
    has_host: Flags
    shared: Flags
    stored: Words


def runs_of_tables(data: bytearray, lost: list[bool], header: Header, guest: GuestOffset) -> Iterator[Run]:
    """The runs of tables that follow each other, the first for the guest offset; some of them are lost."""
    units = decode(_words(data), header, guest)
    per_table = header.geometry.l2_coverage // units.size
    for i in (i for i, is_lost in enumerate(lost) if is_lost):
        units.kind[i * per_table : (i + 1) * per_table] = _LOST
    return _runs(units, guest)


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
