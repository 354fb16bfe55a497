"""What a disk is copied into: a raw file, or a new image, compressed or not.

Owns what becomes of a piece: which of its units are written, where, and in which order. Must not know where
pieces come from, nor keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from qcowfs.codecs.compression import Compressor
from qcowfs.copying.differing import Source
from qcowfs.copying.fresh import FreshImage
from qcowfs.copying.pieces import Piece, Span, look_for_data
from qcowfs.copying.workers import Turns
from qcowfs.data.zeros import data_runs
from qcowfs.geometry import HostOffset
from qcowfs.host.hostfile import OsHostFile

SPARSE_UNIT = 4096
"""Zeros of this length and alignment become holes in a raw file."""
_CLONE_ALIGNMENT = 4096
_MOST_COPIED = 2 << 20
"""Bytes of a piece: a huge page, since the host's page cache takes the longer the smaller its pages are."""
_MOST_PACKED = 1 << 20
"""Bytes of a piece that is compressed: more would let threads wait for each other at the end."""

Encrypt = Callable[[HostOffset, memoryview], memoryview]
"""Whole clusters as they lie encrypted at a host offset."""
_LEAST_LOOKED = 1 << 14
"""Units from this size on are looked at one by one; smaller ones are read together."""


class Run(NamedTuple):
    """Guest bytes that are to be stored. Where they lie in a file as they are, `data` is not read yet.

    `blank` ones are zeros that an overlay has to hold.
    """

    guest: int
    data: memoryview
    file: OsHostFile | None
    host: HostOffset
    blank: bool = False


class Target(Protocol):
    """Takes the pieces of a disk, several at a time, and is complete after `finish`.

    Pieces are of whole `unit`s and hold at most `most` bytes. With `everything` they cover zeros too.
    """

    unit: int
    most: int
    everything: bool

    def take(self, piece: Piece, buffer: memoryview, source: Source) -> None:
        """Copy a piece of the source, in a worker thread, with a buffer of the piece's length."""

    async def finish(self) -> None:
        """Write what remains when every piece is there."""


def _parts(piece: Piece, buffer: memoryview) -> Iterator[tuple[Span, memoryview]]:
    """Each span with its part of the buffer."""
    position = 0
    for span in piece.spans:
        yield span, buffer[position : position + span.length]
        position += span.length


def _runs(piece: Piece, buffer: memoryview, unit: int, source: Source) -> list[Run]:
    """The parts of a piece that hold data, all of them read."""
    found: list[Run] = []
    for span, part in _parts(piece, buffer):
        found += [
            Run(span.guest + a, part[a:b], None, 0, blank) for a, b, blank in source.find(span, part, unit)
        ]
    return found


def _runs_to_copy(piece: Piece, buffer: memoryview, unit: int, source: Source) -> list[Run]:
    """The parts of a piece that hold data; what the host may copy is only looked at."""
    found: list[Run] = []
    for span, part in _parts(piece, buffer):
        file, host = _plain(piece, span)
        if file is None or unit < _LEAST_LOOKED:
            source.read(span, part)
            runs = data_runs(part, unit)
        else:
            runs = look_for_data(file, host, part, unit)
        found += [Run(span.guest + a, part[a:b], file, host + a) for a, b in runs]
    return found


def _plain(piece: Piece, span: Span) -> tuple[OsHostFile | None, HostOffset]:
    """The file from which the host may copy a span, if there is one, and the place in it."""
    return (span.file, span.host or 0) if piece.is_plain(span) else (None, 0)


class _HostCopies:
    """Copies that the host makes for the target where it has a quicker way; asks no more after a refusal.

    Either it lets both files share blocks, or the file system may lie elsewhere, so that bytes need not come
    by here. Else it is slower than two threads of which one reads while the other writes.
    """

    def __init__(self, file: OsHostFile, *, wanted: bool = True) -> None:
        self._file = file
        self._shares = wanted
        self._copies = wanted and file.lies_elsewhere

    @property
    def possible(self) -> bool:
        """Whether it is worth asking."""
        return self._shares or self._copies

    def share(self, source: OsHostFile | None, start: HostOffset, length: int, place: HostOffset) -> bool:
        """Whether the target shares the range now. For worker threads."""
        if not self._shares or source is None or (start | length | place) % _CLONE_ALIGNMENT:
            return False
        self._shares = self._file.clone_here(source, start, length, place)
        return self._shares

    def copy(self, source: OsHostFile, start: HostOffset, length: int, place: HostOffset) -> int:
        """How many bytes of the range are there now. For worker threads."""
        if self.share(source, start, length, place):
            return length
        done = self._file.copy_here(source, start, length, place) if self._copies else 0
        self._copies = self._copies and done > 0
        return done


class RawTarget:
    """A raw file, in which zeros are holes."""

    unit = SPARSE_UNIT
    everything = False
    most = _MOST_COPIED

    def __init__(self, file: OsHostFile, size: int) -> None:
        """A new file for a disk of `size` bytes."""
        self._file = file
        self._size = size
        self._host = _HostCopies(file)

    def take(self, piece: Piece, buffer: memoryview, source: Source) -> None:
        """Copy a piece; pieces may come in any order."""
        if all(self._host.share(s.file, s.host or 0, s.length, s.guest) for s in piece.spans):
            return
        for run in _runs(piece, buffer, self.unit, source):
            self._file.write_here(run.guest, [run.data[: self._size - run.guest]])

    async def finish(self) -> None:
        """Give the file its size."""
        await self._file.truncate(self._size)


class ExistingTarget:
    """A raw file or device that is written into; it keeps its size and what lies behind the disk's end."""

    unit = SPARSE_UNIT
    most = RawTarget.most

    def __init__(self, file: OsHostFile, size: int, *, blank: bool) -> None:
        """For a disk of `size` bytes, all of which read as zeros now if the file is `blank`."""
        self._file = file
        self._size = size
        self.everything = not blank

    def take(self, piece: Piece, buffer: memoryview, source: Source) -> None:
        """Copy a piece; pieces may come in any order."""
        runs = _runs(piece, buffer, self.unit, source)
        for run in _whole(piece, buffer, by_host=False) if self.everything else runs:
            self._file.write_here(run.guest, [run.data[: self._size - run.guest]])

    async def finish(self) -> None:
        """Nothing remains."""


class ImageTarget:
    """A new qcow2 image; clusters of zeros are left out, or only kept a place for."""

    def __init__(
        self, file: OsHostFile, image: FreshImage, turns: Turns, data_file: OsHostFile | None = None,
        encrypt: Encrypt | None = None,
    ) -> None:  # fmt: skip
        """A new file for the image, and one for its data if it has one."""
        form = image.form
        self.unit = form.cluster_size
        self.most = max(_MOST_COPIED, self.unit)
        self._file = file
        self._data_file = data_file or file
        self._image = image
        self._preallocation = form.preallocation
        self.everything = form.preallocation != "off"
        self._host = _HostCopies(self._data_file, wanted=encrypt is None and form.backing_file is None)
        self._encrypt = encrypt
        self._turns = turns

    def take(self, piece: Piece, buffer: memoryview, source: Source) -> None:
        """Copy a piece; every piece has to come, for each gets its place after the ones before."""
        by_host = self._host.possible
        written = (_runs_to_copy if by_host else _runs)(piece, buffer, self.unit, source)
        placed = written if self._preallocation == "off" else _whole(piece, buffer, by_host=by_host)
        with self._turns.turn(piece.number):
            places = [(host, run) for run in placed if (host := self._place(run)) is not None]
            tables = self._image.take_writes()
        if self._preallocation in ("metadata", "falloc") and self._encrypt is None:
            places = _within(places, written)
        rest = [part for host, run in places for part in self._copy(host, run)]
        write_together(self._data_file, _encrypted(rest, self._encrypt))
        write_together(self._file, tables)

    def _place(self, run: Run) -> HostOffset | None:
        """Where the data of a run goes; nowhere if the tables can tell that it is zeros."""
        if run.blank and self._image.form.version >= 3:
            self._image.place_zeros(run.guest, len(run.data))
            return None
        return self._image.place_data(run.guest, len(run.data))

    def _copy(self, host: HostOffset, run: Run) -> list[tuple[HostOffset, memoryview]]:
        """Have the host copy a run; what it leaves over, and what was read anyway, is still to be written."""
        if run.file is None:
            return [(host, run.data)]
        done = self._host.copy(run.file, run.host, len(run.data), host)
        if done == len(run.data):
            return []
        run.file.read_here(run.host + done, run.data[done:])
        return [(host + done, run.data[done:])]

    async def finish(self) -> None:
        """Write the tables that cover everything."""
        await self._file.write_from(self._image.finish())
        await self._file.truncate(self._image.end)
        if self._data_file is not self._file:
            await self._data_file.truncate(self._image.size)
        if self._preallocation == "falloc" and self._image.size:
            whole = self._image.end if self._data_file is self._file else self._image.size
            await self._data_file.allocate(0, whole)


def _encrypted(
    writes: list[tuple[HostOffset, memoryview]], encrypt: Encrypt | None
) -> list[tuple[HostOffset, memoryview]]:
    return writes if encrypt is None else [(host, encrypt(host, data)) for host, data in writes]


def _whole(piece: Piece, buffer: memoryview, *, by_host: bool) -> list[Run]:
    """All spans of a piece, whether they hold data or not; those that the host may copy are not read yet."""
    sources = (_plain(piece, span) if by_host else (None, 0) for span in piece.spans)
    return [
        Run(span.guest, part, *source)
        for (span, part), source in zip(_parts(piece, buffer), sources, strict=True)
    ]


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

    everything = False

    def __init__(
        self, file: OsHostFile, image: FreshImage, turns: Turns, compress: Compressor,
        encrypt: Encrypt | None = None,
    ) -> None:  # fmt: skip
        """A new file for the image."""
        self.unit = image.form.cluster_size
        self.most = max(_MOST_PACKED, self.unit)
        self._file = file
        self._image = image
        self._compress = compress
        self._encrypt = encrypt
        self._turns = turns

    def take(self, piece: Piece, buffer: memoryview, source: Source) -> None:
        """Copy a piece; every piece has to come, for each gets its place after the ones before."""
        clusters = self._pack(_runs(piece, buffer, self.unit, source))
        with self._turns.turn(piece.number):
            placed = [(self._place(guest, data), data) for guest, data in clusters]
            tables = self._image.take_writes()
        write_together(self._file, [*(self._sealed(*place) for place in placed if place[1]), *tables])

    def _sealed(self, host: HostOffset, data: bytes | memoryview) -> tuple[HostOffset, bytes | memoryview]:
        """What is written for a cluster; compressed ones are never encrypted."""
        if self._encrypt is None or len(data) < self.unit:
            return host, data
        return host, self._encrypt(host, memoryview(data))

    def _pack(self, runs: list[Run]) -> list[tuple[int, bytes | memoryview]]:
        """Each cluster that holds data, compressed where that makes it smaller; nothing for blank ones."""
        packed: list[tuple[int, bytes | memoryview]] = []
        for run in runs:
            for start in range(0, len(run.data), self.unit):
                cluster = run.data[start : start + self.unit]
                if run.blank and self._image.form.version >= 3:
                    packed.append((run.guest + start, b""))
                    continue
                smaller = self._compress(cluster)
                packed.append((run.guest + start, smaller if len(smaller) < self.unit else cluster))
        return packed

    def _place(self, guest: int, data: bytes | memoryview) -> HostOffset:
        if not data:
            self._image.place_zeros(guest, self.unit)
            return 0
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
