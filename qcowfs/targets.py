"""What a disk is copied into: a raw file, or a new image, compressed or not.

Owns what becomes of a piece: which of its units are written, where, and in which order. Must not know where
pieces come from, nor keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from qcowfs.codecs.compression import Compressor
from qcowfs.creation import Creation
from qcowfs.fresh import FreshImage
from qcowfs.geometry import HostOffset
from qcowfs.hostfile import OsHostFile
from qcowfs.pieces import Piece
from qcowfs.workers import Turns
from qcowfs.zeros import data_runs

SPARSE_UNIT = 4096
"""Zeros of this length and alignment become holes in a raw file."""
_CLONE_ALIGNMENT = 4096

Reading = Callable[[Piece, memoryview], None]
Encrypt = Callable[[HostOffset, memoryview], memoryview]
"""Whole clusters as they lie encrypted at a host offset."""


class Run(NamedTuple):
    """Guest bytes that are not all zeros, and where they were read from, if directly."""

    guest: int
    data: memoryview
    file: OsHostFile | None
    host: HostOffset


class Target(Protocol):
    """Takes the pieces of a disk, several at a time, and is complete after `finish`."""

    unit: int

    def take(self, piece: Piece, buffer: memoryview, read: Reading) -> None:
        """Copy a piece, in a worker thread; `read` fills the buffer with it."""

    async def finish(self) -> None:
        """Write what remains when every piece is there."""


def _runs(piece: Piece, buffer: memoryview, unit: int) -> list[Run]:
    """The parts of a piece in the buffer that hold data."""
    found, position = [], 0
    for span in piece.spans:
        part = buffer[position : position + span.length]
        host = span.host or 0
        found += [Run(span.guest + a, part[a:b], span.file, host + a) for a, b in data_runs(part, unit)]
        position += span.length
    return found


class _Cloner:
    """Lets the target share blocks with the source where the host can; asks no more after a refusal."""

    def __init__(self, file: OsHostFile, *, works: bool = True) -> None:
        self._file = file
        self._works = works

    def clone(self, source: OsHostFile | None, start: HostOffset, length: int, place: HostOffset) -> bool:
        """Whether the range is there now. For worker threads."""
        if not self._works or source is None or (start | length | place) % _CLONE_ALIGNMENT:
            return False
        self._works = self._file.clone_here(source, start, length, place)
        return self._works


class RawTarget:
    """A raw file, in which zeros are holes."""

    unit = SPARSE_UNIT

    def __init__(self, file: OsHostFile, size: int) -> None:
        """A new file for a disk of `size` bytes."""
        self._file = file
        self._size = size
        self._cloner = _Cloner(file)

    def take(self, piece: Piece, buffer: memoryview, read: Reading) -> None:
        """Copy a piece; pieces may come in any order."""
        if all(self._cloner.clone(s.file, s.host or 0, s.length, s.guest) for s in piece.spans):
            return
        read(piece, buffer)
        for run in _runs(piece, buffer, self.unit):
            self._file.write_here(run.guest, [run.data[: self._size - run.guest]])

    async def finish(self) -> None:
        """Give the file its size."""
        await self._file.truncate(self._size)


class ImageTarget:
    """A new qcow2 image; clusters of zeros are left out, or only kept a place for."""

    def __init__(
        self, file: OsHostFile, form: Creation, size: int, turns: Turns, data_file: OsHostFile | None = None,
        encrypt: Encrypt | None = None,
    ) -> None:  # fmt: skip
        """A new file, and one for the data if the form has one, for a disk of `size` bytes."""
        self.unit = form.cluster_size
        self._file = file
        self._data_file = data_file or file
        self._size = size
        self._image = FreshImage(form, size)
        self._preallocation = form.preallocation
        self._cloner = _Cloner(self._data_file, works=encrypt is None)
        self._encrypt = encrypt
        self._turns = turns

    def take(self, piece: Piece, buffer: memoryview, read: Reading) -> None:
        """Copy a piece; every piece has to come, for each gets its place after the ones before."""
        read(piece, buffer)
        written = _runs(piece, buffer, self.unit)
        placed = written if self._preallocation == "off" else _whole(piece, buffer)
        with self._turns.turn(piece.number):
            places = [(self._image.place_data(run.guest, len(run.data)), run) for run in placed]
            tables = self._image.take_writes()
        if self._preallocation in ("metadata", "falloc") and self._encrypt is None:
            places = _within(places, written)
        rest = [
            (host, run.data)
            for host, run in places
            if run.guest + len(run.data) > self._size
            or not self._cloner.clone(run.file, run.host, len(run.data), host)
        ]
        write_together(self._data_file, _encrypted(rest, self._encrypt))
        write_together(self._file, tables)

    async def finish(self) -> None:
        """Write the tables that cover everything."""
        await self._file.write_from(self._image.finish())
        await self._file.truncate(self._image.end)
        if self._data_file is not self._file:
            await self._data_file.truncate(self._size)
        if self._preallocation == "falloc" and self._size:
            whole = self._image.end if self._data_file is self._file else self._size
            await self._data_file.allocate(0, whole)


def _encrypted(
    writes: list[tuple[HostOffset, memoryview]], encrypt: Encrypt | None
) -> list[tuple[HostOffset, memoryview]]:
    return writes if encrypt is None else [(host, encrypt(host, data)) for host, data in writes]


def _whole(piece: Piece, buffer: memoryview) -> list[Run]:
    """All spans of a piece, whether they hold data or not."""
    found, position = [], 0
    for span in piece.spans:
        part = buffer[position : position + span.length]
        found.append(Run(span.guest, part, span.file, span.host or 0))
        position += span.length
    return found


def _within(places: list[tuple[HostOffset, Run]], runs: list[Run]) -> list[tuple[HostOffset, Run]]:
    """The places of runs that are parts of placed ones; both are in order."""
    found, remaining = [], iter(places)
    host, whole = next(remaining, (0, None))
    for run in runs:
        while whole is not None and run.guest >= whole.guest + len(whole.data):
            host, whole = next(remaining, (0, None))
        if whole is not None:
            found.append((host + run.guest - whole.guest, run))
    return found


class CompressedTarget:
    """A new qcow2 image with compressed clusters; those that do not shrink are stored as they are."""

    def __init__(
        self, file: OsHostFile, form: Creation, size: int, turns: Turns, compress: Compressor,
        encrypt: Encrypt | None = None,
    ) -> None:  # fmt: skip
        """A new file for a disk of `size` bytes."""
        self.unit = form.cluster_size
        self._file = file
        self._image = FreshImage(form, size)
        self._compress = compress
        self._encrypt = encrypt
        self._turns = turns

    def take(self, piece: Piece, buffer: memoryview, read: Reading) -> None:
        """Copy a piece; every piece has to come, for each gets its place after the ones before."""
        read(piece, buffer)
        clusters = self._pack(piece, buffer)
        with self._turns.turn(piece.number):
            placed = [(self._place(guest, data), data) for guest, data in clusters]
            tables = self._image.take_writes()
        write_together(self._file, [*(self._sealed(*place) for place in placed), *tables])

    def _sealed(self, host: HostOffset, data: bytes | memoryview) -> tuple[HostOffset, bytes | memoryview]:
        """What is written for a cluster; compressed ones are never encrypted."""
        if self._encrypt is None or len(data) < self.unit:
            return host, data
        return host, self._encrypt(host, memoryview(data))

    def _pack(self, piece: Piece, buffer: memoryview) -> list[tuple[int, bytes | memoryview]]:
        """Each cluster that holds data, compressed where that makes it smaller."""
        packed: list[tuple[int, bytes | memoryview]] = []
        for run in _runs(piece, buffer, self.unit):
            for start in range(0, len(run.data), self.unit):
                cluster = run.data[start : start + self.unit]
                smaller = self._compress(cluster)
                packed.append((run.guest + start, smaller if len(smaller) < self.unit else cluster))
        return packed

    def _place(self, guest: int, data: bytes | memoryview) -> HostOffset:
        if len(data) < self.unit:
            return self._image.place_compressed(guest, len(data))
        return self._image.place_data(guest, self.unit)

    async def finish(self) -> None:
        """Write the tables that cover everything."""
        await self._file.write_from(self._image.finish())
        await self._file.truncate(self._image.end)


def write_together(file: OsHostFile, writes: Sequence[tuple[HostOffset, bytes | memoryview]]) -> None:
    """Write buffers to their places; those that follow each other by one call. For worker threads."""
    parts: list[memoryview] = []
    start = end = 0
    for host, data in sorted(writes, key=lambda write: write[0]):
        if host != end and parts:
            file.write_here(start, parts)
            parts = []
        start = start if parts else host
        parts.append(memoryview(data))
        end = host + len(data)
    if parts:
        file.write_here(start, parts)
