"""Amending an image while the power fails: it is the old one or the new one, sound, with the same content."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qcowfs.check import Kind, check
from qcowfs.disk.amend import Amendments, amend_file
from qcowfs.format.extensions import FEATURE_NAMES, Extension
from qcowfs.format.header import Header
from qcowfs.metadata.header_store import store_header
from qcowfs.testing import MemoryHostFile
from tests.memory import read
from tests.power_cuts import crash_states
from tests.shapes import DISK, Made, Shape, make

C = 512
CASES = [
    (
        Shape(cluster_size=C, size=200 << 10, version=2, snapshot=True),
        Amendments(version=3, refcount_bits=64),
    ),
    (Shape(cluster_size=C, size=200 << 10, snapshot=True), Amendments(version=2)),
    (Shape(snapshot=True, base=5000), Amendments(refcount_bits=8, lazy_refcounts=True)),
    (Shape(base=5000), Amendments(backing_name=b"./" * 200 + b"base.raw")),
    (Shape(version=2, base=5000), Amendments(version=3, backing_format="raw")),
]


async def content(made: Made, data: bytes) -> bytes:
    image = await made.folder(data).image(DISK)
    found = await read(image.active, 0, image.size)
    image.close()
    return found


@pytest.mark.parametrize(("shape", "wanted"), CASES)
async def test_a_power_cut_leaves_a_sound_image_with_the_same_content(
    shape: Shape, wanted: Amendments
) -> None:
    made = make(shape)
    file = MemoryHostFile(made.files[DISK])
    await amend_file(file, wanted)
    assert (await check(file)).is_clean
    for cut, state in crash_states(made.files[DISK], file.log, 120, random.Random(f"{wanted}")):
        report = await check(MemoryHostFile(state))
        assert report.corruptions == 0, f"cut at {cut} of {len(file.log)}: {report.errors}"
        assert await content(made, state) == made.content, f"cut at {cut} of {len(file.log)}"
        assert report.totals[Kind.LEAK] >= 0


async def test_a_longer_header_goes_around_what_the_old_one_uses() -> None:
    file = MemoryHostFile(make(Shape(base=5000)).files[DISK])
    old = Header.unpack(bytes(file.data[:65536]))
    new = replace(old, backing_name=b"n" * 1000)
    await store_header(file, old, new)
    assert Header.unpack(bytes(file.data[:65536])) == new
    before = file.data[:65536]
    await store_header(file, new, old)
    assert Header.unpack(bytes(file.data[:65536])) == old
    assert b"nn" not in file.data[:65536]
    assert b"nn" in before


async def test_unknown_parts_of_a_header_survive() -> None:
    file = MemoryHostFile(make(Shape()).files[DISK])
    old = Header.unpack(bytes(file.data[:65536]))
    odd = replace(
        old, header_length=128, extra=b"unknown field".ljust(23, b"\1"), compatible=1 << 40,
        extensions=(*old.extensions, Extension(0x12345678, b"whatever")),
    )  # fmt: skip
    await store_header(file, old, odd)
    await amend_file(file, Amendments(lazy_refcounts=True))
    now = Header.unpack(bytes(file.data[:65536]))
    assert now.pack() == replace(odd, compatible=1 << 40 | 1).pack()
    assert now.extension(FEATURE_NAMES)
