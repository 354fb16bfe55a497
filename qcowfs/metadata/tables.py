"""All L2 tables of a view in bulk: to runs of clusters that are of one kind and follow each other.

Owns reading many tables at once, past the caches, and who decodes them. Must not know backing files or what
runs are for. Where one cluster is asked for, `mapping` is the one to ask; both implement "Cluster mapping" of
the specification.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator

from qcowfs.format.entries import OFFSET_MASK
from qcowfs.format.header import Header
from qcowfs.format.words import TABLE_WORDS
from qcowfs.geometry import TABLE_ENTRY_SIZE, GuestOffset, HostOffset
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import checkpoint
from qcowfs.metadata.mapping import LOST, UNALLOCATED
from qcowfs.metadata.runs import Run, runs_of_entries

_CHUNK_BYTES = 1 << 19
FEW_BYTES = 1 << 20
"""Bytes of all tables that are decoded sooner one by one than numpy is loaded."""


class TableWalk:
    """The tables of one view, decoded chunk by chunk; the last chunk is kept for who asks on."""

    def __init__(
        self, file: HostFile, header: Header, l1_table_offset: int, l1_size: int, few_bytes: int = FEW_BYTES
    ) -> None:
        """Read the tables of `file` whose L1 table lies there and has that many entries."""
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self._place = (l1_table_offset, l1_size)
        self._tables_at_once = max(1, _CHUNK_BYTES // self._geometry.cluster_size)
        self._l1: array[int] | None = None
        self._present: list[int] = []
        self._few_bytes = 0 if header.geometry.extended_l2 else few_bytes
        self._few = False
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
        self._l1 = TABLE_WORDS.unpack(data)
        tables = [i for i in _nonzero(data, self._l1) if self._l1[i] & OFFSET_MASK]
        self._few = len(tables) * self._geometry.cluster_size <= self._few_bytes
        self._present = [index // self._tables_at_once for index in tables]

    def _chunk_start(self, chunk: int) -> GuestOffset:
        return chunk * self._tables_at_once * self._geometry.l2_coverage

    def _next_present(self, chunk: int) -> GuestOffset:
        """Where the first chunk from `chunk` on starts that has any L2 table."""
        index = bisect_left(self._present, chunk)
        return self._chunk_start(self._present[index] if index < len(self._present) else 1 << 62)

    async def _load_chunk(self, chunk: int) -> list[Run]:
        if self._chunk[0] != chunk:
            await checkpoint()
            self._chunk = (chunk, list(await self._decode_chunk(chunk)))
        return self._chunk[1]

    async def _decode_chunk(self, chunk: int) -> Iterator[Run]:
        """The runs of a chunk; a table that cannot be read leaves its clusters lost."""
        assert self._l1 is not None  # noqa: S101 - for the type checker: `runs` has loaded it
        size, first = self._geometry.cluster_size, chunk * self._tables_at_once
        tables = [entry & OFFSET_MASK for entry in self._l1[first : first + self._tables_at_once]]
        lost = [self._is_lost(at) for at in tables]
        data = bytearray(len(tables) * size)
        view, guest = memoryview(data), self._chunk_start(chunk)
        requests = [
            (at, view[i * size : (i + 1) * size])
            for i, at in enumerate(tables)
            if at and not lost[i]
        ]  # fmt: skip
        await self._file.read_into(requests)
        if self._few:
            return self._one_by_one(TABLE_WORDS.unpack(data), lost, guest)
        from qcowfs.metadata.table_arrays import runs_of_tables

        return runs_of_tables(data, lost, self._header, guest)

    def _is_lost(self, table: HostOffset) -> bool:
        aligned = self._geometry.is_cluster_aligned(table)
        return bool(table) and (not aligned or table >= self._file.facts().size)

    def _one_by_one(self, words: array[int], lost: list[bool], guest: GuestOffset) -> Iterator[Run]:
        coverage, per_table = self._geometry.l2_coverage, len(words) // len(lost)
        for index, is_lost in enumerate(lost):
            start = guest + index * coverage
            if is_lost:
                yield Run(start, coverage, LOST, None, shared=False, stored=0)
            else:
                table = words[index * per_table : (index + 1) * per_table]
                yield from runs_of_entries(table, self._header, start)


def _nonzero(data: bytearray, words: array[int]) -> Iterator[int]:
    """The indices of words that are not zero; a large table is mostly zeros, which are passed over."""
    piece = bytearray(_CHUNK_BYTES >> 7)
    step = len(piece) // TABLE_ENTRY_SIZE
    for start in range(0, len(words), step):
        if data.startswith(piece, start * TABLE_ENTRY_SIZE):
            continue
        yield from (i for i in range(start, min(start + step, len(words))) if words[i])


def _cut(run: Run, start: GuestOffset, end: GuestOffset) -> Run | None:
    """The part of a run that lies in `[start, end)`."""
    low, high = max(run.guest, start), min(run.guest + run.length, end)
    if low >= high:
        return None
    if high - low == run.length:
        return run
    host = None if run.host is None else run.host + low - run.guest
    return Run(low, high - low, run.kind, host, run.shared, run.stored * (high - low) // run.length)
