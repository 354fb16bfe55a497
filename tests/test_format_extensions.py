"""Header extensions: typed records, padded to 8 bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.errors import CorruptImage
from qcowfs.format import extensions
from qcowfs.format.extensions import Extension
from tests import builders
from tests.asserting import raises_exactly

RECORDS = st.lists(
    st.builds(Extension, st.integers(1, (1 << 32) - 1), st.binary(max_size=100)), max_size=8
).map(tuple)


@given(RECORDS, st.binary(max_size=64))
def test_packed_records_unpack_to_themselves(records: tuple[Extension, ...], before: bytes) -> None:
    assert extensions.unpack(before + extensions.pack(records), len(before)) == records


@given(RECORDS, st.binary(max_size=64))
def test_what_follows_the_end_record_is_ignored(records: tuple[Extension, ...], after: bytes) -> None:
    assert extensions.unpack(extensions.pack(records) + after, 0) == records


def test_the_padding_may_hold_anything() -> None:
    area = builders.extension(7, b"abc")[:-5] + b"\xff" * 5 + builders.extension(8, b"")
    assert extensions.unpack(area, 0) == (Extension(7, b"abc"), Extension(8, b""))


def test_records_may_end_with_the_area_instead_of_an_end_record() -> None:
    assert extensions.unpack(builders.extension(7, b"12345678"), 0) == (Extension(7, b"12345678"),)


def test_the_last_record_may_go_without_its_padding() -> None:
    assert extensions.unpack(builders.extension(7, b"abc")[:-5], 0) == (Extension(7, b"abc"),)


@pytest.mark.parametrize("length", range(8))
def test_less_than_a_record_is_no_record(length: int) -> None:
    assert extensions.unpack(b"\xff" * length, 0) == ()


@pytest.mark.parametrize("claimed", [5, 1 << 31, (1 << 32) - 1])
def test_a_record_that_claims_more_than_remains_is_damage(claimed: int) -> None:
    area = b"\xe2\x79\x2a\xca" + claimed.to_bytes(4, "big") + b"qcow"
    text = f"header extension 0xe2792aca claims {claimed} bytes, 4 remain"
    with raises_exactly(CorruptImage, text):
        extensions.unpack(area, 0)


@given(st.binary(max_size=200), st.integers(0, 250))
def test_random_bytes_raise_nothing_but_damage(area: bytes, start: int) -> None:
    try:
        found = extensions.unpack(area, start)
    except CorruptImage:
        found = ()
    assert sum(8 + len(e.data) for e in found) <= max(0, len(area) - start)


def test_more_extensions_than_anyone_writes_are_damage() -> None:
    most = extensions.MAX_EXTENSIONS
    assert len(extensions.unpack(builders.extension(7, b"") * most + bytes(8), 0)) == most
    with raises_exactly(CorruptImage, f"header has more than {most} extensions"):
        extensions.unpack(builders.extension(7, b"") * (most + 1), 0)
