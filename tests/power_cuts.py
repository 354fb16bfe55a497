"""Power cuts: states that a crash may leave a host file in, made from the log of its writes and syncs.

A workload changes a disk, its size and its snapshots, and flushes now and then. For a cut after any entry of
the log, each write since the last sync may be there, be lost, or be torn by sectors. `pytest --power-cuts N`
tries N states (default 2000).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from qcowfs.disk import states
from qcowfs.disk.live import DiskWriter
from qcowfs.errors import CorruptImage, UnsupportedFeature, UsageError
from qcowfs.testing import SYNC, MemoryHostFile, Sync, Write
from tests.memory import read
from tests.shapes import SECTOR, OpenDisk, Shape

ERRNO_OF_FAULTS = (5, 28)  # EIO, ENOSPC
WHOLE = ("create", "delete", "revert", "rename", "resize")
"""The kinds of steps that change the image as a whole."""

Saved = dict[bytes, tuple[bytes, bytes]]
"""The name and the content of each snapshot, by its id."""
Work = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Change:
    """What a range of whole sectors held after one step that began at a place of the log."""

    log_before: int
    first_sector: int
    after: bytes


@dataclass
class Transition:
    """A change of the image as a whole: the places of the log where it began and ended, what it leads to."""

    begun: int
    ended: int
    live: bytes
    saved: Saved


@dataclass
class History:
    """What a workload did: all content at each flush that returned, and the changes since.

    `saved` tells the snapshots since a place of the log. While a transition is under way, the state that
    it leads to may be found in the place of the old one, whole.
    """

    shape: Shape
    model: bytearray
    acknowledged: list[tuple[int, bytes]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    saved: list[tuple[int, Saved]] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)

    def faults(self, cut: int, content: bytes, saved: Saved) -> list[str]:
        """What is wrong with the disk and the snapshots that were found, if the log ended at the cut."""
        for transition in self.transitions:
            at_work = transition.begun <= cut < transition.ended
            if at_work and (content, saved) == (transition.live, transition.saved):
                return []
        known = [since for since in self.saved if since[0] <= cut][-1][1]
        wrong = [f"snapshot {i!r}" for i in known.keys() | saved.keys() if known.get(i) != saved.get(i)]
        if len(content) != len(self._acknowledged(cut)[1]):
            return [*wrong, f"a size of {len(content)}"]
        return wrong + [f"sector {sector}" for sector in self.lost_sectors(cut, content)]

    def _acknowledged(self, cut: int) -> tuple[int, bytes]:
        return [known for known in self.acknowledged if known[0] <= cut][-1]

    def note(self, log_before: int, guest: int, length: int) -> None:
        """Note that the model's range has its present content since a place of the log."""
        first, end = guest // SECTOR, -(-(guest + length) // SECTOR)
        after = bytes(self.model[first * SECTOR : end * SECTOR])
        self.changes.append(Change(log_before, first, after))

    def lost_sectors(self, cut: int, content: bytes) -> list[int]:
        """Sectors whose bytes are neither acknowledged nor written later, if the log ended at the cut."""
        flushed_at, acknowledged = self._acknowledged(cut)
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


async def read_saved(disk: OpenDisk) -> Saved:
    """The snapshots of an open image."""
    found: Saved = {}
    for snapshot in disk.image.snapshots:
        view = disk.image.snapshot_view(snapshot)
        found[snapshot.id] = snapshot.name, await read(view, 0, view.size)
    return found


class Workload:
    """A random sequence of changes to one open disk, with its history."""

    def __init__(self, disk: OpenDisk, shape: Shape, content: bytes, seed: int, saved: Saved) -> None:
        self.disk = disk
        self.rng = random.Random(seed)
        self.history = History(shape, bytearray(content), [(0, bytes(content))], saved=[(0, saved)])
        self.is_over = False
        """Whether the header could not be put back, so that nothing more is written."""

    async def run(self, steps: int, *, faults: bool = False) -> History:
        """Do random steps; with faults, some syncs and writes of the host fail for a while."""
        kinds = ["write"] * 12 + ["zero", "unmap", "discard", "flush", "flush", *WHOLE]
        if faults:
            kinds += ["break"] * 2 + ["heal"] * 3
        for _ in range(steps):
            await self.step(self.rng.choice(kinds))
        self.disk.file.heal()
        await self.step("flush")
        return self.history

    async def step(self, kind: str) -> None:
        """One step; one that fails leaves what the disk then reads as."""
        if self.is_over:
            return
        if kind in WHOLE:
            await self.change_whole(kind, self.rng)
        elif kind == "heal":
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

    @property
    def saved(self) -> Saved:
        """The snapshots as they should be now."""
        return self.history.saved[-1][1]

    async def change_whole(self, kind: str, rng: random.Random) -> None:
        """Change the snapshots or the size; what is refused changes nothing, nor does what fails."""
        live, saved, work = self.plan(kind, rng)
        if work is None:
            return
        log = self.disk.file.log
        transition = Transition(len(log), 1 << 60, live, saved)
        self.history.transitions.append(transition)
        try:
            await work()
        except (UsageError, UnsupportedFeature):
            transition.ended = len(log)
        except CorruptImage as error:
            assert "nor put back" in str(error)  # noqa: PT017 - the step may as well succeed
            self.is_over = True
        except OSError as error:
            assert error.errno in ERRNO_OF_FAULTS  # noqa: PT017 - as above
            transition.ended = len(log)
        else:
            transition.ended = len(log)
            self.history.model[:] = live
            self.history.acknowledged.append((len(log), live))
            self.history.saved.append((len(log), saved))

    def plan(self, kind: str, rng: random.Random) -> tuple[bytes, Saved, Work | None]:
        """The live disk and the snapshots that a change leads to, and the change, if there can be one."""
        image, live, saved = self.disk.image, bytes(self.history.model), dict(self.saved)
        name = b"snapshot %d" % rng.randrange(1000)
        if kind == "create":
            saved[b"%d" % (max(map(int, saved), default=0) + 1)] = name, live
            return live, saved, lambda: states.create_snapshot(image, name)
        if kind == "resize":
            sectors = rng.choice(
                [rng.randint(1, 2 * self.history.shape.size // SECTOR), len(live) // SECTOR + 3]
            )
            size = sectors * SECTOR
            return live[:size].ljust(size, b"\0"), saved, lambda: states.resize(image, size, shrink=True)
        if not image.snapshots:
            return live, saved, None
        chosen = rng.choice(image.snapshots)
        if kind == "delete":
            del saved[chosen.id]
            return live, saved, lambda: states.delete_snapshot(image, chosen)
        if kind == "rename":
            saved[chosen.id] = name, saved[chosen.id][1]
            return live, saved, lambda: states.rename_snapshot(image, chosen, name)
        return saved[chosen.id][1], saved, lambda: states.revert(image, chosen)

    def place(self) -> tuple[int, int]:
        """A range of the disk: often some sectors, at times clusters or odd bytes."""
        size, cluster = len(self.history.model), self.history.shape.cluster_size
        unit = self.rng.choice([SECTOR, SECTOR, cluster, cluster, 1])
        start = self.rng.randrange(-(-size // unit)) * unit
        length = self.rng.choice([1, 1, 2, 3, 7, 40]) * unit
        return start, min(length, size - start, 5 * max(cluster, 8192))

    def update_model(self, kind: str, guest: int, data: bytes) -> None:
        """Do to the model what the change is meant to do to the disk."""
        shape, end = self.history.shape, guest + len(data)
        if kind != "discard":
            self.history.model[guest:end] = data if kind == "write" else bytes(len(data))
        elif not shape.discards_keep_content:
            start = -(-guest // shape.cluster_size) * shape.cluster_size
            stop = end if end == len(self.history.model) else end // shape.cluster_size * shape.cluster_size
            if start < stop:
                self.history.model[start:stop] = bytes(stop - start)

    async def change_disk(self, kind: str, guest: int, data: bytes) -> None:
        writer = self.disk.image.writer
        assert writer
        if kind == "write":
            await self._write(writer, guest, data)
        elif kind == "discard":
            await writer.discard(guest, len(data))
        else:
            await writer.zero(guest, len(data), unmap=kind == "unmap")

    async def _write(self, writer: DiskWriter, guest: int, data: bytes) -> None:
        """Write as a mount does: at once where that can be done, which every other write tries."""
        self.disk.file.is_quick = bool(sum(data) & 1)
        with suppress(OSError):
            if writer.write_now(guest, data):
                return
        await writer.write(guest, data)


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


def torn_states(initial: bytes, log: Sequence[Write | Sync]) -> Iterator[tuple[int, bytes]]:
    """(cut, bytes of the host file) for each write that crosses into one more sector, torn there."""
    state = bytearray(initial)
    for cut, entry in enumerate(log, 1):
        if not isinstance(entry, Write):
            continue
        parts = list(_sectors(entry.offset, len(entry.data)))
        for start, end in parts if len(parts) == 2 else ():
            torn = bytearray(state)
            _apply(torn, entry.offset + start, entry.data[start:end])
            yield cut, bytes(torn)
        _apply(state, entry.offset, entry.data)


class JointLog:
    """What was written to several files and when they were synced, in one order."""

    def __init__(self, files: Mapping[str, MemoryHostFile]) -> None:
        """Log what happens from now on."""
        self.initial = {name: bytes(file.data) for name, file in files.items()}
        self.entries: list[tuple[str, Write | Sync]] = []
        for name, file in files.items():
            file.log = _Part(name, self.entries)

    def crash_states(self, count: int, rng: random.Random) -> Iterator[tuple[int, dict[str, bytes]]]:
        """(cut, bytes of every file) for `count` crashes, spread over all places of the log."""
        places = len(self.entries) + 1
        cuts = rng.sample(range(places), count % places) + list(range(places)) * (count // places)
        for cut in sorted(cuts):
            yield cut, {name: self._after(name, cut, rng) for name in self.initial}

    def _after(self, name: str, cut: int, rng: random.Random) -> bytes:
        """What a file may hold after a crash."""
        log = [entry for owner, entry in self.entries[:cut] if owner == name]
        synced = max((i + 1 for i, entry in enumerate(log) if entry is SYNC), default=0)
        state = bytearray(self.initial[name])
        for entry in log[:synced]:
            if isinstance(entry, Write):
                _apply(state, entry.offset, entry.data)
        _apply_some(state, [e for e in log[synced:] if isinstance(e, Write)], rng)
        return bytes(state)


class _Part(list[Write | Sync]):
    """The log of one file, which the joint log gets as well."""

    def __init__(self, name: str, joint: list[tuple[str, Write | Sync]]) -> None:
        super().__init__()
        self._name, self._joint = name, joint

    def append(self, entry: Write | Sync) -> None:
        super().append(entry)
        self._joint.append((self._name, entry))


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
