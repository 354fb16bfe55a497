"""Writing to images whose file was cut short: refused while entries name what was lost there."""

from __future__ import annotations

import random

import pytest

from qcowfs.check import check
from qcowfs.check.checker import inspect
from qcowfs.check.repair import Wishes, repair
from qcowfs.disk import states
from qcowfs.disk.image import OpenOptions
from qcowfs.errors import CorruptImage
from qcowfs.testing import MemoryHostFile
from tests.host_files import open_file, place_of_entry, poke_word, word, writer_of
from tests.memory import open_bytes, read
from tests.shapes import DISK, Shape, make

C = 512
SHAPES = {
    "v3": Shape(cluster_size=C, size=200 << 10, snapshot=True),
    "v2": Shape(cluster_size=C, size=200 << 10, version=2),
    "narrow": Shape(cluster_size=4096, size=200 << 10, refcount_bits=1),
    "extended": Shape(extended_l2=True),
}
REFUSED = (
    "the end of its file is gone, so nothing may be written: .* --drop-lost --data, or open it read-only$"
)


async def lost_clusters(data: bytes) -> list[int]:
    """Where the live disk cannot be read."""
    image = await open_bytes(data)
    lost = []
    for guest in range(0, image.size, image.geometry.cluster_size):
        try:
            await read(image.active, guest, min(image.geometry.cluster_size, image.size - guest))
        except CorruptImage:
            lost.append(guest)
    image.close()
    return lost


@pytest.mark.parametrize("name", SHAPES)
async def test_nothing_is_written_while_entries_name_what_is_gone(name: str) -> None:
    source, refused = random.Random(name), 0
    whole = make(SHAPES[name]).files[DISK]
    for _ in range(20):
        file = MemoryHostFile(whole[: source.randrange(len(whole) // 2, len(whole))])
        data = bytes(file.data)
        lost = await lost_clusters(data)
        try:
            image = await open_file(file)
        except CorruptImage:
            refused += 1
            assert file.data == data
            continue
        await writer_of(image).write(0, b"new" * 20_000)
        await writer_of(image).flush()
        await states.resize(image, image.size + 5 * C)
        await image.aclose()
        assert not set(lost) - set(range(0, 60_000, C))
    assert refused


async def test_the_refusal_tells_what_to_do_and_that_helps() -> None:
    file = MemoryHostFile(make(SHAPES["v3"]).files[DISK][:-3000])
    with pytest.raises(CorruptImage, match=REFUSED):
        await open_file(file)
    await repair(file, await inspect(file), Wishes(errors=True, drop_lost=True, data=True))
    image = await open_file(file)
    await writer_of(image).write(0, b"new")
    await image.aclose()
    assert (await check(file)).is_clean


async def test_counts_past_the_end_that_nothing_needs_do_no_harm() -> None:
    """A crash leaves such: a cluster was counted, and the file had not grown yet."""
    data = bytearray(make(SHAPES["v3"]).files[DISK])
    block = word(data, word(data, 48))
    used = -(-len(data) // C)
    assert used + 3 < C // 2
    poke_word(data, block + (used + 2) * 2, 1, 2)
    file = MemoryHostFile(bytes(data))
    image = await open_file(file)
    await writer_of(image).write(0, b"new")
    await image.aclose()
    assert not (await check(file)).corruptions


async def test_an_entry_that_points_far_away_alone_does_not_stop_writers() -> None:
    data = bytearray(make(SHAPES["v3"]).files[DISK])
    poke_word(data, place_of_entry(data, 0), 1 << 55)
    image = await open_file(MemoryHostFile(bytes(data)))
    await writer_of(image).write(100 * C, b"new")
    with pytest.raises(CorruptImage, match="past the end of the file"):
        await read(image.active, 0, C)
    await image.aclose()


async def test_readers_still_read_what_is_left() -> None:
    image = await open_bytes(make(SHAPES["v3"]).files[DISK][:-3000], OpenOptions())
    assert image.size == SHAPES["v3"].size
    image.close()
