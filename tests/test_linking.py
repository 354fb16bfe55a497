"""L2 tables of the live disk's own: made, copied from a snapshot's, and found again from every cache size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from qcowfs.check import check
from qcowfs.disk.image import Image
from qcowfs.testing import MemoryHostFile
from tests.host_files import WaitingFile, open_file, poke_word, word, writer_of
from tests.memory import read
from tests.shapes import DISK, Shape, make

C = 512
KIB32 = 64 * C  # what one L2 table covers
COPIED = 1 << 63
WIDE = Shape(cluster_size=C, size=8 << 20, filled=False)
SHARED = Shape(cluster_size=C, size=200 << 10, snapshot=True)


async def assert_clean(file: MemoryHostFile) -> None:
    report = await check(file)
    assert (report.errors, report.leaks) == ([], [])


def l1_entry(file: MemoryHostFile, index: int) -> int:
    return word(file.data, word(file.data, 40) + 8 * index)


async def test_a_first_write_makes_one_table() -> None:
    file = MemoryHostFile(make(WIDE).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(3 * KIB32, b"x")
    await image.aclose()
    assert [bool(l1_entry(file, n)) for n in range(6)] == [False, False, False, True, False, False]
    assert l1_entry(file, 3) & COPIED
    await assert_clean(file)


async def test_a_flag_without_a_table_is_no_table() -> None:
    file = MemoryHostFile(make(WIDE).files[DISK])
    poke_word(file.data, word(file.data, 40) + 8, COPIED)
    image = await open_file(file)
    with trio.fail_after(10):
        await writer_of(image).write(KIB32, b"x")
    await image.aclose()
    assert l1_entry(file, 1) & ~COPIED
    await assert_clean(file)


async def test_a_table_that_a_snapshot_shares_is_copied_before_it_changes() -> None:
    made = make(SHARED)
    file = MemoryHostFile(made.files[DISK])
    image = await open_file(file)
    old = {n: l1_entry(file, n) for n in range(7)}
    tables = {n: bytes(file.data[o & ~COPIED :][:C]) for n, o in old.items() if o and not o & COPIED}
    for index in range(7):
        await writer_of(image).write(index * KIB32, bytes([index + 1]) * C)
    await image.aclose()
    assert tables
    for index, content in tables.items():
        assert l1_entry(file, index) & ~COPIED != old[index]
        assert file.data[old[index] : old[index] + C] == content
    await assert_clean(file)


async def test_a_table_of_its_own_without_the_flag_gets_the_flag_and_no_copy() -> None:
    file = MemoryHostFile(make(WIDE).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(0, b"x")
    await image.aclose()
    table = l1_entry(file, 0)
    poke_word(file.data, word(file.data, 40), table & ~COPIED)
    image = await open_file(file)
    await writer_of(image).write(C, b"y")
    await image.aclose()
    assert l1_entry(file, 0) == table
    await assert_clean(file)


async def test_an_l2_table_that_is_not_aligned_is_refused() -> None:
    file = MemoryHostFile(make(Shape(filled=False)).files[DISK])
    poke_word(file.data, word(file.data, 40), 0x10200)
    image = await open_file(file)
    with pytest.raises(Exception, match="L2 table offset 0x10200 is not cluster aligned"):
        await writer_of(image).write(0, b"x")
    image.close()


# -- a slice of the L1 table that leaves the cache while its writer waits


async def crowd_the_cache(image: Image) -> None:
    """Load so many other slices that none of before is left in a small cache."""
    for number in range(64, 128):
        await read(image, number * KIB32, 1)


@pytest.mark.parametrize("snapshot", [False, True])
async def test_tables_linked_beside_each_other_are_all_found_again(snapshot: bool) -> None:
    shape = replace(WIDE, snapshot=snapshot, bulk=2 * KIB32 if snapshot else 0)
    file = WaitingFile(make(shape).files[DISK])
    image = await open_file(file)
    for number in range(64, 128):
        await writer_of(image).write(number * KIB32, b"old")
    await image.aclose()
    image = await open_file(file, table_cache=1)
    file.hold = {"read"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer_of(image).write, 0, b"first")
        await hold_at(file, refcount_blocks(file))
        await crowd_the_cache(image)
        nursery.start_soon(writer_of(image).write, KIB32, b"second")
        await trio.testing.wait_all_tasks_blocked()
        file.release()
    assert await read(image, 0, 5) == b"first"
    assert await read(image, KIB32, 6) == b"second"
    await image.aclose()
    await assert_clean(file)


def refcount_blocks(file: MemoryHostFile) -> set[int]:
    """Where the refcount blocks of 512 bytes lie."""
    table = word(file.data, 48)
    return {word(file.data, table + n * 8) for n in range(64)} - {0}


async def hold_at(file: WaitingFile, places: set[int]) -> None:
    """Let reads go on until one waits at one of the places; only those wait from then on."""
    seen = 0
    while True:
        await trio.testing.wait_all_tasks_blocked()
        assert len(file.waiting) > seen, "no read waits any more"
        seen = len(file.waiting)
        if file.waiting[-1][1] in places:
            file.hold.clear()
            return
        waiting, file.let_go = file.let_go, trio.Event()
        waiting.set()
