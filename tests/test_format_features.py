"""Feature bits: which are known, and how an unknown one is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.errors import UnsupportedFeature
from qcowfs.format.features import bit_numbers, describe_unknown, refuse_unknown, unpack_names
from tests import builders
from tests.asserting import raises_exactly

U64 = st.integers(0, (1 << 64) - 1)


@given(U64)
def test_bit_numbers_are_the_bits_that_are_set(bits: int) -> None:
    numbers = bit_numbers(bits)
    assert numbers == sorted(numbers)
    assert sum(1 << n for n in numbers) == bits


@given(st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 63)), st.binary(min_size=1, max_size=46)))
def test_names_are_found_by_kind_and_bit(names: dict[tuple[int, int], bytes]) -> None:
    table = b"".join(builders.feature_name(kind, bit, name) for (kind, bit), name in names.items())
    assert unpack_names(table) == {key: name.split(b"\0")[0] for key, name in names.items()}


def test_a_name_may_fill_its_record_without_a_terminator() -> None:
    assert unpack_names(builders.feature_name(0, 63, b"n" * 46)) == {(0, 63): b"n" * 46}


@given(st.binary(max_size=200))
def test_an_incomplete_last_record_is_ignored(table: bytes) -> None:
    assert unpack_names(table) == unpack_names(table[: len(table) // 48 * 48])


@pytest.mark.parametrize("bit", range(5))
def test_the_bits_of_the_specification_are_known(bit: int) -> None:
    assert describe_unknown(1 << bit, {}) == []


@given(U64)
def test_every_unknown_bit_is_described(bits: int) -> None:
    expected = [f"incompatible feature bit {n} (unnamed)" for n in bit_numbers(bits & ~0b11111)]
    assert describe_unknown(bits, {}) == expected


def test_names_of_compatible_and_autoclear_bits_do_not_name_an_incompatible_bit() -> None:
    names = {(1, 40): b"harmless", (2, 40): b"temporary"}
    assert describe_unknown(1 << 40, names) == ["incompatible feature bit 40 (unnamed)"]


@pytest.mark.parametrize(
    ("bits", "names", "text"),
    [
        (1 << 40, {}, "incompatible feature bit 40 (unnamed)"),
        (1 << 40, {(0, 40): b"warp drive"}, 'incompatible feature bit 40 ("warp drive")'),
        (1 << 5, {(0, 5): b"a\x1b[2J\xff"}, 'incompatible feature bit 5 ("a\\x1b[2J\\xff")'),
        (
            1 << 63 | 1 << 6 | 1,
            {(0, 63): b"last"},
            'incompatible feature bit 6 (unnamed), incompatible feature bit 63 ("last")',
        ),
    ],
)
def test_unknown_bits_are_refused_by_number_and_name(
    bits: int, names: dict[tuple[int, int], bytes], text: str
) -> None:
    whole = f"needs {text}, which this version does not support"
    with raises_exactly(UnsupportedFeature, whole):
        refuse_unknown(bits, names)
