"""The verifier finds nothing in sound images, and each kind of damage."""

from __future__ import annotations

import pytest

from qcowfs.check import check
from qcowfs.testing import MemoryHostFile
from tests.host_files import place_of_entry, poke_word, word
from tests.shapes import DISK, Shape, make

C = 512
COPIED, ZERO = 1 << 63, 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
PLAIN = Shape(cluster_size=C, size=200 << 10, bulk=40 * C, filled=False)
FULL = Shape(cluster_size=C, size=200 << 10, snapshot=True)


def image(shape: Shape = PLAIN) -> bytearray:
    return bytearray(make(shape).files[DISK])


async def found(data: bytearray) -> tuple[list[str], list[str]]:
    report = await check(MemoryHostFile(bytes(data)))
    assert report.is_clean == (not report.errors and not report.leaks)
    return report.errors, report.leaks


def count_at(data: bytearray, host: int) -> int:
    """Where the 16-bit count of a host offset lies."""
    block = word(data, word(data, 48) + host // C // 256 * 8)
    return block + host // C % 256 * 2


@pytest.mark.parametrize(
    "shape",
    [
        PLAIN,
        FULL,
        Shape(),
        Shape(version=2, snapshot=True),
        Shape(extended_l2=True, snapshot=True),
        Shape(refcount_bits=1),
        Shape(encryption="luks"),
        Shape(refcount_bits=64, snapshot=True, base=5000),
    ],
)
async def test_what_qemu_made_is_clean(shape: Shape) -> None:
    data = image(shape)
    assert await found(data) == ([], [])
    assert (await check(MemoryHostFile(bytes(data)))).references.total() * shape.cluster_size >= len(
        data
    ) // 2


@pytest.mark.parametrize("which", ["header", "L1", "L2", "table", "block", "data"])
async def test_a_count_that_is_too_low_or_too_high_is_found(which: str) -> None:
    data = image()
    entry = place_of_entry(data, C)
    hosts = {
        "header": 0, "L1": word(data, 40), "L2": entry // C * C, "table": word(data, 48),
        "block": word(data, word(data, 48)), "data": word(data, entry) & OFFSET_MASK,
    }  # fmt: skip
    host = hosts[which]
    poke_word(data, count_at(data, host), 0, 2)
    errors, leaks = await found(data)
    assert f"host offset {host:#x}: refcount 0, references 1" in errors
    assert leaks == []
    poke_word(data, count_at(data, host), 3, 2)
    errors, leaks = await found(data)
    assert leaks == [f"host offset {host:#x}: refcount 3, references 1"]
    assert bool(errors) == (which in ("L2", "data"))  # those have a COPIED flag


async def test_a_cluster_that_nothing_names_is_a_leak() -> None:
    data = image()
    place = place_of_entry(data, C)
    host = word(data, place) & OFFSET_MASK
    poke_word(data, place, 0)
    assert await found(data) == ([], [f"host offset {host:#x}: refcount 1, references 0"])


async def test_a_cluster_that_two_entries_name_is_an_error() -> None:
    data = image()
    first, second = place_of_entry(data, C), place_of_entry(data, 2 * C)
    host, lost = word(data, first) & OFFSET_MASK, word(data, second) & OFFSET_MASK
    poke_word(data, second, word(data, first))
    errors, leaks = await found(data)
    assert errors == [f"host offset {host:#x}: refcount 1, references 2"]
    assert leaks == [f"host offset {lost:#x}: refcount 1, references 0"]


@pytest.mark.parametrize("level", ["L1", "L2"])
async def test_a_missing_flag_is_found(level: str) -> None:
    data = image()
    entry = place_of_entry(data, C)
    place = entry if level == "L2" else word(data, 40)
    host = word(data, place) & OFFSET_MASK
    poke_word(data, place, host)
    name = f"guest offset {C:#x}" if level == "L2" else "active L1 table entry 0"
    expected = f"{name}: COPIED is False but host offset {host:#x} has refcount 1"
    assert await found(data) == ([expected], [])


async def test_a_flag_on_a_shared_cluster_is_found() -> None:
    data = image()
    host = word(data, place_of_entry(data, C)) & OFFSET_MASK
    poke_word(data, count_at(data, host), 2, 2)
    errors, _ = await found(data)
    assert errors == [f"guest offset {C:#x}: COPIED is True but host offset {host:#x} has refcount 2"]


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (1 << 40, "guest offset 0x200: host offset 0x10000000000 lies past the end of the file"),
        (COPIED | 1 << 62 | 0x1000, "guest offset 0x200: a compressed cluster has the COPIED flag"),
    ],
)
async def test_a_broken_entry_is_found(entry: int, error: str) -> None:
    data = image()
    poke_word(data, place_of_entry(data, C), entry)
    errors, _ = await found(data)
    assert error in errors


async def test_tables_and_blocks_and_clusters_have_to_be_aligned() -> None:
    data = image(Shape(bulk=65536, filled=False))
    poke_word(data, place_of_entry(data, 0), COPIED | 0x1200)
    errors, _ = await found(data)
    assert errors == ["guest offset 0x0: cluster offset 0x1200 is not cluster aligned"]
    poke_word(data, word(data, 40), COPIED | 0x1200)
    poke_word(data, word(data, 48) + 8, 0x1200)
    errors, _ = await found(data)
    assert "active L1 table entry 0: L2 table offset 0x1200 is not cluster aligned" in errors
    assert "refcount table entry 1: block 0x1200 is not cluster aligned" in errors


async def test_the_zero_flag_is_an_error_in_version_2() -> None:
    data = image(Shape(cluster_size=C, size=200 << 10, version=2, bulk=40 * C, filled=False))
    place = place_of_entry(data, C)
    poke_word(data, place, word(data, place) | ZERO)
    assert await found(data) == ([f"guest offset {C:#x}: the zero flag is not valid here"], [])


@pytest.mark.parametrize("bitmap", [1 << 32 | 1, 1 << 35 | 1 << 3])
async def test_a_subcluster_that_is_both_allocated_and_zero_is_found(bitmap: int) -> None:
    data = image(Shape(extended_l2=True, bulk=65536, filled=False))
    l2_table = word(data, word(data, 40)) & OFFSET_MASK
    poke_word(data, l2_table + 8, bitmap)
    expected = f"guest offset 0x0: subcluster bitmap {bitmap:#x} contradicts itself"
    assert await found(data) == ([expected], [])


async def test_a_damaged_snapshot_table_is_an_error() -> None:
    data = image(FULL)
    poke_word(data, word(data, 64), 0x123)
    errors, _ = await found(data)
    assert errors
