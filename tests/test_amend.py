"""Amending an image while the power fails: it is the old one or the new one, sound, with the same content."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qcowfs.check import Kind, check
from qcowfs.disk import states
from qcowfs.disk.amend import Amendments, amend_file
from qcowfs.format.extensions import FEATURE_NAMES, Extension
from qcowfs.format.header import Header
from qcowfs.metadata.header_store import store_header
from qcowfs.testing import MemoryHostFile
from tests.host_files import word
from tests.memory import read
from tests.power_cuts import crash_states
from tests.shapes import DISK, Made, Shape, make, open_disk

C = 512
CASES = [
    (
        Shape(cluster_size=C, size=200 << 10, version=2, snapshot=True),
        Amendments(version=3, refcount_bits=64),
    ),
    (Shape(cluster_size=C, size=200 << 10, snapshot=True), Amendments(version=2)),
    (Shape(cluster_size=C, size=200 << 10, snapshot=True, base=150 << 10), Amendments(version=2)),
    (Shape(size=5 << 20, snapshot=True, base=4 << 20), Amendments(version=2)),
    (Shape(snapshot=True, base=5000), Amendments(refcount_bits=8, lazy_refcounts=True)),
    (Shape(base=5000), Amendments(backing_name=b"./" * 200 + b"base.raw")),
    (Shape(version=2, base=5000), Amendments(version=3, backing_format="raw")),
]


async def content(made: Made, data: bytes) -> tuple[bytes, bytes | None]:
    """What the live disk and the snapshot, if there is one, read as."""
    image = await made.folder(data).image(DISK)
    found = await read(image.active, 0, image.size)
    views = [image.snapshot_view(snapshot) for snapshot in image.snapshots]
    saved = await read(views[0], 0, views[0].size) if views else None
    image.close()
    return found, saved


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
        assert await content(made, state) == (made.content, made.snapshot), f"cut at {cut} of {len(file.log)}"
        assert report.totals[Kind.LEAK] >= 0


async def test_zero_clusters_become_data_in_tables_that_a_snapshot_shares() -> None:
    made = make(Shape(size=5 << 20, base=4 << 20))
    folder = made.folder()
    disk = await open_disk(folder)
    assert disk.image.writer
    await disk.image.writer.write(1 << 20, bytes(C))
    await disk.image.writer.zero(0, 3 << 20)
    await states.create_snapshot(disk.image, b"one")
    await states.create_snapshot(disk.image, b"two")
    before = await disk.read(0, disk.size)
    await disk.image.aclose()
    file = MemoryHostFile(bytes(disk.file.data))
    await amend_file(file, Amendments(version=2))
    assert (await check(file)).is_clean
    assert await content(made, bytes(file.data)) == (before, before)
    assert word(file.data, 4, 4) == 2


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
