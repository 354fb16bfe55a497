"""Compressed clusters, read and inflated in threads, into a bounded cache.

Owns that each is inflated once and how the work is spread over threads. Must not know L2 tables or
guest offsets: a cluster is named by its host offset and stored length.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial

from qcowfs.codecs.compression import inflater
from qcowfs.errors import CorruptImage
from qcowfs.geometry import Geometry
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import Event, new_event, run_all, run_in_thread
from qcowfs.metadata.lru import BoundedStore

DEFAULT_CACHE_BYTES = 16 << 20
SPARE_SIZE = 1 << 20
MOST_SPARE = 8
"""Buffers for stored bytes that are kept, and how large: a fresh one costs its zeroing and page faults."""
STORED_GAP = 4096
"""Stored clusters this close to each other are read by one request."""

Stored = tuple[int, int]
"""Host offset and stored length at most of one compressed cluster."""
Inflated = bytes | CorruptImage
Piece = tuple[Stored, memoryview]
Part = tuple[int, memoryview]
"""Where the wanted bytes start within a cluster, and the buffer to fill from there."""
Parts = dict[Stored, list[Part]]
InflatedStore = BoundedStore[tuple[int, Stored], bytes]


class InflatedClusters:
    """Inflated clusters of one image, kept in a store that others may share."""

    def __init__(
        self, file: HostFile, geometry: Geometry, compression_type: int, store: InflatedStore
    ) -> None:
        """Inflate clusters of `file` and keep them in `store`."""
        self._file = file
        self._size = geometry.cluster_size
        self._inflate = inflater(compression_type)
        self._store = store
        self._loading: dict[Stored, Event] = {}
        self._threads = os.cpu_count() or 1
        self._under_way = 0
        self._spare: list[bytearray] = []

    async def fill(self, wanted: Parts) -> dict[Stored, CorruptImage]:
        """Fill every part of the wanted clusters; why those that are missing in it cannot be had.

        Raises `OSError` as the host does.
        """
        rest = dict(wanted)
        found = await self.get(list(wanted), rest)
        for stored, parts in rest.items():
            cluster = found[stored]
            if isinstance(cluster, bytes):
                _fill(cluster, parts)
        return {stored: cluster for stored, cluster in found.items() if isinstance(cluster, CorruptImage)}

    async def get(self, wanted: Sequence[Stored], parts: Parts | None = None) -> dict[Stored, Inflated]:
        """Every wanted cluster, or the `CorruptImage` that tells why it cannot be had.

        Clusters that are inflated for this call fill their `parts` at once and are removed from there: the
        thread that has just made the bytes copies them faster than any other. Raises `OSError` as the
        host does.
        """
        found: dict[Stored, Inflated] = {}
        missing = []
        for stored in wanted:
            cluster = self._store.get((id(self), stored))
            if cluster is None:
                missing.append(stored)
            else:
                found[stored] = cluster
        if missing:
            await self._load(dict.fromkeys(missing), found, {} if parts is None else parts)
        return found

    async def _load(self, missing: Iterable[Stored], found: dict[Stored, Inflated], parts: Parts) -> None:
        """Inflate what nobody is inflating yet, then wait for what others were."""
        others = [stored for stored in missing if stored in self._loading]
        own = [stored for stored in missing if stored not in self._loading]
        loaded = new_event()
        self._loading.update(dict.fromkeys(own, loaded))
        try:
            if own:
                found.update(await self._inflate_all(own, parts))
                self._keep(found, own)
        finally:
            for stored in own:
                del self._loading[stored]
            loaded.set()
        for stored in others:
            if (event := self._loading.get(stored)) is not None:
                await event.wait()
        if others:
            found.update(await self.get(others, parts))

    async def _inflate_all(self, wanted: list[Stored], parts: Parts) -> dict[Stored, Inflated]:
        """Read the stored bytes, then inflate them in threads, whose number all requests under way share.

        Threads that outnumber the processors spend their time waiting for the interpreter.
        """
        buffers: list[bytearray] = []
        self._under_way += 1
        try:
            return await self._inflate_pieces(await self._read(wanted, buffers), parts)
        finally:
            self._under_way -= 1
            kept = [buffer for buffer in buffers if len(buffer) == SPARE_SIZE]
            self._spare += kept[: MOST_SPARE - len(self._spare)]

    async def _inflate_pieces(self, pieces: list[Piece], parts: Parts) -> dict[Stored, Inflated]:
        share = -(-len(pieces) // max(1, self._threads // self._under_way))
        results: dict[Stored, Inflated] = {}

        async def work(some: list[Piece]) -> None:
            results.update(await run_in_thread(self._inflate_some, some, parts))

        if share == len(pieces):
            await work(pieces)
            return results
        await run_all([partial(work, pieces[at : at + share]) for at in range(0, len(pieces), share)])
        return results

    async def _read(self, wanted: list[Stored], buffers: list[bytearray]) -> list[Piece]:
        """The stored bytes of each cluster, in `buffers`; neighbours are read by one request."""
        pieces: list[Piece] = []
        requests = []
        for run in _runs(sorted(wanted)):
            start = run[0][0]
            length = max(o + n for o, n in run) - start
            buffers.append(self._spare.pop() if self._spare and length <= SPARE_SIZE else _fresh(length))
            buffer = memoryview(buffers[-1])[:length]
            requests.append((start, buffer))
            pieces += [((o, n), buffer[o - start : o - start + n]) for o, n in run]
        await self._file.read_into(requests)
        return pieces

    def _inflate_some(self, pieces: list[Piece], parts: Parts) -> dict[Stored, Inflated]:
        results: dict[Stored, Inflated] = {}
        for stored, data in pieces:
            try:
                cluster = results[stored] = self._inflate(data, self._size)
            except CorruptImage as error:
                results[stored] = error
            else:
                _fill(cluster, parts.pop(stored, []))
        return results

    def _keep(self, found: dict[Stored, Inflated], own: list[Stored]) -> None:
        for stored in own:
            cluster = found[stored]
            if isinstance(cluster, bytes):
                self._store.put((id(self), stored), cluster, self._size)


def _fill(cluster: bytes, parts: list[Part]) -> None:
    for start, buffer in parts:
        buffer[:] = memoryview(cluster)[start : start + len(buffer)]


def _fresh(length: int) -> bytearray:
    """A buffer for stored bytes, as large as a spare one at least."""
    return bytearray(max(length, SPARE_SIZE))


def _runs(ordered: list[Stored]) -> list[list[Stored]]:
    """Stored clusters in runs whose members follow each other closely in the host file."""
    runs: list[list[Stored]] = []
    end = 0
    for offset, length in ordered:
        if not runs or offset > end + STORED_GAP:
            runs.append([])
        runs[-1].append((offset, length))
        end = max(end, offset + length) if len(runs[-1]) > 1 else offset + length
    return runs
