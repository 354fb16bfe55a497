"""Views: how every kind of extent becomes bytes, at and beyond the ends of files and disks."""

from __future__ import annotations

import errno
import random

import pytest

from qcowfs.disk.image import OpenOptions
from qcowfs.errors import CorruptImage
from tests.asserting import raises_exactly
from tests.builders import (
    BACKING_FORMAT,
    BIT_COMPRESSION,
    BIT_DATA_FILE,
    COPIED,
    ImageBuilder,
    deflate,
    extension,
    snapshot_record,
    zstd_frame,
)
from tests.memory import DISK, MemoryFolder, open_bytes, read

C = 512
L2 = 64 * C


def content(seed: int, length: int = C) -> bytes:
    return random.Random(seed).randbytes(length)


async def test_each_kind_of_cluster_reads_as_what_it_stands_for() -> None:
    image = ImageBuilder(8 * C)
    image.normal(0, content(0))
    image.zero_plain(C)
    image.zero_allocated(2 * C)
    image.compressed(4 * C, deflate(content(4)))
    image.normal(5 * C, content(5))
    disk = await open_bytes(image.build())
    expected = content(0) + bytes(3 * C) + content(4) + content(5) + bytes(2 * C)
    assert await read(disk, 0, 8 * C) == expected


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (1, C), (C - 1, 2), (3 * C + 5, 0), (C + 7, 3 * C + 1)]
)
async def test_a_request_may_start_and_end_anywhere(start: int, length: int) -> None:
    image = ImageBuilder(6 * C)
    guest = b"".join(content(n) for n in range(6))
    for n in (0, 1, 3):
        image.normal(n * C, content(n))
    for n in (2, 4, 5):
        image.compressed(n * C, deflate(content(n)))
    disk = await open_bytes(image.build())
    assert await read(disk, start, length) == guest[start : start + length]


@pytest.mark.parametrize("window_bits", [9, 12, 15])
async def test_deflate_with_any_window_is_read(window_bits: int) -> None:
    size = 1 << 16
    far_matches = content(1, 20000) * 4  # repeats at a distance that only a 32 KiB window reaches
    image = ImageBuilder(2 * size, cluster_bits=16)
    image.compressed(size, deflate(far_matches[:size], window_bits))
    disk = await open_bytes(image.build())
    assert await read(disk, size, size) == far_matches[:size]


async def test_zstd_clusters_are_read() -> None:
    size = 1 << 16
    fields = {"incompatible": BIT_COMPRESSION, "compression_type": 1}
    image = ImageBuilder(2 * size, cluster_bits=16, fields=fields)
    image.compressed(0, zstd_frame((content(1, 1000) * 66)[:size]))
    image.compressed(size, zstd_frame(content(2, size)[: size // 2] + bytes(size // 2)))
    disk = await open_bytes(image.build())
    expected = (content(1, 1000) * 66)[:size] + content(2, size)[: size // 2] + bytes(size // 2)
    assert await read(disk, 0, 2 * size) == expected


async def test_subclusters_are_read_one_by_one() -> None:
    size, sub = 1 << 14, 512
    image = ImageBuilder(size, cluster_bits=14, extended_l2=True, backing_name=b"base")
    image.extensions = extension(BACKING_FORMAT, b"raw")
    image.subclusters(0, content(1, size), 0b101 | 0b10 << 32)
    folder = MemoryFolder({"a": image.build(), "base": b"b" * size})
    disk = await folder.image("a")
    expected = content(1, size)[:sub] + bytes(sub) + content(1, size)[2 * sub : 3 * sub] + b"b" * 29 * sub
    assert await read(disk, 0, size) == expected


async def test_contiguous_clusters_are_read_by_one_request() -> None:
    image = ImageBuilder(L2)
    image.l2_table(0)
    host = image.normal(0, content(0))
    for n in range(1, 64):
        image.normal(n * C, content(n))
    folder = MemoryFolder({DISK.name: image.build()})
    disk = await folder.image(DISK.name)
    await read(disk, 0, 1)
    folder.files[DISK.name].reads.clear()
    assert await read(disk, 0, L2) == b"".join(content(n) for n in range(64))
    assert folder.files[DISK.name].reads == [[(host, L2)]]


async def test_a_partial_last_cluster_reads_as_zeros_beyond_the_end_of_the_file() -> None:
    image = ImageBuilder(2 * C)
    image.l2_table(0)
    image.normal(C, content(1))
    disk = await open_bytes(image.build()[: -(C - 10)])
    assert await read(disk, C, C) == content(1)[:10] + bytes(C - 10)
    assert await read(disk, C + 100, 20) == bytes(20)


async def test_a_table_in_a_partial_last_cluster_is_zeros_beyond_the_end_of_the_file() -> None:
    image = ImageBuilder(L2)
    image.normal(0, content(0))
    assert await read(await open_bytes(image.build()[: -(C - 8)]), 0, L2) == content(0) + bytes(L2 - C)


async def test_a_snapshot_is_read_through_its_own_tables_at_its_own_size() -> None:
    image = ImageBuilder(2 * C)
    tree = image.new_tree(1)
    image.normal(0, content(0))
    image.normal(0, content(1), tree)
    image.compressed(C, deflate(content(2)), tree)
    image.normal(2 * C, content(3), tree)
    image.normal(3 * C, b"VM state, beyond the disk", tree)
    extra = bytes(8) + (3 * C + 100).to_bytes(8, "big")
    image.snapshots.append(snapshot_record(b"1", b"one", l1_offset=tree.offset, l1_size=1, extra=extra))
    disk = await open_bytes(image.build())
    view = disk.snapshot_view(disk.snapshots[0])
    assert (disk.size, view.size) == (2 * C, 3 * C)
    assert await read(view, 0, 4 * C) == content(1) + content(2) + content(3) + bytes(C)
    assert await read(disk, 0, 2 * C) == content(0) + bytes(C)


@pytest.mark.parametrize("guest", [3 * C, 3 * C - 5, 10**15])
async def test_beyond_the_disk_everything_is_zeros(guest: int) -> None:
    image = ImageBuilder(3 * C)
    for n in range(5):
        image.normal(n * C, b"x" * C)
    disk = await open_bytes(image.build())
    assert await read(disk, guest, 20) == (b"x" * max(0, 3 * C - guest)).ljust(20, b"\0")


async def test_a_disk_without_size_is_all_beyond_its_end() -> None:
    disk = await open_bytes(ImageBuilder(0).build())
    assert disk.size == 0
    assert await read(disk, 0, 100) == bytes(100)


async def test_data_of_a_data_file_is_read_from_there() -> None:
    folder = _with_data_file(content(0) + content(1))
    disk = await folder.image("a", OpenOptions(data_file=DISK.with_name("data")))
    assert await read(disk, 0, 3 * C) == content(0) + content(1) + bytes(C)


async def test_a_cluster_past_the_end_of_the_data_file_is_damage_of_the_data_file() -> None:
    folder = _with_data_file(content(0))
    disk = await folder.image("a", OpenOptions(data_file=DISK.with_name("data")))
    rule = "the cluster lies past the end of the file (512 bytes)"
    with raises_exactly(CorruptImage, f"/images/a: guest offset 0x200, host offset 0x200: {rule}"):
        await read(disk, 0, 3 * C)


def _with_data_file(data: bytes) -> MemoryFolder:
    image = ImageBuilder(3 * C, fields={"incompatible": BIT_DATA_FILE})
    image.entry(0, COPIED)
    image.entry(C, C | COPIED)
    return MemoryFolder({"a": image.build(), "data": data})


async def test_an_error_of_the_host_passes_with_its_errno() -> None:
    image = ImageBuilder(2 * C)
    image.l2_table(0)
    host = image.normal(0, content(0))
    image.normal(C, content(1))
    folder = MemoryFolder({DISK.name: image.build()})
    disk = await folder.image(DISK.name)
    folder.files[DISK.name].fail_reads(host, 1)
    assert await read(disk, C, C) == content(1)
    with pytest.raises(OSError, match="Input/output error") as caught:
        await read(disk, 0, C)
    assert caught.value.errno == errno.EIO


async def test_what_is_in_memory_is_read_at_once() -> None:
    image = ImageBuilder(4 * C)
    image.normal(0, content(0))
    image.zero_plain(C)
    image.compressed(2 * C, deflate(content(2)))
    folder = MemoryFolder({DISK.name: image.build()})
    disk = (await folder.image(DISK.name)).active
    buffer = memoryview(bytearray(b"\xa5" * C))
    assert disk.read_now(0, buffer) is None
    await read(disk, 0, C)
    assert disk.read_now(0, buffer) is None
    folder.files[DISK.name].is_cached = True
    answers = [disk.read_now(n * C, buffer) for n in range(4)]
    assert [None if a is None else bytes(a) for a in answers] == [content(0), bytes(C), None, bytes(C)]


async def test_nothing_that_a_backing_file_may_hold_is_answered_at_once() -> None:
    image = ImageBuilder(C, backing_name=b"b", extensions=extension(BACKING_FORMAT, b"raw"))
    image.l2_table(0)
    folder = MemoryFolder({"a": image.build(), "b": b"b" * C})
    disk = (await folder.image("a")).active
    folder.files["a"].is_cached = True
    assert await read(disk, 0, C) == b"b" * C
    assert disk.read_now(0, memoryview(bytearray(C))) is None


async def test_a_cluster_that_the_file_ends_in_is_not_answered_at_once() -> None:
    image = ImageBuilder(C)
    image.l2_table(0)
    image.normal(0, content(1))
    folder = MemoryFolder({"a": image.build()[:-1]})
    disk = (await folder.image("a")).active
    folder.files["a"].is_cached = True
    await read(disk, 0, C)
    assert disk.read_now(0, memoryview(bytearray(C))) is None
    answer = disk.read_now(0, memoryview(bytearray(C - 1)))
    assert answer is not None
    assert bytes(answer) == content(1)[:-1]
