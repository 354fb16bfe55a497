"""Compressed clusters: read together, inflated once, kept within the bound."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from qcowfs.data.inflate import STORED_GAP, InflatedClusters, InflatedStore, Stored
from qcowfs.errors import CorruptImage
from qcowfs.geometry import Geometry
from qcowfs.host.hostfile import ReadRequest
from qcowfs.metadata.lru import BoundedStore
from tests.builders import deflate
from tests.memory import CountedFile

SIZE = 1 << 16
GEOMETRY = Geometry(16)


class SlowFile(CountedFile):
    """A file whose reads wait until they are let go."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.let_go = trio.Event()

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        await self.let_go.wait()
        await super().read_into(requests)


def cluster(number: int) -> bytes:
    return bytes([number]) * SIZE


def stored_clusters(count: int, gap: int = 0) -> tuple[bytes, list[Stored]]:
    """The bytes of a file with some compressed clusters, and where each of them lies."""
    data, places = b"", []
    for number in range(count):
        stored = deflate(cluster(number))
        places.append((len(data), len(stored)))
        data += stored + bytes(gap)
    return data, places


def clusters_of(file: CountedFile, limit: int = 64 * SIZE) -> InflatedClusters:
    return InflatedClusters(file, GEOMETRY, 0, BoundedStore(limit))


@pytest.mark.parametrize("count", [1, 2, 3, 17])
async def test_every_wanted_cluster_is_found(count: int) -> None:
    data, places = stored_clusters(count)
    found = await clusters_of(CountedFile(data)).get(places)
    assert found == {place: cluster(number) for number, place in enumerate(places)}


async def test_parts_are_filled_whether_the_cluster_is_in_memory_or_not() -> None:
    data, places = stored_clusters(3)
    clusters = clusters_of(CountedFile(data))
    await clusters.get(places[:1])
    buffers = [bytearray(7) for _ in range(4)]
    wanted = {places[0]: [(0, memoryview(buffers[0]))], places[1]: [(SIZE - 7, memoryview(buffers[1]))]}
    wanted[places[2]] = [(5, memoryview(buffer)) for buffer in buffers[2:]]
    assert await clusters.fill(wanted) == {}
    assert buffers == [bytearray([number]) * 7 for number in (0, 1, 2, 2)]


async def test_two_readers_of_one_cluster_both_get_their_parts() -> None:
    stored = deflate(cluster(9))
    place, file = (0, len(stored)), SlowFile(stored)
    clusters = clusters_of(file)
    buffers = [bytearray(SIZE), bytearray(3)]

    async def reader(buffer: bytearray) -> None:
        assert await clusters.fill({place: [(0, memoryview(buffer))]}) == {}

    async with trio.open_nursery() as nursery:
        for buffer in buffers:
            nursery.start_soon(reader, buffer)
            await trio.testing.wait_all_tasks_blocked()
        file.let_go.set()
    assert buffers == [cluster(9), b"\x09" * 3]


async def test_a_part_of_a_broken_cluster_stays_as_it_was_and_the_reason_is_told() -> None:
    data, places = stored_clusters(1)
    broken = (len(data), 100)
    buffers = [bytearray(9), bytearray(b"untouched")]
    wanted = {
        place: [(0, memoryview(buffer))] for place, buffer in zip([*places, broken], buffers, strict=True)
    }
    failed = await clusters_of(CountedFile(data + b"\xff" * 100)).fill(wanted)
    assert list(failed) == [broken]
    assert buffers == [bytes(9), b"untouched"]


async def test_nothing_wanted_is_nothing_read() -> None:
    file = CountedFile(b"")
    assert await clusters_of(file).get([]) == {}
    assert file.reads == []


async def test_neighbours_are_read_by_one_request() -> None:
    data, places = stored_clusters(8)
    file = CountedFile(data)
    await clusters_of(file).get(places[::-1])
    assert file.reads == [[(0, len(data))]]


@pytest.mark.parametrize(("gap", "requests"), [(STORED_GAP, 1), (STORED_GAP + 1, 3)])
async def test_clusters_far_from_each_other_are_read_apart(gap: int, requests: int) -> None:
    data, places = stored_clusters(3, gap)
    file = CountedFile(data)
    await clusters_of(file).get(places)
    assert [len(reads) for reads in file.reads] == [requests]


async def test_stored_lengths_that_overlap_are_no_obstacle() -> None:
    data, places = stored_clusters(3)
    longer = [(offset, 512) for offset, _ in places]
    file = CountedFile(data)
    found = await clusters_of(file).get(longer)
    assert found == {place: cluster(number) for number, place in enumerate(longer)}
    assert len(file.reads[0]) == 1


async def test_a_cluster_within_the_stored_bytes_of_another_cuts_neither_short() -> None:
    noise = random.Random(1).randbytes(SIZE)
    stored = deflate(noise)
    outer, inner = (0, len(stored)), (100, 50)
    found = await clusters_of(CountedFile(stored)).get([outer, inner])
    assert found[outer] == noise
    assert isinstance(found[inner], CorruptImage)


async def test_a_cluster_wanted_twice_is_inflated_once() -> None:
    data, [place] = stored_clusters(1)
    file = CountedFile(data)
    assert await clusters_of(file).get([place, place]) == {place: cluster(0)}
    assert file.reads == [[place]]


async def test_a_cluster_in_memory_is_not_read_again() -> None:
    data, places = stored_clusters(2)
    file = CountedFile(data)
    clusters = clusters_of(file)
    await clusters.get(places[:1])
    assert await clusters.get(places) == {place: cluster(n) for n, place in enumerate(places)}
    assert file.reads == [[places[0]], [places[1]]]


async def test_two_readers_of_one_cluster_inflate_it_once() -> None:
    data, places = stored_clusters(3)
    file = SlowFile(data)
    clusters = clusters_of(file)
    found: list[dict[Stored, bytes | CorruptImage]] = []

    async def reader(wanted: list[Stored]) -> None:
        found.append(await clusters.get(wanted))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader, places[:2])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(reader, places[1:])
        await trio.testing.wait_all_tasks_blocked()
        file.let_go.set()
    assert len(file.reads) == 2
    assert sum(length for reads in file.reads for _, length in reads) == len(data)
    assert {place for part in found for place in part} == set(places)
    assert all(part[places[n]] == cluster(n) for part in found for n in range(3) if places[n] in part)


async def test_a_cancelled_reader_leaves_its_clusters_to_the_next_one() -> None:
    data, places = stored_clusters(2)
    file = SlowFile(data)
    clusters = clusters_of(file)
    with trio.CancelScope() as scope:
        scope.cancel()
        await clusters.get(places)
    assert scope.cancelled_caught
    file.let_go.set()
    assert (await clusters.get(places))[places[1]] == cluster(1)


async def test_a_broken_cluster_harms_no_other_and_is_not_kept() -> None:
    data, places = stored_clusters(2)
    broken = (len(data), 100)
    file = CountedFile(data + b"\xff" * 100)
    clusters = clusters_of(file)
    for _ in range(2):
        found = await clusters.get([*places, broken])
        assert [found[place] for place in places] == [cluster(0), cluster(1)]
        assert isinstance(found[broken], CorruptImage)
    assert len(file.reads) == 2


async def test_clusters_beyond_the_bound_are_dropped() -> None:
    data, places = stored_clusters(4)
    store: InflatedStore = BoundedStore(2 * SIZE)
    clusters = InflatedClusters(CountedFile(data), GEOMETRY, 0, store)
    assert len(await clusters.get(places)) == 4
    assert store.bytes_used == 2 * SIZE


async def test_images_that_share_a_store_do_not_share_clusters() -> None:
    store: InflatedStore = BoundedStore(64 * SIZE)
    first, second = deflate(cluster(1)).ljust(512, b"\0"), deflate(cluster(2)).ljust(512, b"\0")
    images = [InflatedClusters(CountedFile(stored), GEOMETRY, 0, store) for stored in (first, second)]
    for number, clusters in enumerate(images, 1):
        assert await clusters.get([(0, 512)]) == {(0, 512): cluster(number)}


async def test_an_error_of_the_host_passes_and_leaves_nobody_waiting() -> None:
    data, places = stored_clusters(1)
    file = CountedFile(data)
    file.fail_reads(0, 1)
    clusters = clusters_of(file)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            await clusters.get(places)
