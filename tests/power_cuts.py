"""Power cuts: states that a crash may leave a host file in, made from the log of its writes and syncs.

A workload changes a disk and flushes now and then. For a cut after any entry of the log, each write since the
last sync may be there, be lost, or be torn by sectors. `pytest --power-cuts N` tries N states (default 2000).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qcowfs.testing import SYNC, Sync, Write
from tests.shapes import SECTOR, OpenDisk, Shape

ERRNO_OF_FAULTS = (5, 28)  # EIO, ENOSPC


@dataclass(frozen=True)
class Change:
    """What a range of whole sectors held after one step that began at a place of the log."""

    log_before: int
    first_sector: int
    after: bytes


@dataclass
class History:
    """What a workload did: all content at each flush that returned, and the changes since."""

    shape: Shape
    model: bytearray
    acknowledged: list[tuple[int, bytes]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def note(self, log_before: int, guest: int, length: int) -> None:
        """Note that the model's range has its present content since a place of the log."""
        first, end = guest // SECTOR, -(-(guest + length) // SECTOR)
        after = bytes(self.model[first * SECTOR : end * SECTOR])
        self.changes.append(Change(log_before, first, after))

    def lost_sectors(self, cut: int, content: bytes) -> list[int]:
        """Sectors whose bytes are neither acknowledged nor written later, if the log ended at the cut."""
        flushed_at, acknowledged = max(a for a in self.acknowledged if a[0] <= cut)
        if content == acknowledged:
            return []
        versions = self._versions(flushed_at, cut)
        wrong = []
        for sector in range(len(content) // SECTOR):
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if content[place] == acknowledged[place]:
                continue
            if not _is_mixture(content[place], [acknowledged[place], *versions.get(sector, [])]):
                wrong.append(sector)
        return wrong

    def _versions(self, since: int, cut: int) -> dict[int, list[bytes]]:
        """What was written to each sector between two places of the log."""
        versions: dict[int, list[bytes]] = {}
        for change in self.changes:
            if since <= change.log_before < cut:
                for start in range(0, len(change.after), SECTOR):
                    sector = change.first_sector + start // SECTOR
                    versions.setdefault(sector, []).append(change.after[start : start + SECTOR])
        return versions


def _is_mixture(sector: bytes, versions: list[bytes]) -> bool:
    """Whether each byte comes from one of the versions: writes that are no sectors may overlap."""
    if sector in versions:
        return True
    return all(byte in {v[i] for v in versions} for i, byte in enumerate(sector))


class Workload:
    """A random sequence of changes to one open disk, with its history."""

    def __init__(self, disk: OpenDisk, shape: Shape, content: bytes, seed: int) -> None:
        self.disk = disk
        self.rng = random.Random(seed)
        self.history = History(shape, bytearray(content), [(0, bytes(content))])

    async def run(self, steps: int, *, faults: bool = False) -> History:
        """Do random steps; with faults, some syncs and writes of the host fail for a while."""
        kinds = ["write"] * 8 + ["zero", "unmap", "discard", "flush", "flush"]
        if faults:
            kinds += ["break"] * 2 + ["heal"] * 3
        for _ in range(steps):
            await self.step(self.rng.choice(kinds))
        self.disk.file.heal()
        await self.step("flush")
        return self.history

    async def step(self, kind: str) -> None:
        """One step; one that fails leaves what the disk then reads as."""
        if kind == "heal":
            self.disk.file.heal()
        elif kind == "break":
            self.break_something()
        elif kind == "flush":
            await self.flush()
        else:
            await self.change(kind)

    def break_something(self) -> None:
        """Let the host fail: a few syncs, a place of the file, or all growth of it."""
        kind, size = self.rng.choice(["sync", "place", "growth", "all"]), len(self.disk.file.data)
        error = self.rng.choice(ERRNO_OF_FAULTS)
        if kind == "sync":
            self.disk.file.fail_next_syncs = self.rng.randint(1, 3)
        elif kind == "place":
            self.disk.file.fail_writes(self.rng.randrange(size), self.rng.choice([1, 4096, 65536]), error)
        elif kind == "growth":
            self.disk.file.fail_writes(size, 1 << 50, 28)
        else:
            self.disk.file.fail_writes(0, 1 << 50, error)

    async def flush(self) -> None:
        assert self.disk.image.writer
        try:
            await self.disk.image.writer.flush()
        except OSError as error:
            assert error.errno in ERRNO_OF_FAULTS  # noqa: PT017 - the step may as well succeed
            return
        self.history.acknowledged.append((len(self.disk.file.log), bytes(self.history.model)))

    async def change(self, kind: str) -> None:
        guest, length = self.place()
        before = len(self.disk.file.log)
        self.update_model(kind, guest, data := self.rng.randbytes(length))
        self.history.note(before, guest, length)
        try:
            await self.change_disk(kind, guest, data)
        except OSError as error:
            assert error.errno in ERRNO_OF_FAULTS  # noqa: PT017 - the step may as well succeed
            self.history.model[guest : guest + length] = await self.disk.read(guest, length)
            self.history.note(before, guest, length)

    def place(self) -> tuple[int, int]:
        """A range of the disk: often some sectors, at times clusters or odd bytes."""
        size, cluster = self.disk.size, self.history.shape.cluster_size
        unit = self.rng.choice([SECTOR, SECTOR, cluster, cluster, 1])
        start = self.rng.randrange(size // unit) * unit
        length = self.rng.choice([1, 1, 2, 3, 7, 40]) * unit
        return start, min(length, size - start, 5 * max(cluster, 8192))

    def update_model(self, kind: str, guest: int, data: bytes) -> None:
        """Do to the model what the change is meant to do to the disk."""
        shape, end = self.history.shape, guest + len(data)
        if kind != "discard":
            self.history.model[guest:end] = data if kind == "write" else bytes(len(data))
        elif not shape.discards_keep_content:
            start = -(-guest // shape.cluster_size) * shape.cluster_size
            stop = end if end == self.disk.size else end // shape.cluster_size * shape.cluster_size
            if start < stop:
                self.history.model[start:stop] = bytes(stop - start)

    async def change_disk(self, kind: str, guest: int, data: bytes) -> None:
        writer = self.disk.image.writer
        assert writer
        if kind == "write":
            await writer.write(guest, data)
        elif kind == "discard":
            await writer.discard(guest, len(data))
        else:
            await writer.zero(guest, len(data), unmap=kind == "unmap")


def crash_states(
    initial: bytes, log: Sequence[Write | Sync], count: int, rng: random.Random
) -> Iterator[tuple[int, bytes]]:
    """(cut, bytes of the host file) for `count` crashes, spread over all places of the log."""
    cuts = sorted(rng.sample(range(len(log) + 1), count % (len(log) + 1)))
    cuts = sorted(cuts + list(range(len(log) + 1)) * (count // (len(log) + 1)))
    synced, base = 0, bytearray(initial)
    for cut in cuts:
        last_sync = max((i + 1 for i in range(synced, cut) if log[i] is SYNC), default=synced)
        for entry in log[synced:last_sync]:
            if isinstance(entry, Write):
                _apply(base, entry.offset, entry.data)
        synced = last_sync
        state = bytearray(base)
        _apply_some(state, [e for e in log[synced:cut] if isinstance(e, Write)], rng)
        yield cut, bytes(state)


def _apply(data: bytearray, offset: int, written: bytes) -> None:
    if len(data) < offset:
        data += bytes(offset - len(data))
    data[offset : offset + len(written)] = written


def _apply_some(data: bytearray, writes: list[Write], rng: random.Random) -> None:
    """Keep, drop or tear each of the writes."""
    keep, tear = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]), rng.choice([0.0, 0.3, 1.0])
    for write in writes:
        if rng.random() < tear:
            for start, end in _sectors(write.offset, len(write.data)):
                if rng.random() < keep:
                    _apply(data, write.offset + start, write.data[start:end])
        elif rng.random() < keep:
            _apply(data, write.offset, write.data)


def _sectors(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a write that lie in different sectors of the host file, as places of its data."""
    start = 0
    while start < length:
        end = min(length, start + SECTOR - (offset + start) % SECTOR)
        yield start, end
        start = end
