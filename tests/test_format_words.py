"""Tables of integers of every width: where their bits lie, and that packing is the reverse of unpacking."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.format.words import TABLE_WORDS, Words

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("bits", "data", "values"),
    [
        (1, b"\x01\x80", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (2, b"\x1b", [3, 2, 1, 0]),
        (4, b"\xa5\x0f", [5, 10, 15, 0]),
        (8, b"\x00\xff\x07", [0, 255, 7]),
        (16, b"\x01\x02\xff\xff", [0x0102, 0xFFFF]),
        (32, b"\x01\x02\x03\x04", [0x01020304]),
        (64, b"\xff\x00\x00\x00\x00\x00\x00\x01", [0xFF00000000000001]),
    ],
)
def test_words_lie_where_the_format_has_them(bits: int, data: bytes, values: list[int]) -> None:
    assert list(Words(bits).unpack(data)) == values
    assert Words(bits).pack(Words(bits).unpack(data)) == data


@given(st.sampled_from(WIDTHS), st.binary(max_size=64))
def test_packing_is_the_reverse_of_unpacking(bits: int, data: bytes) -> None:
    whole = data[: len(data) // 8 * 8]
    words = Words(bits).unpack(whole)
    assert len(words) == len(whole) * 8 // bits
    assert Words(bits).pack(words) == whole


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_maximum_fills_every_bit(bits: int) -> None:
    words = Words(bits)
    assert set(words.unpack(b"\xff" * 8)) == {words.maximum} == {2**bits - 1}


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_leaves_the_words_as_they_are(bits: int) -> None:
    words = Words(bits).unpack(bytes(range(8)))
    before = words[:]
    Words(bits).pack(words)
    assert words == before


def test_words_of_tables_have_64_bits() -> None:
    assert TABLE_WORDS.unpack(bytes(7) + b"\x09") == array("Q", [9])
