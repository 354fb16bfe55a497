"""Rebasing and emptying an overlay while the power fails: it reads the same at every moment."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qcowfs.check import Kind, check
from qcowfs.disk.image import OpenOptions
from qcowfs.disk.keys import Keys
from qcowfs.overlay.commit import empty
from qcowfs.overlay.rebase import NewBacking, rebase
from qcowfs.testing import MemoryHostFile
from tests.memory import FOLDER, MemoryFolder, read
from tests.power_cuts import crash_states
from tests.shapes import BASE, DISK, KEY, Made, Shape, make

STATES = 80
OTHER = "other.raw"
SHAPES = [
    Shape(cluster_size=512, size=200 << 10, base=150_000),
    Shape(version=2, base=500_000),
    Shape(extended_l2=True, base=700_000),
    Shape(cluster_size=4096, size=200 << 10, base=150_000, encryption="luks"),
    Shape(cluster_size=4096, size=200 << 10, base=150_000, encryption="aes"),
]
KEYS = Keys(default=KEY.encode())


async def content(made: Made, files: dict[str, bytes]) -> bytes:
    image = await MemoryFolder(made.files | files).image(DISK, OpenOptions(keys=KEYS))
    found = await read(image.active, 0, image.size)
    image.close()
    return found


def other_base(made: Made) -> bytes:
    """A file that is the same as the old base here and there."""
    rng = random.Random(3)
    data = bytearray(made.files[BASE])
    for _ in range(6):
        start = rng.randrange(len(data))
        part = data[start : start + 20_000]
        data[start : start + 20_000] = rng.randbytes(len(part))
    return bytes(data[:-3000])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [OTHER, ""])
async def test_a_power_cut_leaves_an_overlay_that_reads_the_same(shape: Shape, name: str) -> None:
    made = make(shape)
    files = {OTHER: other_base(made)}
    folder = MemoryFolder(made.files | files)
    options = OpenOptions(writable=True, open_host=folder.open, open_writable=folder.open, keys=KEYS)
    await rebase(FOLDER / DISK, NewBacking(name.encode(), "raw" if name else None), options)
    assert folder.left_open() == []
    log = folder.files[DISK].log
    ends = set()
    for cut, state in crash_states(made.files[DISK], log, STATES, random.Random(f"{shape} {name}")):
        report = await check(MemoryHostFile(state))
        assert report.corruptions == 0, f"cut at {cut} of {len(log)}: {report.errors}"
        assert await content(made, files | {DISK: state}) == made.content, f"cut at {cut} of {len(log)}"
        ends.add(OTHER.encode() in state[:1024])
    assert ends == {bool(name), False}
    final = bytes(folder.files[DISK].data)
    assert await content(made, files | {DISK: final, BASE: b"gone"}) == made.content
    assert (await check(MemoryHostFile(final))).is_clean


@pytest.mark.parametrize("shape", [replace(shape, snapshot=True) for shape in SHAPES])
async def test_an_overlay_that_is_emptied_reads_the_same_at_every_moment(shape: Shape) -> None:
    made = make(shape)
    below = {BASE: made.content}  # as if it were committed
    file = MemoryHostFile(made.files[DISK])
    await empty(file)
    for cut, state in crash_states(made.files[DISK], file.log, STATES, random.Random(f"{shape}")):
        report = await check(MemoryHostFile(state))
        assert report.corruptions == 0, f"cut at {cut} of {len(file.log)}: {report.errors}"
        assert await content(made, below | {DISK: state}) == made.content, f"cut at {cut} of {len(file.log)}"
    report = await check(file)
    assert (report.is_clean, report.allocation.allocated) == (True, 0)
    assert not report.totals[Kind.LEAK]
