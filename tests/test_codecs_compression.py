"""Inflating: deflate of any window and zstd, bounded in output, and deaf to what follows the stream."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.codecs.compression import inflater
from qcowfs.errors import CorruptImage, UnsupportedFeature
from tests.asserting import little_memory, raises_exactly
from tests.builders import deflate, zstd_frame

SIZE = 1 << 16
DEFLATE, ZSTD = 0, 1
COMPRESS = {DEFLATE: deflate, ZSTD: zstd_frame}
each_type = pytest.mark.parametrize("kind", [DEFLATE, ZSTD])


@given(st.sampled_from([DEFLATE, ZSTD]), st.binary(max_size=3000), st.binary(max_size=50))
def test_a_cluster_comes_out_as_it_went_in(kind: int, start: bytes, after: bytes) -> None:
    cluster = start.ljust(4096, b"\7")
    assert inflater(kind)(memoryview(COMPRESS[kind](cluster) + after), 4096) == cluster


@pytest.mark.parametrize("window_bits", [9, 12, 15])
def test_deflate_with_any_window_is_read(window_bits: int) -> None:
    cluster = (random.Random(1).randbytes(30000) * 3)[:SIZE]
    assert inflater(DEFLATE)(deflate(cluster, window_bits), SIZE) == cluster


@each_type
def test_output_ends_with_the_cluster(kind: int) -> None:
    stored = COMPRESS[kind](b"x" * (64 << 20))
    with little_memory(1 << 20):
        assert inflater(kind)(stored, SIZE) == b"x" * SIZE


@each_type
def test_a_stream_that_yields_too_little_is_damage(kind: int) -> None:
    text = f"compressed cluster inflates to 100 bytes of {SIZE}"
    with raises_exactly(CorruptImage, text):
        inflater(kind)(COMPRESS[kind](b"x" * 100), SIZE)


@each_type
def test_a_stream_that_is_cut_short_is_damage(kind: int) -> None:
    stored = COMPRESS[kind](random.Random(1).randbytes(SIZE))
    with pytest.raises(CorruptImage, match=rf"^compressed cluster inflates to \d+ bytes of {SIZE}$"):
        inflater(kind)(stored[:1000], SIZE)


@each_type
@pytest.mark.parametrize("stored", [b"\xff" * 600, b"\x06" * 600], ids=["ones", "bad blocks"])
def test_what_is_no_stream_is_damage(kind: int, stored: bytes) -> None:
    with pytest.raises(CorruptImage, match=r"^compressed cluster does not inflate: .+") as caught:
        inflater(kind)(stored, SIZE)
    assert str(caught.value).isprintable()


@each_type
def test_nothing_stored_is_damage(kind: int) -> None:
    with pytest.raises(CorruptImage, match=f"^compressed cluster inflates to 0 bytes of {SIZE}$"):
        inflater(kind)(b"", SIZE)


@given(st.sampled_from([DEFLATE, ZSTD]), st.binary(max_size=600))
def test_random_bytes_raise_nothing_but_damage(kind: int, stored: bytes) -> None:
    start = b"\x28\xb5\x2f\xfd" if kind == ZSTD else b""
    try:
        size = len(inflater(kind)(start + stored, 512))
    except CorruptImage:
        size = 512
    assert size == 512


def test_a_zstd_frame_without_its_size_is_read() -> None:
    # magic, no flags, a window of 64 KiB, a raw block of 3 bytes that is the last one
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + b"\x30" + (3 << 3 | 1).to_bytes(3, "little") + b"abc"
    assert inflater(ZSTD)(frame, 3) == b"abc"


def test_a_zstd_window_over_the_limit_is_refused_without_taking_memory() -> None:
    # a window of 2^41 bytes, and a block of one byte that is repeated
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(41 - 10) << 3]) + b"\x03\x10\x00" + b"x"
    with little_memory(1 << 20), pytest.raises(CorruptImage, match=r"^compressed cluster does not inflate"):
        inflater(ZSTD)(frame, 512)


@pytest.mark.parametrize("kind", [2, 255])
def test_another_type_is_refused_by_its_number(kind: int) -> None:
    with raises_exactly(UnsupportedFeature, f"compression type {kind} is unknown"):
        inflater(kind)
