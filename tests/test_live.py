"""A writer's duties to the header: what it clears, keeps, sets and refuses."""

from __future__ import annotations

import pytest

from qcowfs.check import check
from qcowfs.errors import CorruptImage
from qcowfs.testing import SYNC, MemoryHostFile, Write
from tests.asserting import raises_exactly
from tests.host_files import open_file, place_of_entry, poke_word, word, writer_of
from tests.memory import FOLDER, read
from tests.shapes import DISK, Shape, make

INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = 72, 80, 88
C = 512
COPIED = 1 << 63
SHAPE = Shape(cluster_size=C, size=200 << 10, filled=False)
PATH = FOLDER / "disk.qcow2"
HOW = "repair it with qcowfs check --repair all, or open it read-only"


def image_file(**fields: int) -> MemoryHostFile:
    """An empty image with some of the header's feature words."""
    places = {"incompatible": INCOMPATIBLE, "compatible": COMPATIBLE, "autoclear": AUTOCLEAR}
    data = bytearray(make(SHAPE).files[DISK])
    for name, value in fields.items():
        poke_word(data, places[name], value)
    return MemoryHostFile(bytes(data))


@pytest.mark.parametrize(("bits", "kept"), [(1 << 9, 0), (1, 0), (2, 2), (1 << 63 | 3, 2)])
async def test_autoclear_bits_are_cleared_before_the_first_write(bits: int, kept: int) -> None:
    file = image_file(autoclear=bits)
    image = await open_file(file)
    assert file.log == []
    await read(image, 0, C)
    await writer_of(image).flush()
    assert word(file.data, AUTOCLEAR) == bits
    await writer_of(image).write(0, b"x" * C)
    assert word(file.data, AUTOCLEAR) == kept
    if bits != kept:
        assert file.log[:2] == [Write(AUTOCLEAR, kept.to_bytes(8, "big")), SYNC]
    await writer_of(image).write(C, b"y" * C)
    await image.aclose()
    touched = [e for e in file.log if isinstance(e, Write) and e.offset < C]
    assert len(touched) == (bits != kept)


async def test_an_image_that_is_only_opened_is_left_as_it_was() -> None:
    file = image_file(autoclear=1 << 9, compatible=1)
    before = bytes(file.data)
    image = await open_file(file)
    await image.aclose()
    assert (bytes(file.data), file.log) == (before, [])


async def test_unknown_extensions_and_header_bytes_survive() -> None:
    file = image_file()
    size = word(file.data, 100, 4)
    file.data[100:104] = (size + 8).to_bytes(4, "big")
    file.data[size : size + 8] = b"\0" * 7 + b"!"
    file.data[size + 8 : C] = (
        (0x12345678).to_bytes(4, "big") + (5).to_bytes(4, "big") + b"hello\0\0\0" + bytes(C - size - 24)
    )
    before = bytes(file.data[:C])
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * (100 << 10))
    await image.aclose()
    assert bytes(file.data[:C]) == before
    assert (await check(file)).is_clean


async def test_the_lazy_refcounts_flag_is_kept_and_the_image_never_dirty() -> None:
    file = image_file(compatible=1)
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    assert (word(file.data, COMPATIBLE), word(file.data, INCOMPATIBLE)) == (1, 0)
    await image.aclose()
    assert (word(file.data, COMPATIBLE), word(file.data, INCOMPATIBLE)) == (1, 0)


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (1, f"is marked dirty (not closed cleanly), its refcounts may be wrong; {HOW}"),
        (2, f"is marked corrupt, so nothing may be written; {HOW}"),
        (3, f"is marked corrupt, so nothing may be written; {HOW}"),
    ],
)
async def test_a_dirty_or_corrupt_image_is_not_opened_for_writing(bits: int, text: str) -> None:
    file = image_file(incompatible=bits)
    with raises_exactly(CorruptImage, f"{PATH}: {text}"):
        await open_file(file)
    assert file.closed
    assert file.log == []


async def test_an_overlap_marks_the_image_corrupt_and_ends_all_writing() -> None:
    file = image_file()
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    await image.aclose()
    block = word(file.data, word(file.data, 48))
    poke_word(file.data, block + 2 * (word(file.data, 40) // C), 0, 2)  # the L1 table counts as free
    image = await open_file(file)
    place = word(file.data, 40)
    text = f"{PATH}: write refused: host offset {place:#x}: the refcounts call a cluster of metadata free"
    with raises_exactly(CorruptImage, text):
        await writer_of(image).write(2 * C, b"y" * C)
    assert word(file.data, INCOMPATIBLE) == 2
    assert file.log[-1] == SYNC
    later = f"{PATH}: was marked corrupt; nothing more is written"
    with raises_exactly(CorruptImage, later):
        await writer_of(image).write(0, b"z")
    with raises_exactly(CorruptImage, later):
        await writer_of(image).discard(0, C)
    assert await read(image, 0, 1) == b"x"
    await image.aclose()


async def test_what_is_allocated_since_opening_is_counted() -> None:
    file = image_file()
    image = await open_file(file)
    await writer_of(image).write(10, b"x" * C)
    assert writer_of(image).allocated_since_open == 2 * C
    await writer_of(image).write(0, b"y" * C)
    assert writer_of(image).allocated_since_open == 2 * C
    await writer_of(image).discard(0, C)
    assert writer_of(image).allocated_since_open == C
    await image.aclose()


async def test_a_flush_makes_the_disk_clean_and_a_write_dirty() -> None:
    image = await open_file(image_file())
    writer = writer_of(image)
    assert (writer.is_dirty, writer.writes) == (False, 0)
    await writer.write(0, b"x")
    assert (writer.is_dirty, writer.writes) == (True, 1)
    await writer.flush()
    assert not writer.is_dirty
    await image.aclose()


async def test_an_entry_without_count_does_not_stop_flushing(caplog: pytest.LogCaptureFixture) -> None:
    file = image_file()
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * C)
    await image.aclose()
    place = place_of_entry(file.data, 0)
    host = word(file.data, place) & ~COPIED
    block = word(file.data, word(file.data, 48))
    poke_word(file.data, place, host)
    poke_word(file.data, block + host // C * 2, 0, 2)
    image = await open_file(file)
    await writer_of(image).discard(0, C)
    await writer_of(image).flush()
    assert "cannot free a cluster" in caplog.text
    await image.aclose()
    assert not writer_of(image).is_dirty
