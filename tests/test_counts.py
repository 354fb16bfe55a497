"""All counts of an image at once: raised, lowered, allocated and stored beside those on disk."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.errors import CorruptImage, MetadataOverlap, UsageError
from qcowfs.format.header import Header
from qcowfs.metadata.counts import Counts, runs_of
from qcowfs.metadata.metadata_map import MetadataMap
from qcowfs.testing import MemoryHostFile
from tests.builders import header
from tests.host_files import poke_word

CLUSTER = 512
orders = st.integers(0, 6)


def image(order: int, stored: list[int]) -> MemoryHostFile:
    """A file with a header, a refcount table at cluster 1 and one block, at cluster 2, with these counts."""
    fields = {"cluster_bits": 9, "size": 1 << 15, "refcount_table_offset": CLUSTER, "refcount_order": order}
    data = bytearray(header(**fields, l1_table_offset=3 * CLUSTER).ljust(4 * CLUSTER, b"\0"))
    poke_word(data, CLUSTER, 2 * CLUSTER)
    block, width = 0, 1 << order
    if width >= 8:
        packed = b"".join(count.to_bytes(width // 8, "big") for count in stored)
    else:
        for index, count in enumerate(stored):
            block |= count << index * width
        packed = block.to_bytes(CLUSTER, "little")
    data[2 * CLUSTER : 3 * CLUSTER] = packed.ljust(CLUSTER, b"\0")
    return MemoryHostFile(bytes(data))


async def load(file: MemoryHostFile) -> Counts:
    return await Counts.load(file, Header.unpack(bytes(file.data[:CLUSTER])), MetadataMap(9))


@given(orders, st.data())
async def test_counts_of_every_width_survive_being_stored_and_loaded(order: int, data: st.DataObject) -> None:
    most = (1 << (1 << order)) - 1
    counts = st.integers(0, min(most, 300)) | st.just(most)
    stored = [1, 1, 1, 1, *data.draw(st.lists(counts, max_size=50))]
    file = image(order, stored)
    found = await load(file)
    assert found.values[: len(stored)].tolist() == stored
    before = bytes(file.data[: 4 * CLUSTER])
    found.raise_by_one(np.array([n for n, c in enumerate(stored) if 0 < c < most], np.int64))
    expected = found.values.tolist()
    place, clusters, replaced = await found.store(file)
    assert bytes(file.data[: 4 * CLUSTER]) == before
    poke_word(file.data, 48, place)
    poke_word(file.data, 56, clusters, 4)
    again = (await load(file)).values.tolist()
    assert again == found.values.tolist()
    assert all(again[n] == expected[n] for n, count in enumerate(stored) if count)
    assert range(1, 2) in replaced


@given(st.lists(st.booleans(), max_size=120), st.integers(1, 300))
async def test_a_run_is_the_first_that_is_free_and_long_enough(used: list[bool], length: int) -> None:
    stored = [1, 1, 1, 1, *map(int, used)]
    counts = await load(image(4, stored))
    covered = len(counts.values)
    free = [n >= len(stored) or not stored[n] for n in range(covered)] + [True] * 2 * length
    first = counts.allocate_run(length)
    expected = next(n for n in range(len(free)) if all(free[n : n + length]))
    assert first == expected
    assert (counts.values[first : first + length] == 1).all()
    assert counts.allocate_run(1) not in range(first, first + length)


@given(st.lists(st.booleans(), max_size=120), st.lists(st.integers(1, 90), max_size=6))
async def test_clusters_are_handed_out_once_and_never_while_the_disk_counts_them(
    used: list[bool], wanted: list[int]
) -> None:
    stored = [1, 1, 1, 1, *map(int, used)]
    counts = await load(image(4, stored))
    own = [n for n, c in enumerate(stored) if c]
    counts.lower_by_one(np.array(own, np.int64))
    seen = set(own)
    for count in wanted:
        taken = counts.allocate(count).tolist()
        assert len(set(taken)) == count
        assert not seen & set(taken)
        seen |= set(taken)
    assert [n for run in counts.take_freed() for n in run] == own
    assert (counts.values[own] == 1).all()


async def test_a_cluster_named_twice_counts_twice() -> None:
    counts = await load(image(4, [1, 1, 1, 1, 1, 5]))
    counts.raise_by_one(np.array([5, 4, 5], np.int64))
    assert counts.values[[4, 5]].tolist() == [2, 7]
    counts.lower_by_one(np.array([5, 4, 4, 5], np.int64))
    assert counts.values[[4, 5]].tolist() == [0, 5]
    assert counts.take_freed() == [range(4, 5)]


async def test_what_is_raised_again_is_not_freed() -> None:
    counts = await load(image(4, [1, 1, 1, 1, 2, 1]))
    counts.lower_by_one(np.array([4, 5], np.int64))
    counts.values[5] = 1
    assert counts.take_freed() == []
    assert counts.take_freed() == []


@pytest.mark.parametrize("order", range(6))
async def test_a_count_over_the_width_is_refused(order: int) -> None:
    most = (1 << (1 << order)) - 1
    counts = await load(image(order, [1, 1, 1, 1, most]))
    with pytest.raises(UsageError, match=f"refcounts of {1 << order} bits hold, at most {most}; widen them"):
        counts.raise_by_one(np.array([4], np.int64))
    assert counts.values[4] == most


@pytest.mark.parametrize("cluster", [4, 1 << 20])
async def test_a_cluster_without_a_count_is_damage(cluster: int) -> None:
    counts = await load(image(4, [1, 1, 1, 1]))
    text = f"host offset {cluster * CLUSTER:#x} has fewer counts than references; repair the image with check"
    for change in (counts.raise_by_one, counts.lower_by_one):
        with pytest.raises(CorruptImage) as caught:
            change(np.array([cluster], np.int64))
        assert str(caught.value) == text


async def test_a_count_lowered_below_zero_is_damage() -> None:
    counts = await load(image(4, [1, 1, 1, 1, 1]))
    with pytest.raises(CorruptImage, match="has fewer counts than references"):
        counts.lower_by_one(np.array([4, 4], np.int64))
    assert counts.values[4] == 1


async def test_metadata_that_is_called_free_is_not_handed_out() -> None:
    counts = await load(image(4, [1, 1, 1, 1]))
    counts.metadata.add(4 * CLUSTER, 1)
    with pytest.raises(MetadataOverlap, match="the refcounts call a cluster of metadata free"):
        counts.allocate(1)
    assert counts.values[4] == 0


async def test_a_block_past_the_end_of_the_file_is_damage() -> None:
    file = image(4, [1, 1, 1, 1])
    poke_word(file.data, CLUSTER + 8, 1 << 20)
    with pytest.raises(CorruptImage, match="refcount block at 0x100000 lies past the end of the file"):
        await load(file)


async def test_the_table_grows_with_what_it_counts() -> None:
    file = image(6, [1, 1, 1, 1])
    counts = await load(file)
    counts.allocate(6000)  # 64 counts to a block, 64 blocks to a cluster of the table
    place, clusters, _ = await counts.store(file)
    assert clusters == 2
    poke_word(file.data, 48, place)
    poke_word(file.data, 56, clusters, 4)
    again = await load(file)
    assert again.values.tolist() == counts.values[: len(again.values)].tolist()
    assert int((again.values != 0).sum()) == 4 + 6000 + clusters + int((again.table != 0).sum())


@given(st.sets(st.integers(0, 60)))
def test_runs_name_each_cluster_once(clusters: set[int]) -> None:
    runs = runs_of(np.array(sorted(clusters), np.int64))
    assert [n for run in runs for n in run] == sorted(clusters)
    assert all(a.stop < b.start for a, b in pairwise(runs))
