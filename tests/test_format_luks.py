"""The LUKS header inside an encrypted image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.errors import CorruptImage
from qcowfs.format import extensions
from qcowfs.format.header import Header
from qcowfs.format.luks import HEADER_SIZE, KeySlot, LuksHeader, pack_pointer, slot_place, unpack_pointer
from tests.asserting import raises_exactly

ACTIVE, INACTIVE = 0x00AC71F3, 0x0000DEAD


def luks_header() -> bytearray:
    """A header with the third of its eight key slots in use."""
    data = bytearray(HEADER_SIZE)
    data[:8] = b"LUKS\xba\xbe\0\1"
    data[8:11], data[40:51], data[72:78] = b"aes", b"xts-plain64", b"sha256"
    data[104:112] = (4040).to_bytes(4, "big") + (64).to_bytes(4, "big")
    data[112:132], data[132:164] = b"d" * 20, b"s" * 32
    data[164:168], data[168:172] = (1000).to_bytes(4, "big"), b"uuid"
    for n in range(8):
        state = ACTIVE if n == 2 else INACTIVE
        slot = state.to_bytes(4, "big") + (7).to_bytes(4, "big") + b"%d" % n * 32
        at = 208 + n * 48
        data[at : at + 48] = slot + (8 * (n + 1)).to_bytes(4, "big") + (4000).to_bytes(4, "big")
    return data


def test_every_field_is_where_the_format_puts_it() -> None:
    header = LuksHeader.unpack(bytes(luks_header()))
    assert (header.cipher, header.mode, header.hash) == ("aes", "xts-plain64", "sha256")
    assert (header.payload_offset, header.key_bytes, header.uuid) == (4040 * 512, 64, "uuid")
    assert (header.digest, header.digest_salt, header.digest_iterations) == (b"d" * 20, b"s" * 32, 1000)
    assert [slot.active for slot in header.slots] == [n == 2 for n in range(8)]
    assert header.slots[2] == KeySlot(True, 7, b"2" * 32, 24 * 512, 4000)


def test_packing_gives_the_same_bytes_again() -> None:
    assert LuksHeader.unpack(bytes(luks_header())).pack() == luks_header()


@pytest.mark.parametrize("length", [0, HEADER_SIZE - 1])
def test_a_header_that_is_cut_short_is_damage(length: int) -> None:
    with raises_exactly(CorruptImage, f"LUKS header is cut short: {length} bytes of 592"):
        LuksHeader.unpack(bytes(length))


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, b"L\0KS", "magic 4c004b53babe version 1 is not LUKS version 1"),
        (6, b"\0\2", "magic 4c554b53babe version 2 is not LUKS version 1"),
        (208, b"\0\0\xde\xae", "key slot state 0x0000deae is unknown"),
    ],
)
def test_another_magic_version_or_state_is_damage(at: int, value: bytes, text: str) -> None:
    data = luks_header()
    data[at : at + len(value)] = value
    with raises_exactly(CorruptImage, f"LUKS header: {text}"):
        LuksHeader.unpack(bytes(data))


@pytest.mark.parametrize(
    ("at", "size", "name"),
    [(8, 32, "cipher name"), (40, 32, "cipher mode"), (72, 32, "hash"), (168, 40, "uuid")],
)
def test_a_text_without_its_terminator_is_damage(at: int, size: int, name: str) -> None:
    data = luks_header()
    data[at : at + size] = b"x" * size
    with raises_exactly(CorruptImage, f"LUKS header: the {name} is not terminated"):
        LuksHeader.unpack(bytes(data))


def test_the_pointer_is_an_offset_and_a_length() -> None:
    assert unpack_pointer((0x50000).to_bytes(8, "big") + (2068480).to_bytes(8, "big")) == (0x50000, 2068480)
    assert unpack_pointer(pack_pointer(0x50000, 7)) == (0x50000, 7)
    with raises_exactly(CorruptImage, "encryption header pointer has 15 bytes, not 16"):
        unpack_pointer(bytes(15))


@given(st.lists(st.tuples(st.integers(8, HEADER_SIZE - 1), st.integers(0, 255)), max_size=20))
def test_bytes_at_random_raise_nothing_but_damage(changes: list[tuple[int, int]]) -> None:
    data = luks_header()
    for at, value in changes:
        data[at] = value
    try:
        slots = len(LuksHeader.unpack(bytes(data)).slots)
    except CorruptImage:
        slots = 8
    assert slots == 8


def test_a_header_that_qemu_made_is_read(tmp_path: Path) -> None:
    path, secret = tmp_path / "a.qcow2", "secret,id=s,data=secret"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, "-o", options, str(path), "1M"]
    for _ in range(30):  # it measures its processor time, which fails at random on small machines
        if not subprocess.run(command, check=False, capture_output=True).returncode:
            break
    image = path.read_bytes()
    pointer = Header.unpack(image[: 1 << 16]).extension(extensions.ENCRYPTION_HEADER)
    assert pointer is not None
    offset, length = unpack_pointer(pointer)
    header = LuksHeader.unpack(image[offset : offset + length])
    assert (header.cipher, header.mode, header.hash, header.key_bytes) == ("aes", "xts-plain64", "sha256", 64)
    assert [slot.active for slot in header.slots] == [True] + [False] * 7
    assert header.slots[0].stripes == 4000
    assert [slot.key_offset for slot in header.slots] == [slot_place(n, 64) for n in range(8)]
    assert header.payload_offset == slot_place(8, 64)
    header.check(length)
    assert header.pack() == image[offset : offset + HEADER_SIZE]
