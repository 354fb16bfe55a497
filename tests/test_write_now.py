"""Writes that are done where they arrive: what they may not do without waiting is left to the others."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from qcowfs.check import check
from qcowfs.disk.image import Image
from qcowfs.testing import MemoryHostFile, Write
from tests.host_files import writer_of
from tests.memory import read
from tests.shapes import Shape, make, open_disk
from tests.states import assert_by_qemu

C = 4096
EMPTY = Shape(cluster_size=C, size=1 << 20, filled=False)
DATA = b"now" * 333


async def opened(shape: Shape = EMPTY) -> tuple[Image, MemoryHostFile]:
    """An image of a quick host, whose first cluster is written, so that its tables are in memory."""
    disk = await open_disk(make(shape).folder())
    disk.file.is_quick = True
    await writer_of(disk.image).write(0, b"first")
    return disk.image, disk.file


async def assert_clean(image: Image, file: MemoryHostFile) -> None:
    await image.aclose()
    report = await check(file)
    assert (report.errors, report.leaks) == ([], [])


async def test_a_new_cluster_is_one_write_of_the_host() -> None:
    image, file = await opened()
    written = len(file.log)
    assert writer_of(image).write_now(5 * C + 7, DATA)
    assert [len(entry.data) for entry in file.log[written:] if isinstance(entry, Write)] == [len(DATA)]
    assert await read(image.active, 5 * C, C) == (bytes(7) + DATA).ljust(C, b"\0")
    await assert_clean(image, file)


async def test_it_is_overwritten_where_it_lies() -> None:
    image, file = await opened()
    assert writer_of(image).write_now(5 * C, DATA)
    place = file.log[-1]
    assert writer_of(image).write_now(5 * C, DATA[::-1])
    again = file.log[-1]
    assert isinstance(place, Write)
    assert isinstance(again, Write)
    assert place.offset == again.offset
    await assert_clean(image, file)


async def test_what_reaches_into_the_next_cluster_is_left_to_others() -> None:
    image, file = await opened()
    assert not writer_of(image).write_now(6 * C - 1, b"ab")
    assert await read(image.active, 5 * C, 2 * C) == bytes(2 * C)
    await assert_clean(image, file)


async def test_a_cluster_that_was_used_before_is_left_to_others() -> None:
    """It does not read as zeros, so that more than the data has to be written."""
    image, file = await opened()
    await writer_of(image).write(C, b"\xee" * 8 * C)
    await writer_of(image).flush()
    await writer_of(image).discard(C, 8 * C)
    await writer_of(image).flush()
    assert not writer_of(image).write_now(20 * C + 1, DATA)
    await writer_of(image).write(20 * C + 1, DATA)
    assert await read(image.active, 20 * C, C) == (b"\0" + DATA).ljust(C, b"\0")
    await assert_clean(image, file)


@pytest.mark.parametrize(("guest", "data"), [(5 * C, b""), (EMPTY.size, b""), (EMPTY.size, b"x"), (-1, b"x")])
async def test_nothing_and_what_lies_beyond_the_disk_are_left_to_others(guest: int, data: bytes) -> None:
    """A cluster that nothing is written to would be named where the file has no bytes."""
    image, file = await opened()
    written = len(file.log)
    assert not writer_of(image).write_now(guest, data)
    assert len(file.log) == written
    await assert_clean(image, file)


async def test_where_the_host_is_slow_nothing_changes() -> None:
    image, file = await opened()
    file.is_quick = False
    assert not writer_of(image).write_now(5 * C, DATA)
    assert await read(image.active, 5 * C, C) == bytes(C)
    await assert_clean(image, file)


async def test_where_the_host_is_full_nothing_changes() -> None:
    image, file = await opened()
    file.fail_writes(len(file.data), 1 << 30, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        writer_of(image).write_now(5 * C, DATA)
    file.heal()
    assert await read(image.active, 5 * C, C) == bytes(C)
    await assert_clean(image, file)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(C, 1 << 20, filled=False, base=1 << 20),
        Shape(C, 1 << 20, filled=False, encryption="aes"),
        Shape(16384, 1 << 20, filled=False, extended_l2=True),
    ],
    ids=["backing file", "encrypted", "subclusters"],
)
async def test_new_clusters_of_other_images_are_left_to_others(shape: Shape) -> None:
    image, file = await opened(shape)
    assert not writer_of(image).write_now(5 * shape.cluster_size, DATA)
    await assert_clean(image, file)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, C])
async def test_done_at_once_or_not_an_image_reads_as_it_was_written(
    bits: int, cluster_size: int, tmp_path: Path
) -> None:
    """Blocks of counts and tables of entries are begun and filled meanwhile."""
    made = make(Shape(cluster_size, 1 << 20, refcount_bits=bits, filled=False))
    disk = await open_disk(made.folder())
    writer, model, rng = writer_of(disk.image), bytearray(made.content), random.Random(bits)
    disk.file.is_quick, at_once = True, 0
    for _ in range(1500):
        kind, length = rng.choice(["write"] * 16 + ["discard", "flush"]), rng.randint(1, cluster_size // 2)
        guest = rng.randrange(disk.size - length)
        if kind == "flush":
            await writer.flush()
        elif kind == "discard":
            guest -= guest % cluster_size
            await writer.discard(guest, cluster_size)
            model[guest : guest + cluster_size] = bytes(cluster_size)
        else:
            data = model[guest : guest + length] = rng.randbytes(length)
            done = writer.write_now(guest, data)
            at_once += done
            if not done:
                await writer.write(guest, data)
    assert await disk.read(0, disk.size) == model
    await disk.image.aclose()
    assert at_once > 200, "else the test shows little"
    assert_by_qemu(made, bytes(disk.file.data), tmp_path, bytes(model), {})
