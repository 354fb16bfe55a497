"""Reads at odd places and of odd lengths, through the page cache, past it, and through a memory map."""

from __future__ import annotations

import mmap
import os
import random
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e import kinds
from tests.e2e.kinds import Form, Made
from tests.e2e.mounts import mounted
from tests.e2e.tools import (
    KIB,
    MIB,
    OFFSET_MASK,
    as_raw,
    assert_same,
    convert,
    edits,
    l2_entry_at,
    poke,
    qemu_io,
    word,
)

Maker = Callable[[Path, Form], Made]

FORM = Form("v3", 64 * KIB)
KINDS: list[Maker] = [kinds.plain, kinds.zstd, kinds.extended_l2, kinds.extended_l2_overlay, kinds.over_short]
OFFSETS = [
    0, 1, 511, 513, 2047, 4095, 4097, 64 * KIB - 1, 64 * KIB + 1, 200_001, MIB - 1, MIB + 776, MIB + 778,
    FORM.size - 4097, FORM.size - 513, FORM.size - 1, FORM.size,
]  # fmt: skip
LENGTHS = [1, 511, 513, 4097, 64 * KIB + 1, MIB + 1]
CACHED, DIRECT = os.O_RDONLY, os.O_RDONLY | os.O_DIRECT


@contextmanager
def _edited(make: Maker, folder: Path) -> Iterator[tuple[Path, bytes]]:
    """An image of that kind with odd writes in it: its mounted disk, and what QEMU reads from it."""
    made = make(folder, FORM)
    qemu_io(made.image, *edits(FORM.size, make.__name__, 8))
    expected = as_raw(made.image, folder / "expected").read_bytes()
    with mounted(made.image, *made.options) as mount:
        yield mount.disk, expected


@pytest.mark.parametrize("flags", [CACHED, DIRECT], ids=["cached", "direct"])
@pytest.mark.parametrize("make", KINDS)
def test_any_offset_and_length_gives_the_bytes_of_the_raw_conversion(
    make: Maker, flags: int, tmp_path: Path
) -> None:
    with _edited(make, tmp_path) as (disk, expected):
        fd = os.open(disk, flags)
        try:
            wrong = [
                (offset, length)
                for offset in OFFSETS
                for length in LENGTHS
                if os.pread(fd, length, offset) != expected[offset : offset + length]
            ]
        finally:
            os.close(fd)
    assert wrong == []


@pytest.mark.parametrize("make", KINDS)
def test_parallel_readers_at_random_places_all_get_the_right_bytes(make: Maker, tmp_path: Path) -> None:
    places = random.Random(7)
    wanted = [(places.randrange(FORM.size), places.randrange(1, 150_000)) for _ in range(300)]
    with _edited(make, tmp_path) as (disk, expected):
        fd = os.open(disk, DIRECT)
        try:
            with ThreadPoolExecutor(8) as pool:
                got = list(pool.map(lambda place: os.pread(fd, place[1], place[0]), wanted))
        finally:
            os.close(fd)
    assert [
        place
        for place, data in zip(wanted, got, strict=True)
        if data != expected[place[0] : place[0] + place[1]]
    ] == []


def test_a_memory_map_shows_the_disk(tmp_path: Path) -> None:
    with (
        _edited(kinds.zstd, tmp_path) as (disk, expected),
        disk.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert mapped[MIB - 3 : MIB + 70_000] == expected[MIB - 3 : MIB + 70_000]
        assert mapped[:] == expected


def test_a_deflate_stream_with_a_window_of_32_kib_inflates(tmp_path: Path) -> None:
    block = random.Random(11).randbytes(20 * KIB)
    cluster = (block * 3).ljust(64 * KIB, b"\0")
    raw = tmp_path / "content"
    raw.write_bytes(cluster + bytes(64 * KIB))
    image = convert(raw, tmp_path / "image.qcow2", "-c")
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = compressor.compress(cluster) + compressor.flush()
    entry = word(image, l2_entry_at(image, 0))
    poke(image, entry & (1 << 54) - 1, stream)  # QEMU's own stream, with its small window, is longer
    assert len(stream) < 30 * KIB
    with mounted(image) as mount:
        assert (
            mount.disk.read_bytes() == as_raw(image, tmp_path / "expected").read_bytes() == raw.read_bytes()
        )


def test_a_partial_last_cluster_of_the_image_file_reads_as_zeros(tmp_path: Path) -> None:
    raw = tmp_path / "content"
    raw.write_bytes(b"\x11" * 256 * KIB)
    image = convert(raw, tmp_path / "image.qcow2")
    last = max(
        word(image, l2_entry_at(image, guest)) & OFFSET_MASK for guest in range(0, 256 * KIB, 64 * KIB)
    )
    os.truncate(image, last + 1000)
    with mounted(image) as mount:
        assert_same(mount.disk, as_raw(image, tmp_path / "expected"))
        assert mount.disk.read_bytes().count(0) == 64 * KIB - 1000
