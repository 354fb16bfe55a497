"""Headers survive unpacking and packing, whatever they hold that is unknown."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.format.extensions import Extension
from qcowfs.format.header import Header
from tests import builders

U64 = st.integers(0, (1 << 64) - 1)


@st.composite
def extensions(draw: st.DrawFn) -> tuple[Extension, ...]:
    kinds = draw(st.lists(st.integers(1, (1 << 32) - 1), max_size=3))
    return tuple(Extension(kind, draw(st.binary(max_size=40))) for kind in kinds)


@st.composite
def v2_headers(draw: st.DrawFn) -> Header:
    """Any header of version 2 within the format's limits."""
    bits = draw(st.integers(9, 21))
    offset = st.integers(0, 1 << 30).map(lambda cluster: cluster << bits)
    l1_size = draw(st.integers(0, (32 << 20) // 8))
    coverage = 1 << (2 * bits - 3)
    return Header(
        version=2,
        cluster_bits=bits,
        size=draw(st.integers(0, min(l1_size * coverage, (1 << 64) - 1))),
        crypt_method=draw(st.integers(0, (1 << 32) - 1)),
        l1_size=l1_size,
        l1_table_offset=draw(offset),
        refcount_table_offset=draw(offset),
        refcount_table_clusters=draw(st.integers(1, (8 << 20) >> bits)),
        nb_snapshots=draw(st.integers(0, 65536)),
        snapshots_offset=draw(offset),
        backing_name=draw(st.none() | st.binary(max_size=100)),
        extensions=draw(extensions()),
    )


@st.composite
def v3_headers(draw: st.DrawFn) -> Header:
    """Any header of version 3: unknown feature bits, unknown trailing bytes, short and long ones."""
    plain = draw(v2_headers())
    length = draw(st.sampled_from([104, 112, 120, 144]))
    known = length > 104
    incompatible = draw(U64)
    if plain.cluster_bits < 14 or plain.size > plain.l1_size << (2 * plain.cluster_bits - 4):
        incompatible &= ~builders.BIT_EXTENDED_L2
    return replace(
        plain,
        version=3,
        incompatible=incompatible,
        compatible=draw(U64),
        autoclear=draw(U64),
        refcount_order=draw(st.integers(0, 6)),
        header_length=length,
        compression_type=draw(st.integers(0, 255)) if known else 0,
        extra=draw(st.binary(min_size=length - 105, max_size=length - 105)) if known else b"",
    )


@given(v2_headers() | v3_headers())
def test_a_packed_header_unpacks_to_itself(header: Header) -> None:
    cluster = header.pack().ljust(1 << header.cluster_bits, b"\0")
    assert Header.unpack(cluster) == header


@given(v2_headers() | v3_headers())
def test_an_unpacked_header_packs_to_the_same_bytes(header: Header) -> None:
    packed = header.pack()
    assert Header.unpack(packed.ljust(1 << header.cluster_bits, b"\0")).pack() == packed


@pytest.mark.parametrize("version", [2, 3])
def test_every_field_is_where_the_format_puts_it(version: int) -> None:
    header = Header.unpack(_distinct_fields(version))
    assert (header.size, header.crypt_method, header.l1_size) == (0x12345600, 7, 9)
    assert (header.l1_table_offset, header.refcount_table_offset) == (0xA0000, 0xB0000)
    assert (header.refcount_table_clusters, header.nb_snapshots, header.snapshots_offset) == (3, 5, 0xC0000)
    v3 = (header.incompatible, header.compatible, header.autoclear, header.refcount_order)
    assert v3 == ((0, 0, 0, 4) if version == 2 else (1 << 40, 1 << 41, 1 << 42, 6))
    assert header.compression_type == (0 if version == 2 else 1)


def _distinct_fields(version: int) -> bytes:
    fields = {
        "size": 0x12345600, "crypt_method": 7, "l1_size": 9, "l1_table_offset": 0xA0000,
        "refcount_table_offset": 0xB0000, "refcount_table_clusters": 3, "nb_snapshots": 5,
        "snapshots_offset": 0xC0000,
    }  # fmt: skip
    if version == 3:
        fields |= {"incompatible": 1 << 40, "compatible": 1 << 41, "autoclear": 1 << 42}
        fields |= {"refcount_order": 6, "compression_type": 1}
    return builders.header(version=version, **fields)


def test_unknown_extensions_and_trailing_header_bytes_are_kept() -> None:
    start = bytearray(builders.header(header_length=128))
    start[105:128] = bytes(range(23))
    image = bytes(start) + builders.extension(0x1234, b"kept") + bytes(8)
    header = Header.unpack(image)
    assert header.extra == bytes(range(23))
    assert header.extension(0x1234) == b"kept"
    assert header.pack() == image


def test_a_header_of_104_bytes_has_compression_type_0() -> None:
    image = builders.header(header_length=104) + builders.extension(0x01234567, b"") + bytes(8)
    assert Header.unpack(image).compression_type == 0
    assert Header.unpack(image).pack() == image


@pytest.mark.parametrize(("stored", "shown"), [(0, 0), (511, 0), (512, 512), (1023, 512), (1025, 1024)])
def test_the_virtual_size_is_whole_sectors(stored: int, shown: int) -> None:
    header = Header.unpack(builders.header(size=stored))
    assert (header.size, header.virtual_size) == (stored, shown)


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_a_backing_name_may_take_up_to_1023_bytes(size: int) -> None:
    image = builders.header(backing_file_offset=120, backing_file_size=size) + bytes(8) + b"n" * size
    assert Header.unpack(image).backing_name == b"n" * size


def test_the_size_of_a_backing_name_means_nothing_without_its_offset() -> None:
    assert Header.unpack(builders.header(backing_file_size=0xFFFFFFFF)).backing_name is None


def test_extensions_end_where_the_backing_name_starts() -> None:
    fields = {"backing_file_offset": 120, "backing_file_size": 8}
    image = builders.header(**fields) + builders.extension(5, b"") + b"\0\0\0\1\0\0\0\0"
    assert Header.unpack(image).extensions == (Extension(5, b""),)


REAL = [
    "compat=v2",
    "compat=v2,cluster_size=512",
    "compat=v3",
    "compat=v3,cluster_size=512",
    "compat=v3,cluster_size=2M,lazy_refcounts=on",
    "compat=v3,cluster_size=4k,refcount_bits=1",
    "compat=v3,extended_l2=on,compression_type=zstd",
    "compat=v3,data_file=data.raw,data_file_raw=on",
    "compat=v2,backing_file=base.img,backing_fmt=raw",
    "compat=v3,backing_file=sub folder/bäse.qcow2,backing_fmt=qcow2",
    "compat=v3,cluster_size=4k,backing_file=" + 1000 * "/",
]


@pytest.mark.parametrize("options", REAL, ids=[text[:50] for text in REAL])
def test_headers_that_qemu_wrote_are_packed_as_qemu_packs_them(options: str, tmp_path: Path) -> None:
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", options, "a.qcow2", "1M"]
    if "backing_file=//" in options:
        command[6:6] = ["-F", "raw"]
    subprocess.run(command, cwd=tmp_path, check=True)
    image = (tmp_path / "a.qcow2").read_bytes()
    cluster = image[: 1 << int.from_bytes(image[20:24], "big")]
    packed = Header.unpack(cluster).pack()
    assert packed == cluster[: len(packed)]
    assert not cluster[len(packed) :].strip(b"\0")
