"""Guest data in its file: any bytes are read and written, sectors are encrypted whole, and none is torn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from qcowfs.codecs.encryption import make_cipher, make_legacy_cipher
from qcowfs.data.guest_data import INLINE_BYTES, DataPort, EncryptedData, PlainData
from qcowfs.errors import CorruptImage
from qcowfs.geometry import SECTOR_SIZE, Geometry
from qcowfs.host.hostfile import HostFile, ReadRequest, WriteRequest
from qcowfs.testing import MemoryHostFile
from tests.asserting import raises_exactly
from tests.host_files import WaitingFile

GEOMETRY = Geometry(cluster_bits=9)
SECTORS = 12
SIZE = SECTORS * SECTOR_SIZE
AWAY = 5 * SECTOR_SIZE
"""How much greater guest offsets are than host offsets, to tell which of them numbers the sectors."""
KEY = bytes(range(32))


def plain(file: HostFile) -> DataPort:
    return PlainData(file, GEOMETRY)


def luks_xts(file: HostFile) -> DataPort:
    return EncryptedData(file, GEOMETRY, make_cipher("aes", "xts-plain64", KEY), by_guest=False)


def luks_cbc(file: HostFile) -> DataPort:
    return EncryptedData(file, GEOMETRY, make_cipher("aes", "cbc-essiv:sha256", KEY), by_guest=False)


def legacy(file: HostFile) -> DataPort:
    return EncryptedData(file, GEOMETRY, make_legacy_cipher(KEY), by_guest=True)


Kind = Callable[[HostFile], DataPort]
ENCRYPTED: list[Kind] = [luks_xts, luks_cbc, legacy]
encrypted_kinds = pytest.mark.parametrize("kind", ENCRYPTED)
every_kind = pytest.mark.parametrize("kind", [plain, *ENCRYPTED])


class CachedFile(MemoryHostFile):
    """A memory file that never needs waiting."""

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = bytes(self.data[offset : offset + len(buffer)]).ljust(len(buffer), b"\0")
        return True

    def write_now(self, offset: int, data: bytes | memoryview) -> bool:
        self.data[offset : offset + len(data)] = data
        return True


class TearingFile(CachedFile):
    """A file whose reads and writes happen in pieces, as the host's do; some happen at once."""

    PIECE = 200

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            for at in range(0, len(buffer), self.PIECE):
                await trio.lowlevel.checkpoint()
                await super().read_into([(offset + at, buffer[at : at + self.PIECE])])

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        for offset, data in requests:
            for at in range(0, len(data), self.PIECE):
                await trio.lowlevel.checkpoint()
                await super().write_from([(offset + at, memoryview(data)[at : at + self.PIECE])])


async def filled(kind: Kind, file: MemoryHostFile, value: int = 0) -> DataPort:
    """The file's data with one value in every byte."""
    port = kind(file)
    await port.write_from([(AWAY, 0, bytes([value]) * SIZE)])
    return port


async def write(port: DataPort, start: int, data: bytes) -> None:
    """As the engine does: at once if possible."""
    if not port.write_now(AWAY + start, start, data):
        await port.write_from([(AWAY + start, start, data)])


async def read(port: DataPort, start: int, length: int) -> bytes:
    """As the engine does: at once if possible."""
    buffer = bytearray(length)
    if not port.read_cached(AWAY + start, start, memoryview(buffer)):
        await port.read_into([(AWAY + start, start, memoryview(buffer))])
    return bytes(buffer)


# -- rounding to sectors

PLACES = st.one_of(
    st.integers(0, SIZE - 1), st.integers(0, SECTORS - 1).map(lambda sector: sector * SECTOR_SIZE)
)
LENGTHS = st.one_of(st.integers(1, 3 * SECTOR_SIZE), st.integers(1, 3).map(lambda count: count * SECTOR_SIZE))
RANGES = st.tuples(PLACES, LENGTHS).map(lambda r: (r[0], min(r[1], SIZE - r[0])))


@every_kind
@pytest.mark.parametrize("file", [MemoryHostFile, CachedFile])
@given(writes=st.lists(RANGES, max_size=8), wanted=RANGES)
def test_any_bytes_read_as_they_were_written_last(
    kind: Kind, file: type[MemoryHostFile], writes: list[tuple[int, int]], wanted: tuple[int, int]
) -> None:
    trio.run(read_as_written, kind, file(b""), writes, wanted)


async def read_as_written(
    kind: Kind, file: MemoryHostFile, writes: list[tuple[int, int]], wanted: tuple[int, int]
) -> None:
    port = await filled(kind, file)
    model = bytearray(SIZE)
    for number, (start, length) in enumerate(writes, 1):
        before = bytes(file.data)
        await write(port, start, bytes([number]) * length)
        model[start : start + length] = bytes([number]) * length
        touched = range(start // SECTOR_SIZE * SECTOR_SIZE, -(-(start + length) // SECTOR_SIZE) * SECTOR_SIZE)
        assert file.data[: touched.start] == before[: touched.start]
        assert file.data[touched.stop :] == before[touched.stop :]
    start, length = wanted
    assert await read(port, start, length) == model[start : start + length]
    assert await read(port, 0, SIZE) == model


@every_kind
@given(cuts=st.lists(st.integers(1, SIZE - 1), unique=True).map(sorted), start=st.integers(0, SECTOR_SIZE))
def test_requests_that_meet_within_a_sector_are_all_done(kind: Kind, cuts: list[int], start: int) -> None:
    trio.run(all_are_done, kind, [start, *(cut for cut in cuts if cut > start), SIZE])


async def all_are_done(kind: Kind, bounds: list[int]) -> None:
    port = await filled(kind, MemoryHostFile(b""), 0xEE)
    data = [bytes([number % 251]) * (end - start) for number, (start, end) in enumerate(pairwise(bounds))]
    await port.write_from([(AWAY + start, start, d) for start, d in zip(bounds, data, strict=False)])
    assert await read(port, 0, SIZE) == b"\xee" * bounds[0] + b"".join(data)
    buffers = [bytearray(len(d)) for d in data]
    await port.read_into(
        [(AWAY + s, s, memoryview(buffer)) for s, buffer in zip(bounds, buffers, strict=False)]
    )
    assert buffers == data


@pytest.mark.parametrize(("kind", "by_guest"), [(luks_xts, False), (luks_cbc, False), (legacy, True)])
async def test_equal_sectors_differ_in_the_file_by_the_offset_that_numbers_them(
    kind: Kind, by_guest: bool
) -> None:
    first, moved = MemoryHostFile(b""), MemoryHostFile(b"")
    data = b"same" * (2 * SECTOR_SIZE // 4)
    await kind(first).write_from([(0, 0, data)])
    await kind(moved).write_from([(0, SECTOR_SIZE, data)])
    sectors = {bytes(first.data[at : at + SECTOR_SIZE]) for at in (0, SECTOR_SIZE)}
    assert len(sectors) == 2
    assert b"same" not in first.data
    assert (moved.data[SECTOR_SIZE : 2 * SECTOR_SIZE] == first.data[:SECTOR_SIZE]) is by_guest


@encrypted_kinds
async def test_large_runs_are_done_in_a_thread_and_read_the_same(kind: Kind) -> None:
    data = bytes(range(256)) * (INLINE_BYTES // 128)
    port = kind(CachedFile(b""))
    assert not port.write_now(0, 0, data)
    await port.write_from([(0, 0, data)])
    buffer = bytearray(len(data))
    assert not port.read_cached(0, 0, memoryview(buffer))
    await port.read_into([(0, 0, memoryview(buffer))])
    assert buffer == data


# -- the file's end


async def test_a_cluster_may_end_in_a_hole_but_an_encrypted_sector_may_not() -> None:
    geometry = Geometry(cluster_bits=12)
    file = MemoryHostFile(b"")
    assert PlainData(file, geometry).readable_end(4097) == 8192
    cipher = make_legacy_cipher(KEY)
    port = EncryptedData(file, geometry, cipher, by_guest=True)
    assert (port.readable_end(4097), port.readable_end(4607)) == (4096, 4096)
    assert port.readable_end(4608) == 4608


@encrypted_kinds
@pytest.mark.parametrize(("start", "length"), [(SIZE + 7, 3), (SIZE - 5, 10)])
async def test_part_of_a_sector_beyond_the_files_end_is_refused_and_nothing_is_written(
    kind: Kind, start: int, length: int
) -> None:
    file = MemoryHostFile(b"")
    port = await filled(kind, file)
    before = bytes(file.data)
    sector = start // SECTOR_SIZE * SECTOR_SIZE
    where = f"guest offset {AWAY + start:#x}, host offset {sector:#x}"
    with raises_exactly(CorruptImage, f"{where}: the sector to change lies past the end of the file"):
        await port.write_from([(AWAY + start, start, b"x" * length)])
    assert file.data == before
    await port.write_from([(AWAY + SIZE, SIZE, b"y" * SECTOR_SIZE)])
    assert await read(port, SIZE, SECTOR_SIZE) == b"y" * SECTOR_SIZE


@encrypted_kinds
async def test_after_a_failure_of_the_host_the_sectors_can_be_used_again(kind: Kind) -> None:
    file = MemoryHostFile(b"")
    port = await filled(kind, file)
    file.fail_reads(0, SIZE)
    with pytest.raises(OSError, match="Input/output error"):
        await port.read_into([(AWAY, 0, memoryview(bytearray(SIZE)))])
    with pytest.raises(OSError, match="Input/output error"):
        await port.write_from([(AWAY + 1, 1, b"x")])
    file.heal()
    await port.write_from([(AWAY + 1, 1, b"x")])
    assert await read(port, 0, 3) == b"\0x\0"


# -- reads and writes of the same sectors at the same time


@dataclass(frozen=True)
class Step:
    """A read or a write that starts after some moments; each write has a value of its own."""

    start: int
    length: int
    moment: int
    writes: bool


STEPS = st.lists(
    st.tuples(RANGES, st.integers(0, 12), st.booleans()).map(lambda s: Step(*s[0], s[1], s[2])), max_size=10
)


@encrypted_kinds
@given(steps=STEPS)
def test_a_read_beside_writes_finds_only_what_somebody_wrote(kind: Kind, steps: list[Step]) -> None:
    trio.run(find_only_what_was_written, kind, steps)


async def find_only_what_was_written(kind: Kind, steps: list[Step]) -> None:
    port = await filled(kind, TearingFile(b""))
    values: list[set[int]] = [{0} for _ in range(SIZE)]
    for number, step in enumerate(steps, 1):
        for at in range(step.start, step.start + step.length) if step.writes else ():
            values[at].add(number)

    async def do(number: int, step: Step) -> None:
        for _ in range(step.moment):
            await trio.lowlevel.checkpoint()
        if step.writes:
            await write(port, step.start, bytes([number]) * step.length)
        else:
            found = await read(port, step.start, step.length)
            assert all(byte in values[step.start + at] for at, byte in enumerate(found))

    async with trio.open_nursery() as nursery:
        for number, step in enumerate(steps, 1):
            nursery.start_soon(do, number, step)
    found = await read(port, 0, SIZE)
    assert all(
        byte in written and (byte or len(written) == 1) for byte, written in zip(found, values, strict=True)
    )


@encrypted_kinds
@pytest.mark.parametrize("length", [SECTOR_SIZE, 100])
async def test_a_read_waits_for_a_write_that_is_half_done(kind: Kind, length: int) -> None:
    file = TearingFile(b"")
    port = await filled(kind, file)
    found = []

    async def read_again() -> None:
        found.append(await read(port, 0, SECTOR_SIZE))

    before = len(file.log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.write_from, [(AWAY, 0, b"x" * length)])
        while len(file.log) == before:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(read_again)
    assert len(file.log) - before == math.ceil(SECTOR_SIZE / TearingFile.PIECE)
    assert found == [(b"x" * length).ljust(SECTOR_SIZE, b"\0")]


class HeldFile(CachedFile, WaitingFile):
    """A file that answers at once, or waits where it is told to."""


@encrypted_kinds
async def test_a_write_at_once_is_refused_while_the_sector_is_read(kind: Kind, nursery: trio.Nursery) -> None:
    file = HeldFile(b"")
    port = await filled(kind, file)
    file.hold.add("read")
    nursery.start_soon(port.read_into, [(AWAY + 1, 1, memoryview(bytearray(3)))])
    await wait_all_tasks_blocked()
    assert not port.write_now(AWAY, 0, bytes(SECTOR_SIZE))
    assert port.write_now(AWAY + SECTOR_SIZE, SECTOR_SIZE, bytes(SECTOR_SIZE))
    file.release()
    await wait_all_tasks_blocked()
    assert port.write_now(AWAY, 0, bytes(SECTOR_SIZE))


@encrypted_kinds
async def test_a_read_at_once_is_refused_while_the_sector_is_written(
    kind: Kind, nursery: trio.Nursery
) -> None:
    file = HeldFile(b"")
    port = await filled(kind, file)
    file.hold.add("write")
    nursery.start_soon(port.write_from, [(AWAY + 1, 1, b"x")])
    await wait_all_tasks_blocked()
    buffer = bytearray(SECTOR_SIZE)
    assert not port.read_cached(AWAY, 0, memoryview(buffer))
    assert port.read_cached(AWAY + SECTOR_SIZE, SECTOR_SIZE, memoryview(buffer))
    file.release()
    await wait_all_tasks_blocked()
    assert port.read_cached(AWAY, 0, memoryview(buffer))
    assert buffer[:3] == b"\0x\0"


async def test_reads_of_the_same_sectors_go_together(nursery: trio.Nursery) -> None:
    file = HeldFile(b"")
    port = await filled(luks_xts, file, 7)
    file.hold.add("read")
    nursery.start_soon(port.read_into, [(AWAY, 0, memoryview(bytearray(SIZE)))])
    await wait_all_tasks_blocked()
    buffer = bytearray(SIZE)
    assert port.read_cached(AWAY, 0, memoryview(buffer))
    assert buffer == b"\7" * SIZE
    file.release()
