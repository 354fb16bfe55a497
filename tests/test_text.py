"""Untrusted bytes as text for terminals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.text import printable, quoted


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"", ""),
        (b"plain name", "plain name"),
        ("ümläut 漢字".encode(), "ümläut 漢字"),
        (b"\xff\xc3", "\\xff\\xc3"),
        (b"\x1b[2J\n\0", "\\x1b[2J\\x0a\\x00"),
        ("\x85\u202e\u200b".encode(), "\\x85\\x202e\\x200b"),
        ("\U000e0001".encode(), "\\xe0001"),
        (b"back\\slash", "back\\slash"),
    ],
)
def test_what_a_terminal_could_obey_is_escaped(name: bytes, shown: str) -> None:
    assert printable(name) == shown
    assert quoted(name) == f'"{shown}"'


@given(st.binary(max_size=50))
def test_any_bytes_become_one_printable_line(name: bytes) -> None:
    assert printable(name).isprintable()


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=50))
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert printable(text.encode()) == text
