"""Single writes: what they cost, who waits for whom, and what a failing or cancelled one leaves behind."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from qcowfs.check import check
from qcowfs.errors import CorruptImage, UsageError
from qcowfs.testing import SYNC, MemoryHostFile, Write
from tests.asserting import raises_exactly
from tests.host_files import WaitingFile, open_file, place_of_entry, poke_word, word, writer_of
from tests.memory import FOLDER, read
from tests.shapes import DISK, Shape, make

COPIED = 1 << 63
C, MIB = 65536, 1 << 20
EMPTY = Shape(size=8 * MIB, filled=False)
SMALL = Shape(cluster_size=512, size=200 << 10, filled=False)


def image_bytes(shape: Shape = EMPTY) -> bytes:
    return make(shape).files[DISK]


def data_writes(file: MemoryHostFile, byte: bytes) -> list[int]:
    """How long those writes of the log are that hold nothing but the byte."""
    written = [e.data for e in file.log if isinstance(e, Write)]
    return [len(data) for data in written if data == byte * len(data)]


@contextmanager
def soon(seconds: float = 1) -> Iterator[None]:
    """Fail where the body never ends and never waits either, which no timeout of trio notices."""

    def give_up(*_: object) -> None:
        raise AssertionError("still running")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def assert_clean(file: MemoryHostFile) -> None:
    report = await check(file)
    assert (report.errors, report.leaks) == ([], [])


async def test_a_mebibyte_of_new_space_is_one_write() -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    await writer_of(image).write(0, b"n" * MIB)
    assert [len(e.data) for e in file.log if isinstance(e, Write)] == [MIB]
    await image.aclose()
    await assert_clean(file)


async def test_writing_over_own_clusters_writes_no_metadata() -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    await writer_of(image).write(0, b"n" * MIB)
    await writer_of(image).flush()
    file.log.clear()
    await writer_of(image).write(1000, b"o" * 500_000)
    await writer_of(image).flush()
    assert data_writes(file, b"o") == [500_000]
    assert file.log[1:] == [SYNC]
    image.close()


async def test_a_small_write_to_new_space_at_the_end_of_the_file_writes_only_its_bytes() -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    await writer_of(image).write(3 * C + 5000, b"s" * 10)
    assert [len(e.data) for e in file.log if isinstance(e, Write)] == [10]
    assert await read(image, 3 * C, C) == bytes(5000) + b"s" * 10 + bytes(C - 5010)
    image.close()


async def test_sequential_writes_get_sequential_clusters() -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    for number in range(20):
        await writer_of(image).write(number * C, bytes([number + 1]) * C)
    await image.aclose()
    places = [word(file.data, place_of_entry(file.data, n * C)) & ~COPIED for n in range(1, 20)]
    assert places == list(range(places[0], places[0] + 19 * C, C))


async def test_discarded_clusters_are_used_again() -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    writer = writer_of(image)
    for number in range(10):
        await writer.write(number % 2 * 2 * MIB, bytes([number + 1]) * MIB)
        await writer.discard(0, 8 * MIB)
        await writer.flush()
    await image.aclose()
    assert len(file.data) < 4 * MIB
    await assert_clean(file)


@pytest.mark.parametrize(("guest", "length"), [(8 * MIB, 1), (8 * MIB - 1, 2), (0, 8 * MIB + 1), (-1, 1)])
async def test_a_change_past_the_end_is_refused(guest: int, length: int) -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    text = f"{FOLDER}/disk.qcow2: bytes {guest}+{length} lie beyond the end of the disk"
    with raises_exactly(UsageError, text):
        await writer_of(image).write(guest, bytes(length))
    with raises_exactly(UsageError, text):
        await writer_of(image).zero(guest, length)
    with raises_exactly(UsageError, text):
        await writer_of(image).discard(guest, length)
    assert file.log == []
    image.close()


async def test_the_last_byte_of_the_disk_can_be_written() -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    await writer_of(image).write(8 * MIB - 1, b"e")
    assert await read(image, 8 * MIB - 2, 2) == b"\0e"
    await image.aclose()
    await assert_clean(file)


# -- at the same time


async def test_writers_to_one_unallocated_cluster_wait_for_each_other() -> None:
    file = WaitingFile(image_bytes())
    image = await open_file(file)
    file.hold = {"write"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer_of(image).write, 0, b"a" * 512)
        nursery.start_soon(writer_of(image).write, 512, b"b" * 512)
        await trio.testing.wait_all_tasks_blocked()
        assert len(file.waiting) == 1
        file.release()
    assert await read(image, 0, 1024) == b"a" * 512 + b"b" * 512
    await image.aclose()
    await assert_clean(file)


async def test_writers_to_different_clusters_do_not_wait_for_each_other() -> None:
    file = WaitingFile(image_bytes())
    image = await open_file(file)
    file.hold = {"write"}
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(writer_of(image).write, number * C, bytes([number + 1]) * 512)
        await trio.testing.wait_all_tasks_blocked()
        assert len(file.waiting) == 4
        assert len({offset for _, offset in file.waiting}) == 4
        file.release()
    await image.aclose()
    await assert_clean(file)


async def test_a_write_that_ends_during_a_flush_is_synced_by_the_next_one() -> None:
    file = WaitingFile(image_bytes())
    image = await open_file(file)
    await writer_of(image).write(0, b"a" * C)
    await writer_of(image).flush()
    file.log.clear()
    file.hold = {"write"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer_of(image).write, 0, b"b" * 512)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(writer_of(image).flush)
        await trio.testing.wait_all_tasks_blocked()
        file.release()
    await writer_of(image).flush()
    assert [type(entry) for entry in file.log][-2:] == [Write, type(SYNC)]
    image.close()


async def test_a_reader_beside_a_discard_and_a_new_writer_reads_one_of_the_contents() -> None:
    file = WaitingFile(image_bytes(SMALL))
    image = await open_file(file)
    writer = writer_of(image)
    await writer.write(0, b"a" * 512)
    await writer.flush()
    found: list[bytes] = []

    async def reader() -> None:
        found.append(await read(image, 0, 512))

    file.hold = {"read"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        assert [kind for kind, _ in file.waiting] == ["read"]
        await writer.discard(0, 512)
        await writer.flush()
        await writer.write(1024, b"b" * 512)
        file.release()
    assert found == [b"a" * 512]
    await image.aclose()


# -- failing and cancelled


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_a_failing_write_leaves_no_lock_and_no_leak(number: int) -> None:
    file = MemoryHostFile(image_bytes())
    image = await open_file(file)
    file.fail_writes(0, 1 << 40, number)
    for _ in range(3):
        with pytest.raises(OSError, match="memory") as caught:
            await writer_of(image).write(100, b"x" * 3 * C)
        assert caught.value.errno == number
    file.heal()
    assert await read(image, 0, 4 * C) == bytes(4 * C)
    await writer_of(image).write(100, b"y" * C)
    assert await read(image, 0, 2 * C) == bytes(100) + b"y" * C + bytes(C - 100)
    await image.aclose()
    await assert_clean(file)


async def test_a_cancelled_write_leaves_no_lock_and_no_leak() -> None:
    file = WaitingFile(image_bytes())
    image = await open_file(file)
    file.hold = {"write"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer_of(image).write, 0, b"a" * C)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    file.release()
    await writer_of(image).write(512, b"b" * 512)
    assert await read(image, 0, 1024) == bytes(512) + b"b" * 512
    await image.aclose()
    await assert_clean(file)


async def test_a_write_that_waits_for_another_can_be_cancelled() -> None:
    file = WaitingFile(image_bytes())
    image = await open_file(file)
    file.hold = {"write"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer_of(image).write, 0, b"a" * 512)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0) as scope:
            await writer_of(image).write(0, b"c" * 512)
        assert scope.cancelled_caught
        file.release()
    await writer_of(image).write(512, b"b" * 512)
    assert await read(image, 0, 1024) == b"a" * 512 + b"b" * 512
    await image.aclose()
    await assert_clean(file)


# -- images that contradict themselves


@pytest.mark.parametrize("zero_flag", [0, 1])
async def test_an_entry_that_names_metadata_is_not_written_through(zero_flag: int) -> None:
    file = MemoryHostFile(image_bytes(SMALL))
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * 512)
    await image.aclose()
    l1_table = word(file.data, 40)
    poke_word(file.data, place_of_entry(file.data, 0), l1_table | COPIED | zero_flag)
    before = bytes(file.data)
    image = await open_file(file)
    with soon(), pytest.raises(CorruptImage, match=f"write refused: .*{l1_table:#x}"):
        await writer_of(image).write(0, b"y" * 512)
    assert file.data[80:] == before[80:]
    assert word(file.data, 72) == 2
    image.close()
