"""Committing an overlay while the power fails: the overlay reads the same at every moment."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from qcowfs.check import check
from qcowfs.disk.amend import Amendments, amend_file
from qcowfs.disk.image import OpenOptions
from qcowfs.disk.keys import Keys
from qcowfs.overlay.commit import Committing, commit
from qcowfs.testing import MemoryHostFile
from tests.memory import FOLDER, MemoryFolder, read
from tests.power_cuts import JointLog
from tests.shapes import BASE, DISK, KEY, Shape, make

STATES = 60
BELOW = "below.qcow2"
KEYS = Keys(default=KEY.encode())
SIZE = 120 << 10
TOP = Shape(cluster_size=4096, size=SIZE, base=70_000)


@dataclass(frozen=True)
class Chain:
    """The shapes of an overlay and of what it stands on, a raw file without one."""

    top: Shape
    below: Shape | None = None

    async def files(self) -> dict[str, bytes]:
        """Both files; each has content of its own."""
        files = make(self.top).files
        if self.below is None:
            return files
        top = MemoryHostFile(files[DISK], DISK)
        await amend_file(top, Amendments(backing_name=BELOW.encode(), backing_format="qcow2"))
        return {DISK: bytes(top.data), BELOW: make(self.below, seed=7).files[DISK]}


CHAINS = {
    "raw below": Chain(TOP),
    "plain": Chain(TOP, Shape(cluster_size=512, size=SIZE)),
    "plain with a snapshot, larger": Chain(TOP, Shape(cluster_size=4096, size=2 * SIZE, snapshot=True)),
    "plain, smaller": Chain(TOP, Shape(cluster_size=4096, size=SIZE // 2)),
    "luks on raw": Chain(Shape(cluster_size=4096, size=SIZE, base=70_000, encryption="luks")),
    "plain on luks": Chain(TOP, Shape(cluster_size=4096, size=SIZE, encryption="luks")),
    "plain on luks, smaller": Chain(TOP, Shape(cluster_size=512, size=SIZE // 2, encryption="luks")),
    "luks on luks": Chain(
        Shape(cluster_size=4096, size=SIZE, base=70_000, encryption="luks"),
        Shape(cluster_size=65536, size=SIZE, encryption="luks", snapshot=True),
    ),
    "luks on legacy aes": Chain(
        Shape(cluster_size=512, size=SIZE, base=70_000, encryption="luks"),
        Shape(cluster_size=4096, size=SIZE, encryption="aes"),
    ),
    "legacy aes on plain": Chain(
        Shape(cluster_size=4096, size=SIZE, base=70_000, encryption="aes"),
        Shape(cluster_size=4096, size=SIZE),
    ),
}


async def content(files: dict[str, bytes], name: str = DISK) -> bytes:
    folder = MemoryFolder(files)
    image = await folder.image(name, OpenOptions(keys=KEYS))
    found = await read(image.active, 0, image.size)
    image.close()
    assert folder.left_open() == []
    return found


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", CHAINS)
async def test_a_power_cut_leaves_an_overlay_that_reads_the_same(name: str, keep: bool) -> None:
    files = await CHAINS[name].files()
    before = await content(files)
    folder = MemoryFolder(files)
    log = JointLog(folder.files)
    options = OpenOptions(open_host=folder.open, open_writable=folder.open, keys=KEYS)
    assert await commit(FOLDER / DISK, options, Committing(keep=keep)) > 0
    assert folder.left_open() == []
    for cut, state in log.crash_states(STATES, random.Random(f"{name} {keep}")):
        told = f"cut at {cut} of {len(log.entries)}"
        for image in state.keys() - {BASE}:
            report = await check(MemoryHostFile(state[image]))
            assert report.corruptions == 0, f"{told}: {image}: {report.errors}"
        assert await content(state) == before, told
    await assert_committed({name: bytes(file.data) for name, file in folder.files.items()}, before, keep=keep)


async def assert_committed(files: dict[str, bytes], expected: bytes, *, keep: bool) -> None:
    """Fail unless what lies below holds it all, and the overlay nothing, or all of its own as well."""
    assert await content(files) == expected
    below = files[BASE] if BASE in files else await content(files, BELOW)
    assert below[: len(expected)] == expected
    for name in files.keys() - {BASE}:
        assert (await check(MemoryHostFile(files[name]))).is_clean
    allocated = (await check(MemoryHostFile(files[DISK]))).allocation.allocated
    assert bool(allocated) is keep
