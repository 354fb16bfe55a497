"""What reaches the disk before what, and what a flush that fails leaves to the next one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from qcowfs.check import check
from qcowfs.disk import states
from qcowfs.host.hostfile import ReadRequest, WriteRequest
from qcowfs.testing import MemoryHostFile, Punch, Sync, Write
from tests.host_files import WaitingFile, open_file, place_of_entry, word, writer_of
from tests.memory import read
from tests.power_cuts import crash_states
from tests.shapes import DISK, Shape, make, qemu

C = 512
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
EMPTY = Shape(cluster_size=C, size=200 << 10, filled=False)
GROWING = Shape(cluster_size=C, size=2200 << 10, refcount_bits=64, bulk=1900 << 10, filled=False)


class FailingOnce(MemoryHostFile):
    """A file where the n-th write or sync fails."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = 1 << 30

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(5, "injected")

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        for request in requests:
            self._count()
            await super().write_from([request])

    async def sync(self) -> None:
        self._count()
        await super().sync()


def places(data: bytes | bytearray) -> dict[str, set[int]]:
    """The clusters of each kind of metadata, by index."""
    size, l1, l1_size = 1 << word(data, 20, 4), word(data, 40), word(data, 36, 4)
    table, clusters = word(data, 48), word(data, 56, 4)
    blocks = {word(data, at) // size for at in range(table, table + clusters * size, 8)}
    tables = {(word(data, at) & OFFSET_MASK) // size for at in range(l1, l1 + l1_size * 8, 8)}
    return {
        "header": {0},
        "L1": set(range(l1 // size, (l1 + l1_size * 8 - 1) // size + 1)),
        "table": set(range(table // size, table // size + clusters)),
        "blocks": blocks - {0},
        "L2": tables - {0},
    }


def steps(file: MemoryHostFile, log: Sequence[Write | Sync]) -> list[set[str]]:
    """The kinds of what is written between two syncs each."""
    size, kinds = 1 << word(file.data, 20, 4), places(file.data)
    found: list[set[str]] = [set()]
    for entry in log:
        if isinstance(entry, Sync):
            found.append(set())
        elif not isinstance(entry, Punch):
            cluster = entry.offset // size
            found[-1].add(next((kind for kind, there in kinds.items() if cluster in there), "data"))
    assert found.pop() == set(), "everything is synced"
    return found


def assert_in_order(found: list[set[str]], *kinds: str) -> None:
    """Each kind is written, and only after a sync of all that is written of the one before."""
    for first, second in pairwise(kinds):
        last = max(n for n, step in enumerate(found) if first in step)
        assert last < min(n for n, step in enumerate(found) if second in step), (first, second, found)


async def test_a_new_table_is_linked_after_all_that_it_needs() -> None:
    file = MemoryHostFile(make(EMPTY).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    await writer_of(image).flush()
    found = steps(file, file.log)
    for kind in ("data", "blocks", "L2"):
        assert_in_order(found, kind, "L1")
    image.close()


async def test_an_entry_of_an_old_table_is_written_after_data_and_counts() -> None:
    file = MemoryHostFile(make(EMPTY).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    await writer_of(image).flush()
    file.log.clear()
    await writer_of(image).write(C, b"y" * C)
    await writer_of(image).flush()
    found = steps(file, file.log)
    assert_in_order(found, "data", "L2")
    assert_in_order(found, "blocks", "L2")
    assert "L1" not in set.union(*found)
    image.close()


async def test_a_refcount_table_that_moves_is_named_last_and_before_what_it_counts() -> None:
    file = MemoryHostFile(make(GROWING).files[DISK])
    old = word(file.data, 48)
    image = await open_file(file)
    await writer_of(image).write(1900 << 10, b"x" * (250 << 10))
    await writer_of(image).flush()
    assert word(file.data, 48) != old
    found = steps(file, file.log)
    assert_in_order(found, "blocks", "table", "header", "L1")
    await image.aclose()
    assert (await check(file)).is_clean


async def test_the_old_refcount_table_is_freed_only_after_the_new_one_is_named() -> None:
    file = MemoryHostFile(make(GROWING).files[DISK])
    initial = bytes(file.data)
    image = await open_file(file)
    for start in range(1900 << 10, 2200 << 10, 4096):
        await writer_of(image).write(start, b"x" * 4096)
        await writer_of(image).flush()
    for cut, data in crash_states(initial, file.log, 200, random.Random(5)):
        assert (await check(MemoryHostFile(data))).errors == [], f"cut at {cut}"
    image.close()


async def test_a_cluster_is_freed_after_its_entry_is_gone_from_the_disk() -> None:
    file = MemoryHostFile(make(EMPTY).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    await writer_of(image).flush()
    old = word(file.data, place_of_entry(file.data, 0)) & OFFSET_MASK
    await writer_of(image).discard(0, C)
    await writer_of(image).write(5 * C, b"n" * C)
    assert bytes(file.data[old : old + C]) == b"x" * C
    await writer_of(image).flush()
    await writer_of(image).write(6 * C, b"n" * C)
    assert bytes(file.data[old : old + C]) == b"n" * C
    await image.aclose()
    assert (await check(file)).is_clean


async def test_a_reader_under_way_keeps_its_cluster_from_being_used_again() -> None:
    file = WaitingFile(make(EMPTY).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    await writer_of(image).flush()
    old = word(file.data, place_of_entry(file.data, 0)) & OFFSET_MASK
    file.hold = {"read"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, image, 0, C)
        await trio.testing.wait_all_tasks_blocked()
        assert file.waiting == [("read", old)]
        await writer_of(image).discard(0, C)
        await writer_of(image).flush()
        await writer_of(image).write(6 * C, b"n" * C)
        assert bytes(file.data[old : old + C]) == b"x" * C
        file.release()
    await image.aclose()
    assert (await check(file)).is_clean


async def test_a_flush_of_nothing_touches_nothing() -> None:
    file = MemoryHostFile(make(EMPTY).files[DISK])
    image = await open_file(file)
    assert not writer_of(image).is_dirty
    await writer_of(image).flush()
    await image.aclose()
    assert file.log == []


# -- failures


@pytest.mark.parametrize("stage", range(1, 13))
@pytest.mark.parametrize("shape", [EMPTY, GROWING], ids=["plain", "the table grows"])
async def test_what_a_failed_flush_did_not_write_the_next_one_writes(
    shape: Shape, stage: int, tmp_path: Path
) -> None:
    file = FailingOnce(make(shape).files[DISK])
    image = await open_file(file)
    start = shape.bulk
    length = shape.size - start
    await writer_of(image).write(start, b"x" * length)
    await writer_of(image).discard(start, 8 * C)
    file.left = stage
    try:
        await writer_of(image).flush()
    except OSError:
        assert writer_of(image).is_dirty
    file.left = 1 << 30
    await writer_of(image).flush()
    assert (await check(MemoryHostFile(bytes(file.data)))).errors == []
    assert await read(image, start, length) == bytes(8 * C) + b"x" * (length - 8 * C)
    await image.aclose()
    assert (await check(file)).is_clean
    (tmp_path / "disk").write_bytes(file.data)
    qemu("qemu-img", "check", tmp_path / "disk")


@pytest.mark.parametrize("stage", range(1, 9))
async def test_after_a_failed_flush_the_order_holds_still(stage: int) -> None:
    file = FailingOnce(make(EMPTY).files[DISK])
    initial = bytes(file.data)
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    file.left = stage
    try:
        await writer_of(image).flush()
    except OSError:
        assert file.left == 0
    file.left = 1 << 30
    for number in range(1, 5):
        await writer_of(image).write(number * C, b"y" * C)
    await writer_of(image).flush()
    for cut, data in crash_states(initial, file.log, 400, random.Random(stage)):
        assert (await check(MemoryHostFile(data))).errors == [], f"cut at {cut} of {len(file.log)}"
    image.close()


class FailingRead(MemoryHostFile):
    """A file where the n-th read fails."""

    left = 1 << 30

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(5, "injected")
        await super().read_into(requests)


@pytest.mark.parametrize("number", [1, 7, 20, 34, 36, 40, 50])
async def test_counts_of_a_run_are_lowered_once_whichever_of_them_cannot_be_read(number: int) -> None:
    """What a snapshot shares is counted twice; lowered twice, its data would be given back."""
    file = FailingRead(make(Shape(cluster_size=C, size=6 << 20, filled=False)).files[DISK])
    image = await open_file(file, table_cache=1)
    content = random.Random(number).randbytes(4 << 20)
    await writer_of(image).write(0, content)
    snapshot = await states.create_snapshot(image, b"kept")
    await writer_of(image).discard(0, len(content))
    file.left = number
    for _ in range(4):
        with suppress(OSError):
            await writer_of(image).flush()
    file.left = 1 << 30
    kept = bytearray(len(content))
    await image.snapshot_view(snapshot).read_into(0, memoryview(kept))
    assert kept == content
    await image.aclose()
    assert (await check(file)).errors == []


async def test_a_flush_that_waits_can_be_cancelled_and_repeated() -> None:
    file = WaitingFile(make(EMPTY).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    file.hold = {"sync"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer_of(image).flush)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    file.release()
    assert writer_of(image).is_dirty
    await image.aclose()
    assert bytes(file.data[word(file.data, place_of_entry(file.data, 0)) & OFFSET_MASK :][:C]) == b"x" * C
    assert (await check(file)).is_clean


async def test_a_flush_that_need_not_wait_lets_no_other_task_run() -> None:
    """Then the request for it is answered where it arrives."""
    image = await open_file(MemoryHostFile(make(EMPTY).files[DISK]))
    writer = writer_of(image)
    await writer.write(0, b"x" * C)
    with pytest.raises(StopIteration):
        writer.flush().send(None)
    assert not writer.is_dirty
    await image.aclose()
