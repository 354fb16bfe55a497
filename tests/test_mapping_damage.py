"""Broken tables and entries: each loses just what it covers, with the rule that it breaks."""

from __future__ import annotations

import errno

import pytest

from qcowfs.format.words import TABLE_WORDS
from qcowfs.geometry import Geometry
from qcowfs.metadata.cache import TableCache
from qcowfs.metadata.lru import BoundedStore
from qcowfs.metadata.mapping import Extent, Mapping
from qcowfs.testing import MemoryHostFile
from tests.builders import COPIED, ZERO, ImageBuilder
from tests.test_mapping import KIB32, C, mapping_of, shown


async def damage(image: ImageBuilder, guest: int, length: int) -> list[Extent]:
    return [e for e in await mapping_of(image).resolve(guest, length) if e.damage]


async def test_the_zero_flag_is_damage_in_version_2() -> None:
    image = ImageBuilder(KIB32, version=2)
    image.zero_plain(C)
    [extent] = await damage(image, 0, 3 * C)
    assert shown([extent]) == [("lost", C, C, image.entry_at(C))]
    assert extent.damage == "L2 entry has the zero flag, which version 2 does not know"


async def test_an_unaligned_cluster_offset_is_damage() -> None:
    image = ImageBuilder(4 * 1024 * 1024, cluster_bits=12)
    at = image.entry(0x3000, 0x5200 | COPIED)
    [extent] = await damage(image, 0x2000, 0x4000)
    assert shown([extent]) == [("lost", 0x3000, 0x1000, at)]
    assert extent.damage == "L2 entry: cluster offset 0x5200 is not cluster aligned"


async def test_an_unaligned_l2_table_offset_loses_all_that_the_table_covers() -> None:
    image = ImageBuilder(8 << 20, cluster_bits=12)
    coverage = 2 << 20
    image.set_l1(1, 0x5200 | COPIED)
    [extent] = await damage(image, 0, 8 << 20)
    assert shown([extent]) == [("lost", coverage, coverage, 0)]
    assert extent.damage == "L1 entry 1: L2 table offset 0x5200 is not cluster aligned"


async def test_an_l2_table_past_the_end_of_the_file_is_damage() -> None:
    image = ImageBuilder(3 * KIB32)
    image.set_l1(1, 0xFF_FFFF_FFFF_FE00)
    size = len(image.build())
    [extent] = await damage(image, KIB32 + 700, 100)
    assert shown([extent]) == [("lost", KIB32 + 700, 100, 0)]
    rule = f"the table lies past the end of the file ({size} bytes)"
    assert extent.damage == f"L2 table at 0xfffffffffffe00: {rule}"


async def test_an_l1_table_past_the_end_of_the_file_is_damage() -> None:
    tables = TableCache(MemoryHostFile(bytes(1000)), Geometry(9), BoundedStore(1 << 20), TABLE_WORDS)
    [first, second] = await Mapping(tables, tables, Geometry(9), 0x400, 2).resolve(0, 2 * KIB32)
    assert shown([first, second]) == [("lost", 0, KIB32, 0), ("lost", KIB32, KIB32, 0)]
    rule = "the table lies past the end of the file (1000 bytes)"
    assert (first.damage, second.damage) == 2 * (f"L1 table at 0x400: {rule}",)


async def test_what_is_whole_around_damage_is_found() -> None:
    image = ImageBuilder(3 * KIB32)
    before = image.normal(KIB32 - C, b"x")
    image.set_l1(1, 1 << 40)
    after = image.normal(2 * KIB32, b"x")
    extents = await mapping_of(image).resolve(KIB32 - C, KIB32 + 2 * C)
    assert shown(extents) == [
        ("data", KIB32 - C, C, before), ("lost", KIB32, KIB32, 0), ("data", 2 * KIB32, C, after),
    ]  # fmt: skip


@pytest.mark.parametrize("host", [0x600, 0x800])
async def test_another_offset_than_the_guests_in_a_data_file_is_damage(host: int) -> None:
    image = ImageBuilder(KIB32)
    at = image.entry(2 * C, host | COPIED)
    [extent] = [e for e in await mapping_of(image, has_data_file=True).resolve(0, KIB32) if e.damage]
    assert shown([extent]) == [("lost", 2 * C, C, at)]
    assert extent.damage == f"L2 entry: offset {host:#x} in the data file differs from the guest offset"


async def test_the_zero_flag_counts_before_an_unaligned_offset() -> None:
    image = ImageBuilder(1 << 20, cluster_bits=12)
    image.entry(0, 0x5200 | ZERO)
    assert shown(await mapping_of(image).resolve(0, 0x1000)) == [("zero", 0, 0x1000, 0)]


@pytest.mark.parametrize("which", ["L1", "L2"])
async def test_an_error_of_the_host_passes_as_it_is(which: str) -> None:
    image = ImageBuilder(KIB32)
    image.normal(0, b"x")
    file = MemoryHostFile(image.build())
    file.fail_reads(image.active.offset if which == "L1" else image.l2_table(0), 1)
    tables = TableCache(file, Geometry(9), BoundedStore(1 << 20), TABLE_WORDS)
    mapping = Mapping(tables, tables, Geometry(9), image.active.offset, 1)
    with pytest.raises(OSError, match="Input/output error") as caught:
        await mapping.resolve(0, C)
    assert caught.value.errno == errno.EIO
