"""After a power cut at any moment the image opens, has no errors, and holds what was flushed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowfs.check import check
from qcowfs.testing import MemoryHostFile, Sync, Write
from tests.power_cuts import WHOLE, History, Workload, crash_states, read_saved
from tests.shapes import DISK, SECTOR, Made, Shape, make, open_disk, qemu

SMALL, ODD = 200 << 10, 3 * SECTOR
STEPS = 50
STATES_OF_A_WORKLOAD = 60
QEMU_JUDGES = (1, 20, 37)

SHAPES = {
    "plain": Shape(),
    "empty": Shape(filled=False),
    "empty, clusters of 512": Shape(cluster_size=512, filled=False, refcount_bits=64),
    "empty, clusters of 4096": Shape(cluster_size=4096, filled=False, refcount_bits=1),
    "snapshot": Shape(snapshot=True),
    "backing": Shape(base=300_001),
    "long backing": Shape(base=1 << 20, snapshot=True),
    "version 2": Shape(version=2, snapshot=True),
    "version 2 backing": Shape(version=2, base=500_000, cluster_size=4096, size=SMALL + ODD),
    "clusters of 512": Shape(cluster_size=512, size=SMALL + ODD, snapshot=True),
    "clusters of 4096": Shape(cluster_size=4096, size=SMALL + ODD, base=SMALL // 2),
    "1 bit": Shape(cluster_size=512, size=SMALL, refcount_bits=1),
    "2 bits": Shape(cluster_size=1024, size=SMALL, refcount_bits=2, snapshot=True),
    "4 bits": Shape(cluster_size=2048, size=SMALL, refcount_bits=4, snapshot=True),
    "8 bits": Shape(cluster_size=8192, size=2 * SMALL, refcount_bits=8),
    "32 bits": Shape(cluster_size=4096, size=SMALL, refcount_bits=32, snapshot=True),
    "64 bits": Shape(cluster_size=512, size=SMALL, refcount_bits=64, snapshot=True),
    "table grows": Shape(cluster_size=512, size=2200 << 10, refcount_bits=64, bulk=1850 << 10),
    "subclusters": Shape(extended_l2=True, cluster_size=16384, size=2 * SMALL + ODD, snapshot=True),
    "subclusters backing": Shape(extended_l2=True, base=600_000, size=768 << 10),
    "luks": Shape(cluster_size=4096, size=SMALL + ODD, snapshot=True, encryption="luks"),
    "legacy aes": Shape(base=300_001, encryption="aes"),
}
CASES = [(name, seed, faults) for name in SHAPES for seed, faults in ((1, False), (2, False), (3, True))]


@dataclass(frozen=True)
class Crash:
    """One state after a power cut, and what is asked of it."""

    made: Made
    history: History
    cut: int
    data: bytes
    told: str

    async def judge(self, rng: random.Random) -> None:
        """The image opens, is right, holds what was flushed, and can be written to."""
        report = await check(MemoryHostFile(self.data))
        assert report.errors == [], self.told
        folder = self.made.folder(self.data)
        disk = await open_disk(folder)
        content, saved = await disk.read(0, disk.size), await read_saved(disk)
        assert self.history.faults(self.cut, content, saved) == [], self.told
        await self.go_on(Workload(disk, self.made.shape, content, rng.randrange(1 << 30), saved))
        assert folder.left_open() == [], self.told

    async def go_on(self, workload: Workload) -> None:
        """A few more changes and an orderly close."""
        for kind in ("write", workload.rng.choice(WHOLE), "write", "unmap", "write"):
            await workload.step(kind)
        disk, image = workload.disk, workload.disk.image
        assert await disk.read(0, disk.size) == bytes(workload.history.model), self.told
        assert await read_saved(disk) == workload.saved, self.told
        await image.aclose()
        report = await check(disk.file)
        assert report.errors == [], self.told


@pytest.mark.parametrize(("name", "seed", "faults"), CASES)
async def test_nothing_flushed_is_lost_in_a_power_cut(
    name: str, seed: int, faults: bool, tmp_path: Path, power_cuts: int
) -> None:
    wanted = -(-power_cuts // len(CASES))
    made = make(SHAPES[name], seed)
    judged = 0
    while judged < wanted:
        workload_seed = seed * 1_000_000 + judged
        history, log = await work(made, workload_seed, faults=faults)
        count = min(wanted - judged, STATES_OF_A_WORKLOAD)
        rng = random.Random(workload_seed)
        for cut, data in crash_states(made.files[DISK], log, count, rng):
            told = f"{name}, seeds {seed} and {workload_seed}, cut at {cut} of {len(log)}, faults {faults}"
            await Crash(made, history, cut, data, told).judge(rng)
            judged += 1
            if judged in QEMU_JUDGES:
                qemu("qemu-img", "check", *made.shape.opened(made.save(data, tmp_path)), codes=(0, 3))
    assert judged == wanted


async def work(made: Made, seed: int, *, faults: bool) -> tuple[History, list[Write | Sync]]:
    """A workload's history and log; the image is left open as a crash leaves it."""
    disk = await open_disk(made.folder())
    saved = await read_saved(disk)
    history = await Workload(disk, made.shape, made.content, seed, saved).run(STEPS, faults=faults)
    return history, list(disk.file.log)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", [11, 12])
async def test_after_faults_of_the_host_a_closed_image_is_clean(name: str, seed: int, tmp_path: Path) -> None:
    made = make(SHAPES[name])
    disk = await open_disk(made.folder())
    workload = Workload(disk, made.shape, made.content, seed, await read_saved(disk))
    history = await workload.run(2 * STEPS, faults=True)
    assert await disk.read(0, disk.size) == bytes(history.model), f"seed {seed}"
    assert await read_saved(disk) == workload.saved, f"seed {seed}"
    await disk.image.aclose()
    report = await check(disk.file)
    assert report.errors == [], f"seed {seed}"
    if workload.is_over:
        return
    assert report.leaks == [], f"seed {seed}"
    qemu("qemu-img", "check", *made.shape.opened(made.save(bytes(disk.file.data), tmp_path)))
