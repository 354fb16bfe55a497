"""Tables decoded in bulk say of each place what `mapping` says of it, for any entries at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowfs.disk.image import Image
from qcowfs.format.entries import COMPRESSED, COPIED, ZERO
from qcowfs.metadata.mapping import DATA, Extent
from qcowfs.metadata.runs import Run
from qcowfs.metadata.tables import FEW_BYTES, TableWalk
from tests.builders import ImageBuilder
from tests.memory import open_bytes

CLUSTER_BITS = 14
CLUSTER = 1 << CLUSTER_BITS
FLAGS = st.sampled_from([0, 0, COPIED, COPIED, ZERO, ZERO | COPIED, COMPRESSED, COMPRESSED | 5 << 56])
OFFSETS = st.builds(lambda n, odd: n * CLUSTER + odd, st.integers(0, 6), st.sampled_from([0, 0, 0, 512]))
BITMAPS = st.sampled_from([0, 1, 0xFFFF_FFFF, 0xFFFF_FFFF << 32, 0x0F << 32 | 0xF0, 1 << 32 | 1])
ENTRIES = st.dictionaries(
    st.integers(0, 30), st.tuples(st.builds(int.__or__, FLAGS, OFFSETS), BITMAPS), max_size=20
)
L1_ENTRIES = st.sampled_from([None, 0, 999 * CLUSTER, 512 | COPIED])


each_way = pytest.mark.parametrize("few", [0, FEW_BYTES], ids=["as-arrays", "one-by-one"])


async def runs_of(image: Image, start: int, end: int, few: int = FEW_BYTES) -> list[Run]:
    walk = TableWalk(image.file, image.header, *image.active.mapping.l1_table, few)
    return [run async for run in walk.runs(start, end)]


def places(start: int, length: int, kind: object, host: int | None) -> list[tuple[int, object, int | None]]:
    """Each 512 bytes of a run on their own, with the host offset of data only."""
    return [(start + n, kind, host + n if kind is DATA and host else None) for n in range(0, length, 512)]


@each_way
@pytest.mark.parametrize(("version", "extended"), [(2, False), (3, False), (3, True)])
@settings(max_examples=40)
@given(entries=ENTRIES, other=L1_ENTRIES, start=st.integers(0, 20), length=st.integers(1, 60))
async def test_each_place_is_what_mapping_says(
    version: int,
    extended: bool,
    few: int,
    entries: dict[int, tuple[int, int]],
    other: int | None,
    start: int,
    length: int,
) -> None:
    builder = ImageBuilder(4 << 30, CLUSTER_BITS, version, extended)
    for index, (word, bitmap) in entries.items():
        builder.entry(index * CLUSTER, word, bitmap)
    if other is not None:
        builder.set_l1(1, other)
    image = await open_bytes(builder.build())
    span = builder.l2_coverage if other is not None else 0
    for first, last in ((start * CLUSTER, (start + length) * CLUSTER - 512), (span, span + 9 * CLUSTER)):
        extents: list[Extent] = await image.active.mapping.resolve(first, last - first)
        expected = [p for e in extents for p in places(e.guest_offset, e.length, e.kind, e.host_offset)]
        runs = await runs_of(image, first, last, few)
        assert [p for r in runs for p in places(r.guest, r.length, r.kind, r.host)] == expected
    image.close()


@each_way
async def test_runs_tell_what_is_shared_and_what_compressed_clusters_take(few: int) -> None:
    builder = ImageBuilder(1 << 20, CLUSTER_BITS)
    host = builder.normal(0, b"own")
    builder.entry(CLUSTER, builder.place(b"shared"))
    builder.entry(5 * CLUSTER, builder.descriptor(host, 700))
    image = await open_bytes(builder.build())
    own, shared, _, compressed, _ = await runs_of(image, 0, 1 << 20, few)
    assert (own.shared, shared.shared, own.host) == (False, True, host)
    assert (compressed.host, compressed.stored) == (None, 1024)
    image.close()


@pytest.mark.parametrize("version", [2, 3])
@settings(max_examples=60)
@given(entries=ENTRIES)
async def test_both_ways_tell_the_same(version: int, entries: dict[int, tuple[int, int]]) -> None:
    builder = ImageBuilder(1 << 24, CLUSTER_BITS, version)
    for index, (word, _) in entries.items():
        builder.entry(index * CLUSTER, word)
    image = await open_bytes(builder.build())
    one_by_one, as_arrays = [await runs_of(image, 0, 1 << 24, few) for few in (FEW_BYTES, 0)]
    assert _by_cluster(one_by_one) == _by_cluster(as_arrays)
    assert sum(run.stored for run in one_by_one) == sum(run.stored for run in as_arrays)
    image.close()


def _by_cluster(runs: list[Run]) -> list[tuple[object, ...]]:
    return [
        (run.guest + n, run.kind, None if run.host is None else run.host + n, run.shared)
        for run in runs
        for n in range(0, run.length, CLUSTER)
    ]


@each_way
async def test_a_sparse_exabyte_is_walked_at_once(few: int) -> None:
    builder = ImageBuilder(1 << 60, 21)
    builder.normal(3 << 58, b"lonely")
    image = await open_bytes(builder.build())
    runs = await runs_of(image, 0, 1 << 60, few)
    assert [(run.guest, run.length) for run in runs if run.kind is DATA] == [(3 << 58, 1 << 21)]
    assert sum(run.length for run in runs) == 1 << 60
    image.close()
