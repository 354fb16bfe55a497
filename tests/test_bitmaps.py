"""Persistent bitmaps: right after every change, as in QEMU, and never trusted after a crash."""

from __future__ import annotations

import random
import struct
import tempfile
from functools import cache
from pathlib import Path

import pytest
import trio

from qcowfs.check import check
from qcowfs.disk.image import read_header
from qcowfs.disk.states import create_snapshot, resize, revert
from qcowfs.format.extensions import BITMAPS
from qcowfs.format.header import Header
from qcowfs.metadata.bitmaps import list_bitmaps
from qcowfs.testing import MemoryHostFile
from tests.host_files import open_file, poke_word, word, writer_of
from tests.power_cuts import crash_states
from tests.shapes import DISK, Shape, make, qemu

SIZE = 768 * 1024
OPERATIONS = [
    ("write", 0, 1), ("write", 100_000, 70_000), ("zero", 200_000, 66_000), ("unmap", 300_032, 4096),
    ("discard", 393_216, 131_072), ("write", SIZE - 512, 512),
]  # fmt: skip


@cache
def made(cluster_size: int = 4096) -> bytes:
    """An image with an enabled bitmap of each of two granularities, a disabled one, and some content."""
    data = make(Shape(cluster_size=cluster_size, size=SIZE)).files[DISK]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DISK
        path.write_bytes(data)
        qemu("qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
        qemu("qemu-img", "bitmap", "--add", "-g", "65536", path, "coarse")
        qemu("qemu-img", "bitmap", "--add", "--disable", path, "off")
        qemu("qemu-io", "-f", "qcow2", "-c", "write 650000 3000", path)
        return path.read_bytes()


def by_qemu(data: bytes, folder: Path) -> bytes:
    """The image after QEMU has done the operations."""
    path = folder / "qemu.qcow2"
    path.write_bytes(data)
    verbs = {"write": "write -P 9", "zero": "write -z", "unmap": "write -z -u", "discard": "discard"}
    words = [w for kind, at, n in OPERATIONS for w in ("-c", f"{verbs[kind]} {at} {n}")]
    qemu("qemu-io", "-f", "qcow2", *words, path)
    return path.read_bytes()


async def by_us(file: MemoryHostFile) -> None:
    """Do the operations, and close the image."""
    image = await open_file(file)
    writer = writer_of(image)
    for kind, at, length in OPERATIONS:
        if kind == "write":
            await writer.write(at, b"\x09" * length)
        elif kind == "discard":
            await writer.discard(at, length)
        else:
            await writer.zero(at, length, unmap=kind == "unmap")
    await image.aclose()


def flags_at(data: bytes | bytearray) -> dict[bytes, int]:
    """Where the flags of each bitmap lie."""
    header = Header.unpack(bytes(data[:65536]))
    count, _, _, start = struct.unpack(">IIQQ", header.extension(BITMAPS) or b"")
    found = {}
    for _ in range(count):
        name_size, extra = struct.unpack_from(">HI", data, start + 18)
        found[bytes(data[start + 24 + extra : start + 24 + extra + name_size])] = start + 12
        start += (24 + extra + name_size + 7) // 8 * 8
    return found


def bits(data: bytes, name: bytes) -> set[int]:
    """The granules that a stored bitmap calls dirty."""
    entry = flags_at(data)[name] - 12
    table, entries = word(data, entry), word(data, entry + 8, 4)
    size = 1 << word(data, 20, 4)
    stored = b""
    for index in range(entries):
        value = word(data, table + 8 * index)
        offset = value & 0x00FF_FFFF_FFFF_FE00
        stored += (
            data[offset : offset + size].ljust(size, b"\0")
            if offset
            else (b"\xff" if value & 1 else b"\0") * size
        )
    return {index * 8 + bit for index, byte in enumerate(stored) for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_bitmaps_are_what_qemu_would_have_made_of_them(cluster_size: int, tmp_path: Path) -> None:
    data = made(cluster_size)
    theirs = by_qemu(data, tmp_path)
    file = MemoryHostFile(data)
    await by_us(file)
    ours = bytes(file.data)
    for name in (b"fine", b"coarse", b"off"):
        assert bits(ours, name) == bits(theirs, name), name
        assert word(ours, flags_at(ours)[name], 4) == word(theirs, flags_at(theirs)[name], 4)
    assert len(bits(ours, b"fine")) > 500
    assert word(ours, 88) == word(theirs, 88) == 1
    assert (await check(file)).is_clean
    (tmp_path / "ours").write_bytes(ours)
    qemu("qemu-img", "check", tmp_path / "ours")
    listed = {b.name: b for b in await list_bitmaps(file, await read_header(file, "x"))}
    assert listed[b"fine"].dirty_bytes == 512 * len(bits(ours, b"fine"))
    assert listed[b"off"].flags == []


async def test_bits_that_were_set_stay_set() -> None:
    file = MemoryHostFile(made())
    for guest in (0, 512, 700_000):
        image = await open_file(file)
        before = bits(bytes(file.data), b"fine")
        await writer_of(image).write(guest, b"x")
        await image.aclose()
        assert bits(bytes(file.data), b"fine") == before | {guest // 512}
    assert 650_000 // 512 in before


async def test_an_image_that_is_only_read_keeps_its_bitmaps() -> None:
    file = MemoryHostFile(made())
    image = await open_file(file)
    await image.aclose()
    assert file.data == made()


async def test_writes_that_need_no_waiting_are_noted_too() -> None:
    file = MemoryHostFile(made())
    file.write_now = lambda offset, data: _write(file, offset, data)  # type: ignore[method-assign]  # as a quick host
    image = await open_file(file)
    writer = writer_of(image)
    await writer.write(4096, b"x" * 512)
    await writer.write(4096, b"x" * 512)
    assert writer.write_now(4096 + 1024, b"now")
    await image.aclose()
    assert bits(bytes(file.data), b"fine") >= {8, 10}


def _write(file: MemoryHostFile, offset: int, data: bytes | memoryview) -> bool:
    file.data[offset : offset + len(data)] = data
    return True


async def test_two_first_writes_at_once_are_both_noted() -> None:
    file = MemoryHostFile(made())
    image = await open_file(file)
    async with trio.open_nursery() as nursery:
        for guest in (0, 400_000):
            nursery.start_soon(writer_of(image).write, guest, b"x" * 512)
    await image.aclose()
    assert bits(bytes(file.data), b"fine") >= {0, 400_000 // 512, 400_000 // 512 + 1}


async def test_after_a_power_cut_no_bitmap_is_trusted_that_misses_a_change() -> None:
    data = made()
    file = MemoryHostFile(data)
    await by_us(file)
    final, places = bytes(file.data), flags_at(data)
    log = file.log
    assert log
    for cut, state in crash_states(data, log, 150, random.Random(7)):
        report = await check(MemoryHostFile(state))
        assert report.corruptions == 0, f"cut at {cut} of {len(log)}: {report.errors}"
        for name in (b"fine", b"coarse"):
            trusted = not word(state, places[name], 4) & 1
            untouched = _content(state) == _content(data)
            assert not trusted or untouched or bits(state, name) == bits(final, name), f"cut at {cut}"


def _content(state: bytes) -> bytes:
    """All of the host file but for the bitmaps' flags."""
    copy = bytearray(state)
    for place in flags_at(state).values():
        poke_word(copy, place, 0, 4)
    return bytes(copy)


async def test_bitmaps_follow_snapshots_and_sizes(tmp_path: Path) -> None:
    file = MemoryHostFile(made(512))
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * 512)
    await create_snapshot(image, b"one")
    await writer_of(image).write(512 * 99, b"x" * 512)
    await resize(image, 4 << 20)
    await writer_of(image).write((4 << 20) - 512, b"x" * 512)
    await image.aclose()
    ours = bytes(file.data)
    assert bits(ours, b"fine") >= {0, 99, (4 << 20) // 512 - 1}
    assert len(bits(ours, b"fine")) < 20
    assert word(ours, flags_at(ours)[b"off"], 4) == 0
    (tmp_path / "ours").write_bytes(ours)
    qemu("qemu-img", "check", tmp_path / "ours")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 1M 512", tmp_path / "ours")
    assert bits((tmp_path / "ours").read_bytes(), b"fine") == bits(ours, b"fine") | {2048}


async def test_going_back_to_a_snapshot_makes_everything_dirty() -> None:
    file = MemoryHostFile(made())
    image = await open_file(file)
    await create_snapshot(image, b"one")
    await revert(image, image.snapshots[0])
    await image.aclose()
    assert bits(bytes(file.data), b"fine") == set(range(SIZE // 512))
    assert (await check(file)).is_clean


async def test_a_bitmap_whose_table_has_no_room_for_the_disk_is_given_up(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    file = MemoryHostFile(made(512))
    image = await open_file(file)
    await resize(image, 200 << 20)
    await image.aclose()
    places = flags_at(file.data)
    assert [word(file.data, places[name], 4) & 1 for name in (b"fine", b"coarse", b"off")] == [1, 0, 0]
    assert "its table has no room" in caplog.text
    (tmp_path / "ours").write_bytes(file.data)
    qemu("qemu-img", "check", tmp_path / "ours")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 1M 512", tmp_path / "ours")


async def test_bitmaps_that_cannot_be_understood_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    for place, value, size in ((-12, 1 << 50, 8), (-4, 0, 4), (4, 2, 1)):
        data = bytearray(made())
        at = flags_at(data)[b"fine"]
        poke_word(data, at + place, value, size)
        file = MemoryHostFile(bytes(data))
        image = await open_file(file)
        await writer_of(image).write(0, b"x")
        await image.aclose()
        assert word(file.data, 88) == 0
        assert "its bitmaps are given up" in caplog.text
        caplog.clear()


async def test_a_bitmap_that_was_left_in_use_stays_so() -> None:
    data = bytearray(made())
    at = flags_at(data)
    poke_word(data, at[b"fine"], 3, 4)
    file = MemoryHostFile(bytes(data))
    await by_us(file)
    assert [word(file.data, at[name], 4) for name in (b"fine", b"coarse", b"off")] == [3, 2, 0]
    listed = await list_bitmaps(file, await read_header(file, "x"))
    assert [b.dirty_bytes is None for b in listed] == [True, False, False]


async def test_a_failing_host_leaves_the_bitmaps_in_use() -> None:
    file = MemoryHostFile(made())
    image = await open_file(file)
    await writer_of(image).write(0, b"x")
    table = word(file.data, flags_at(file.data)[b"fine"] - 12)
    file.fail_writes(table, 8)
    with pytest.raises(OSError, match="Input/output error"):
        await image.aclose()
    assert word(file.data, flags_at(file.data)[b"fine"], 4) == 3
