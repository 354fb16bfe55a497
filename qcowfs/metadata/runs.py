"""L2 entries decoded one by one, to runs of clusters that are of one kind and follow each other.

Owns what a run is, and the way that loads nothing; `table_arrays` does the same for very many entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from qcowfs.format.header import Header
from qcowfs.geometry import GuestOffset, HostOffset
from qcowfs.metadata.mapping import COMPRESSED_KIND, DATA, LOST, UNALLOCATED, ZERO_KIND, ExtentKind


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


def runs_of_entries(words: array[int], header: Header, guest: GuestOffset) -> Iterator[Run]:
    """The runs of standard entries, the first of which is for the guest offset."""
    size, index = header.geometry.cluster_size, 0
    while index < len(words):
        start, entry = index, words[index]
        kind, host, shared = _decode(entry, header, guest + start * size)
        stored, index = 0, index + 1
        if kind is COMPRESSED_KIND:
            index, stored = _end_of_compressed(words, start, header)
        elif kind is not LOST:
            index = _end_of_run(words, start, 0 if host is None else size)
        yield Run(guest + start * size, (index - start) * size, kind, host, shared, stored)


def _decode(entry: int, header: Header, guest: GuestOffset) -> tuple[ExtentKind, HostOffset | None, bool]:
    """Kind of an entry, the host offset that is set aside for it, and whether others use it too."""
    if entry & COMPRESSED:
        return COMPRESSED_KIND, None, False
    offset, copied = entry & OFFSET_MASK, bool(entry & COPIED)
    external = header.has_data_file
    allocated = bool(offset) or (external and copied)
    host, shared = offset if allocated else None, allocated and not copied and not external
    if entry & ZERO:
        return (ZERO_KIND, host, shared) if header.version >= 3 else (LOST, None, False)
    if not allocated:
        return UNALLOCATED, None, False
    if not header.geometry.is_cluster_aligned(offset) or (external and offset != guest):
        return LOST, None, False
    return DATA, host, shared


def _end_of_run(words: array[int], index: int, step: int) -> int:
    """Where entries end that are the first one again, or lie as far behind each other as `step` says."""
    entry, end = words[index], len(words)
    if step:
        end = min(end, index + 1 + (OFFSET_MASK - (entry & OFFSET_MASK)) // step)
    while index < end and words[index] == entry:
        index, entry = index + 1, entry + step
    return index


def _end_of_compressed(words: array[int], index: int, header: Header) -> tuple[int, int]:
    """Where compressed entries end that follow each other, and the bytes that all of them take at most."""
    stored = 0
    while index < len(words) and words[index] & COMPRESSED:
        stored += header.geometry.compressed_location(words[index])[1]
        index += 1
    return index, stored
