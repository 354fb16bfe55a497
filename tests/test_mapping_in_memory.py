"""Look-ups that the tables in memory answer at once, and caches too small to hold what one look-up needs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.format.words import TABLE_WORDS
from qcowfs.geometry import Geometry
from qcowfs.host.hostfile import ReadRequest
from qcowfs.metadata.cache import LEAST_SLICES, TableCache
from qcowfs.metadata.lru import BoundedStore
from qcowfs.metadata.mapping import Mapping
from tests.builders import COPIED, ImageBuilder
from tests.memory import CountedFile
from tests.test_mapping import KIB32, C, mapping_of, shown


class ImpatientFile(CountedFile):
    """A file that ends a look-up which would never end by itself."""

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        await super().read_into(requests)
        assert len(self.reads) < 100


def over(image: ImageBuilder, file: CountedFile, limit: int = 1 << 20) -> Mapping:
    geometry = Geometry(image.cluster_bits, image.extended_l2)
    tables = TableCache(file, geometry, BoundedStore(limit, LEAST_SLICES), TABLE_WORDS)
    return Mapping(tables, tables, geometry, image.active.offset, image.active.entries)


async def test_what_was_looked_up_is_answered_again_without_reading() -> None:
    image = ImageBuilder(KIB32)
    host = image.normal(C, b"x")
    file = CountedFile(image.build())
    mapping = over(image, file)
    assert mapping.get_extents(0, KIB32) is None
    assert mapping.translate(C, C) is None
    extents = await mapping.resolve(0, KIB32)
    file.reads.clear()
    assert mapping.get_extents(0, KIB32) == extents == await mapping.resolve(0, KIB32)
    assert mapping.translate(C + 5, 20) == host + 5
    assert file.reads == []


async def test_extents_are_known_at_once_only_if_every_table_is_in_memory() -> None:
    image = ImageBuilder(2 * KIB32)
    for guest in (0, KIB32):
        image.normal(guest, b"x")
    mapping = mapping_of(image)
    await mapping.resolve(0, C)
    assert mapping.get_extents(KIB32 - C, C) is not None
    assert mapping.get_extents(KIB32 - C, 2 * C) is None


async def test_damage_is_known_at_once_too() -> None:
    image = ImageBuilder(8 << 20, cluster_bits=12)
    image.set_l1(0, 0x5200)
    mapping = mapping_of(image)
    extents = await mapping.resolve(0, 100)
    assert mapping.get_extents(0, 100) == extents
    assert shown(extents) == [("lost", 0, 100, 0)]
    assert mapping.translate(0, 100) is None


@pytest.mark.parametrize(("start", "length"), [(0, 1), (C - 1, 1), (0, C), (7, 100)])
async def test_a_range_within_a_data_cluster_is_translated(start: int, length: int) -> None:
    image = ImageBuilder(KIB32)
    host = image.normal(0, b"x")
    mapping = mapping_of(image)
    await mapping.resolve(0, 1)
    assert mapping.translate(start, length) == host + start
    assert mapping.translate(start, length) == host + start


async def test_a_range_over_two_clusters_is_not_translated() -> None:
    image = ImageBuilder(KIB32)
    image.l2_table(0)
    for guest in (0, C):
        image.normal(guest, b"x")
    mapping = mapping_of(image)
    await mapping.resolve(0, 1)
    assert mapping.translate(1, C) is None


async def test_a_wrong_offset_in_a_data_file_is_not_translated() -> None:
    image = ImageBuilder(KIB32)
    image.entry(C, 3 * C | COPIED)
    mapping = mapping_of(image, has_data_file=True)
    [extent] = await mapping.resolve(C, C)
    assert extent.damage
    assert mapping.translate(C, C) is None


@given(
    st.lists(st.sampled_from(["data", "zero", "both", "packed", "crooked", "none"]), min_size=1, max_size=8)
)
async def test_a_translation_is_what_the_extents_say(kinds: list[str]) -> None:
    size = 4096
    image = ImageBuilder(8 * size, cluster_bits=12)
    image.l2_table(0)
    words = {"data": 0x10000 | COPIED, "zero": 1, "both": 0x10001, "packed": 1 << 62, "crooked": 0x10200}
    for number, kind in enumerate(kinds):
        image.entry(number * size, words.get(kind, 0))
    mapping = mapping_of(image)
    await mapping.resolve(0, 1)
    for number, kind in enumerate(kinds):
        expected = 0x10000 + 9 if kind == "data" else None
        assert mapping.translate(number * size + 9, 10) == expected


@pytest.mark.parametrize("limit", [0, 1, 912, 1823])
async def test_a_cache_that_holds_only_one_slice_is_enough(limit: int) -> None:
    image = ImageBuilder(KIB32)
    host = image.normal(0, b"x")
    mapping = over(image, ImpatientFile(image.build()), limit)
    assert shown(await mapping.resolve(0, 2 * C)) == [("data", 0, C, host), ("unallocated", C, C, 0)]
