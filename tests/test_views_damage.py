"""Lost data: an error that names the place and the rule, one log line, or zeros where the user wants that."""

from __future__ import annotations

import logging

import pytest

from qcowfs.disk.image import Image, OpenOptions
from qcowfs.errors import CorruptImage
from tests.asserting import raises_exactly
from tests.builders import BACKING_FORMAT, COPIED, ImageBuilder, deflate, extension
from tests.memory import DISK, MemoryFolder, open_bytes, read

C = 512
AS_ZEROS = OpenOptions(lost_data_as_zeros=True)


def cut_short() -> tuple[bytes, int]:
    """An image whose third cluster lies wholly past its end, and that cluster's host offset."""
    image = ImageBuilder(4 * C)
    image.l2_table(0)
    for n in range(3):
        host = image.normal(n * C, b"%d" % n * C)
    return image.build()[:-C], host


def text_of(guest: int, host: int, rule: str) -> str:
    return f"{DISK}: guest offset {guest:#x}, host offset {host:#x}: {rule}"


async def test_a_cluster_wholly_past_the_end_of_the_file_is_lost() -> None:
    data, host = cut_short()
    disk = await open_bytes(data)
    rule = f"the cluster lies past the end of the file ({len(data)} bytes)"
    with raises_exactly(CorruptImage, text_of(2 * C, host, rule)):
        await read(disk, 0, 4 * C)
    with raises_exactly(CorruptImage, text_of(2 * C, host, rule)):  # told by where the cluster starts
        await read(disk, 2 * C + 9, 1)


async def test_what_lies_before_and_after_lost_data_is_read() -> None:
    data, _ = cut_short()
    disk = await open_bytes(data)
    assert await read(disk, 0, 2 * C) == b"0" * C + b"1" * C
    assert await read(disk, 3 * C, C) == bytes(C)


async def test_lost_data_reads_as_zeros_where_the_user_wants_that() -> None:
    data, _ = cut_short()
    disk = await open_bytes(data, AS_ZEROS)
    assert await read(disk, 0, 4 * C) == b"0" * C + b"1" * C + bytes(2 * C)


async def test_a_cluster_comes_back_when_the_file_grows_again() -> None:
    data, host = cut_short()
    folder = MemoryFolder({DISK.name: data})
    disk = await folder.image(DISK.name, AS_ZEROS)
    assert await read(disk, 2 * C, C) == bytes(C)
    folder.files[DISK.name].data[host:] = b"2" * C
    assert await read(disk, 2 * C, C) == b"2" * C


async def test_each_place_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    data, host = cut_short()
    disk = await open_bytes(data)
    for _ in range(3):
        with pytest.raises(CorruptImage):
            await read(disk, 2 * C, C)
    rule = f"the cluster lies past the end of the file ({len(data)} bytes)"
    text = text_of(2 * C, host, rule)
    assert caplog.record_tuples == [("qcowfs.data.views", logging.ERROR, f"{text}; reads fail")]


async def test_zeros_for_lost_data_are_logged_as_such(caplog: pytest.LogCaptureFixture) -> None:
    data, _ = cut_short()
    await read(await open_bytes(data, AS_ZEROS), 2 * C, C)
    assert [r.getMessage().rpartition("; ")[2] for r in caplog.records] == ["reads as zeros"]


def broken_entries() -> ImageBuilder:
    """Damage of every kind that an entry can have, each in a cluster of 4 KiB between sound ones."""
    size = 4096
    image = ImageBuilder(16 * size, cluster_bits=12)
    for n in range(16):
        image.normal(n * size, bytes([n]) * size)
    image.entry(size, 0x5200 | COPIED)
    image.entry(3 * size, 0xFF_FFFF_FFFF_F000 | COPIED)
    image.entry(5 * size, image.descriptor(1 << 55, 100))
    image.compressed(7 * size, b"\xff" * 100)
    image.compressed(9 * size, deflate(b"short"))
    return image


RULES = [
    (1, "L2 entry: cluster offset 0x5200 is not cluster aligned"),
    (3, "the cluster lies past the end of the file ({size} bytes)"),
    (5, "the cluster lies past the end of the file ({size} bytes)"),
    (7, "compressed cluster does not inflate: "),
    (9, "compressed cluster inflates to 5 bytes of 4096"),
]


@pytest.mark.parametrize(("cluster", "rule"), RULES)
async def test_each_kind_of_damage_is_told_by_its_rule(cluster: int, rule: str) -> None:
    data = broken_entries().build()
    disk = await open_bytes(data)
    with pytest.raises(CorruptImage) as caught:
        await read(disk, cluster * 4096, 10)
    text = str(caught.value)
    assert text.startswith(f"{DISK}: guest offset {cluster * 4096:#x}, host offset 0x")
    assert rule.format(size=len(data)) in text


async def test_damage_of_every_kind_may_read_as_zeros() -> None:
    disk = await open_bytes(broken_entries().build(), AS_ZEROS)
    damaged = {cluster for cluster, _ in RULES}
    expected = b"".join(bytes(4096) if n in damaged else bytes([n]) * 4096 for n in range(16))
    assert await read(disk, 0, 16 * 4096) == expected


async def test_damage_in_one_request_leaves_the_other_clusters_of_a_later_one_alone() -> None:
    disk = await open_bytes(broken_entries().build())
    await _expect_damage(disk, 0, 16 * 4096)
    assert await read(disk, 8 * 4096, 4096) == b"\x08" * 4096


async def _expect_damage(disk: Image, guest: int, length: int) -> None:
    with pytest.raises(CorruptImage):
        await read(disk, guest, length)


async def test_damage_below_an_overlay_names_the_backing_file() -> None:
    data, host = cut_short()
    overlay = ImageBuilder(4 * C, backing_name=b"base", extensions=extension(BACKING_FORMAT, b"qcow2"))
    disk = await MemoryFolder({"a": overlay.build(), "base": data}).image("a")
    where = f"/images/base (backing file of /images/a): guest offset 0x400, host offset {host:#x}"
    rule = f"the cluster lies past the end of the file ({len(data)} bytes)"
    with raises_exactly(CorruptImage, f"{where}: {rule}"):
        await read(disk, 2 * C, C)
