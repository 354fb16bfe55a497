"""The bitmap directory: which bitmaps an image carries."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.errors import CorruptImage
from qcowfs.format import extensions
from qcowfs.format.bitmaps import BitmapDirectory, BitmapEntry, unpack_directory
from qcowfs.format.header import Header
from tests.asserting import little_memory, raises_exactly
from tests.builders import padded


def record(name: bytes, *, flags: int = 0, granularity: int = 16, extra: bytes = b"") -> bytes:
    fixed = struct.pack(">QIIBBHI", 0x70000, 3, flags, 1, granularity, len(name), len(extra))
    return padded(fixed + extra + name)


def test_the_extension_tells_where_the_directory_lies() -> None:
    data = struct.pack(">IIQQ", 2, 0, 96, 0x50000)
    assert BitmapDirectory.unpack(data) == BitmapDirectory(count=2, size=96, offset=0x50000)


@pytest.mark.parametrize("length", [0, 23, 25])
def test_an_extension_of_another_length_is_damage(length: int) -> None:
    with raises_exactly(CorruptImage, f"bitmaps extension has {length} bytes, not 24"):
        BitmapDirectory.unpack(bytes(length))


@pytest.mark.parametrize(("count", "size"), [(0, 24), (65536, 24), (1, 1024 * 65535 + 1), (1, 1 << 63)])
def test_numbers_over_the_limits_are_damage(count: int, size: int) -> None:
    text = f"bitmaps extension: {count} bitmaps in {size} bytes break the limits"
    with raises_exactly(CorruptImage, text):
        BitmapDirectory.unpack(struct.pack(">IIQQ", count, 0, size, 0))


def test_every_entry_is_read_whatever_extra_data_it_has() -> None:
    table = record(b"one", flags=1) + record(b"two", flags=2, granularity=9, extra=b"later!")
    assert unpack_directory(table, 2) == [
        BitmapEntry(0x70000, 3, 1, 65536, b"one"),
        BitmapEntry(0x70000, 3, 2, 512, b"two"),
    ]


@pytest.mark.parametrize(
    ("flags", "names"), [(0, []), (1, ["in-use"]), (2, ["auto"]), (7, ["in-use", "auto"])]
)
def test_flags_have_the_names_that_qemu_shows(flags: int, names: list[str]) -> None:
    [entry] = unpack_directory(record(b"b", flags=flags), 1)
    assert entry.flag_names == names


def test_a_directory_that_ends_within_an_entry_is_damage() -> None:
    with raises_exactly(CorruptImage, "bitmap directory: entry 2 of 2 is cut short"):
        unpack_directory(record(b"name") + bytes(23), 2)


@pytest.mark.parametrize("table", [record(b"name")[:-5], record(b"b", granularity=64)])
def test_an_entry_that_cannot_be_is_damage(table: bytes) -> None:
    with raises_exactly(CorruptImage, "bitmap directory: entry 1 of 1 is cut short or senseless"):
        unpack_directory(table, 1)


@given(st.binary(max_size=300), st.integers(1, 65535))
def test_random_bytes_raise_nothing_but_damage(table: bytes, count: int) -> None:
    with little_memory():
        try:
            found = unpack_directory(table, count)
        except CorruptImage:
            found = []
    assert len(found) * 24 <= len(table)


def test_bitmaps_that_qemu_made_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    for name, options in (("first", []), ("second", ["--disable", "-g", "4096"])):
        subprocess.run(["qemu-img", "bitmap", "--add", *options, str(path), name], check=True)
    image = path.read_bytes()
    data = Header.unpack(image[: 1 << 16]).extension(extensions.BITMAPS)
    assert data is not None
    directory = BitmapDirectory.unpack(data)
    entries = unpack_directory(image[directory.offset : directory.offset + directory.size], directory.count)
    found = [(entry.name, entry.granularity, entry.flag_names) for entry in entries]
    assert sorted(found) == [(b"first", 65536, ["auto"]), (b"second", 4096, [])]
