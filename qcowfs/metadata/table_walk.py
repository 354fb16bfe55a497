"""L1 and L2 tables read whole, as numpy arrays: for changes to all clusters of a disk at once.

Owns the walk and what host clusters the entries refer to. Must not know counts, or why one walks.
Implements "Cluster mapping".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcowfs.errors import CorruptImage
from qcowfs.format.entries import COMPRESSED, COPIED, OFFSET_MASK
from qcowfs.geometry import Geometry
from qcowfs.host.hostfile import HostFile

Words = NDArray[np.uint64]
_CHUNK = 4 << 20
_OFFSET, _COPIED, _COMPRESSED = np.uint64(OFFSET_MASK), np.uint64(COPIED), np.uint64(COMPRESSED)


async def load_words(file: HostFile, offset: int, count: int) -> Words:
    """The 64-bit entries of a table, in host order."""
    data = bytearray(count * 8)
    await file.read_into([(offset, memoryview(data))])
    return np.frombuffer(data, ">u8").astype(np.uint64)


def pack_words(words: Words) -> bytes:
    """Entries as they are stored."""
    return words.astype(">u8").tobytes()


@dataclass
class L2Group:
    """Some L2 tables: the indices of their L1 entries, their clusters, one row of words for each."""

    geometry: Geometry
    l1_indices: NDArray[np.intp]
    clusters: NDArray[np.int64]
    words: Words

    @property
    def descriptors(self) -> Words:
        """The descriptors of the entries, without the bitmaps of extended ones; a view."""
        return self.words[:, ::2] if self.geometry.extended_l2 else self.words

    @property
    def plain(self) -> NDArray[np.bool_]:
        """Which entries have an uncompressed cluster."""
        found = self.descriptors
        plain: NDArray[np.bool_] = ((found & _COMPRESSED) == 0) & ((found & _OFFSET) != 0)
        return plain

    @property
    def plain_clusters(self) -> NDArray[np.int64]:
        """The host cluster of each entry, arbitrary where it has no uncompressed one."""
        bits = np.uint64(self.geometry.cluster_bits)
        return ((self.descriptors & _OFFSET) >> bits).astype(np.int64)

    def references(self) -> NDArray[np.int64]:
        """Every host cluster that the entries refer to, as often as they do.

        Raises `CorruptImage` for an offset that is not aligned.
        """
        found, plain = self.descriptors, self.plain
        low = np.uint64(self.geometry.cluster_size - 1)
        crooked = plain & ((found & _OFFSET & low) != 0)
        if crooked.any():
            row, column = (int(i) for i in np.argwhere(crooked)[0])
            table = int(self.clusters[row]) * self.geometry.cluster_size
            raise CorruptImage(f"L2 table at {table:#x}: entry {column} is not cluster aligned")
        stored = found[(found & _COMPRESSED) != 0]
        own = self.plain_clusters[plain]
        return np.concatenate([own, *self._compressed(stored)]) if len(stored) else own

    def _compressed(self, stored: Words) -> list[NDArray[np.int64]]:
        """The clusters that compressed ones touch: all first ones, all second ones and so on."""
        bits = 62 - (self.geometry.cluster_bits - 8)
        offset = (stored & np.uint64((1 << bits) - 1)).astype(np.int64)
        sectors = ((stored & np.uint64((1 << 62) - 1)) >> np.uint64(bits)).astype(np.int64)
        end = (offset // 512 + sectors + 1) * 512
        first, last = offset >> self.geometry.cluster_bits, (end - 1) >> self.geometry.cluster_bits
        return [(first + n)[first + n <= last] for n in range(int((last - first).max()) + 1)]

    def flags(self) -> NDArray[np.bool_]:
        """Which entries have the COPIED flag."""
        flags: NDArray[np.bool_] = (self.descriptors & _COPIED) != 0
        return flags

    def set_flags(self, wanted: NDArray[np.bool_]) -> None:
        """Give exactly these entries the COPIED flag."""
        found = self.descriptors
        found &= ~_COPIED
        found[wanted] |= _COPIED


class Walk:
    """The L2 tables that an L1 table names, some at a time; the walk may be left at any place.

    Raises `CorruptImage` for a table that is not aligned or past the end of the file.
    """

    def __init__(self, file: HostFile, geometry: Geometry, l1: Words) -> None:
        """Walk what `l1` names when a step is taken: what is set behind the walk is not walked again."""
        self._file, self._geometry, self._l1 = file, geometry, l1
        indices = np.flatnonzero(l1 & _OFFSET)
        step = max(1, _CHUNK // geometry.cluster_size)
        self._parts = iter([indices[start : start + step] for start in range(0, len(indices), step)])

    def __aiter__(self) -> Walk:
        """The walk itself."""
        return self

    async def __anext__(self) -> L2Group:
        """The next tables."""
        part = next(self._parts, None)
        if part is None:
            raise StopAsyncIteration
        size = self._geometry.cluster_size
        places = (self._l1[part] & _OFFSET).astype(np.int64)
        wrong = np.flatnonzero((places & (size - 1) != 0) | (places >= self._file.facts().size))
        if len(wrong):
            index, place = int(part[wrong[0]]), int(places[wrong[0]])
            raise CorruptImage(
                f"L1 entry {index} names an L2 table at {place:#x}, which is no cluster of the file; "
                "repair the image with check"
            )
        data = memoryview(bytearray(len(part) * size))
        pieces = [data[n * size : (n + 1) * size] for n in range(len(part))]
        await self._file.read_into(list(zip(places.tolist(), pieces, strict=True)))
        words = np.frombuffer(data, ">u8").astype(np.uint64).reshape(len(part), -1)
        return L2Group(self._geometry, part, places >> self._geometry.cluster_bits, words)
