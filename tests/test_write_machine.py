"""Random changes to images of random shapes do what they do to plain bytes, and leave a clean image."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from qcowfs.check import check
from qcowfs.disk.image import OpenOptions
from tests.memory import MemoryFolder
from tests.power_cuts import WHOLE, Workload, read_saved
from tests.shapes import SECTOR, Made, Shape, make, open_disk
from tests.states import assert_by_qemu

KIB = 1 << 10
KINDS = ["write", "write", "write", "zero", "unmap", "discard", "read", "flush", "reopen", *WHOLE]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Any shape that QEMU makes within a few hundred KiB."""
    version = draw(st.sampled_from([3, 3, 2]))
    extended = version == 3 and draw(st.booleans())
    cluster = 1 << draw(st.integers(14 if extended else 9, 16))
    bits = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])) if version == 3 else 16
    size = max(12 * cluster, 100 * KIB) + draw(st.integers(0, 5)) * SECTOR
    return Shape(
        cluster, size, version, bits, extended,
        base=draw(st.sampled_from([None, size // 2 + 77, 2 * size])),
        snapshot=bits > 1 and draw(st.booleans()),
        filled=draw(st.sampled_from([True, True, False])),
        encryption=draw(st.sampled_from([None, None, None, "aes"])),
    )  # fmt: skip


LUKS = [
    Shape(4096, 100 * KIB + SECTOR, base=70_000, snapshot=True, encryption="luks"),
    Shape(16384, 12 * 16384, extended_l2=True, snapshot=True, encryption="luks"),
]
"""Few, since QEMU takes its time to make one."""


@dataclass(frozen=True)
class Step:
    """One rule with its arguments; `start` and `length` count units of a sector, a cluster or a byte."""

    kind: str
    unit: str
    start: int
    length: int
    seed: int

    def place(self, shape: Shape, size: int) -> tuple[int, int]:
        """The guest offset and the length, within a disk of that size."""
        unit = {"byte": 1, "sector": SECTOR, "cluster": shape.cluster_size}[self.unit]
        start = self.start * unit * (101 if self.unit == "byte" else 1) % size
        return start, min(self.length * unit, size - start)


steps = st.builds(
    Step,
    st.sampled_from(KINDS),
    st.sampled_from(["byte", "sector", "cluster"]),
    st.integers(0, 5000),
    st.integers(0, 40),
    st.integers(0, 1 << 16),
)


@dataclass
class Machine:
    """An open image beside a model of plain bytes."""

    made: Made
    options: OpenOptions
    folder: MemoryFolder = field(init=False)
    workload: Workload = field(init=False)

    async def start(self) -> None:
        """Open the image."""
        self.folder = self.made.folder()
        disk = await open_disk(self.folder, self.options)
        self.workload = Workload(disk, self.made.shape, self.made.content, 0, await read_saved(disk))

    @property
    def model(self) -> bytearray:
        return self.workload.history.model

    async def do(self, step: Step) -> None:
        """Apply one rule to the image and to the model."""
        guest, length = step.place(self.made.shape, len(self.model))
        if step.kind in WHOLE:
            await self.workload.change_whole(step.kind, random.Random(step.seed))
        elif step.kind == "read":
            assert await self.workload.disk.read(guest, length) == self.model[guest : guest + length]
        elif step.kind == "flush":
            await self.workload.flush()
        elif step.kind == "reopen":
            await self.workload.disk.image.aclose()
            self.workload.disk = await open_disk(self.folder, self.options)
        else:
            data = random.Random(step.seed).randbytes(length)
            await self.workload.change_disk(step.kind, guest, data)
            self.workload.update_model(step.kind, guest, data)

    async def finish(self) -> None:
        """The disk and the snapshots read as they should, also by QEMU, and nothing leaked."""
        image, disk = self.workload.disk.image, self.workload.disk
        assert await disk.read(0, disk.size) == self.model
        assert await read_saved(disk) == self.workload.saved
        await image.aclose()
        report = await check(disk.file)
        assert (report.errors, report.leaks) == ([], [])
        saved = {id_: content for id_, (_, content) in self.workload.saved.items()}
        with tempfile.TemporaryDirectory() as scratch:
            assert_by_qemu(self.made, bytes(disk.file.data), Path(scratch), bytes(self.model), saved)


@given(
    st.one_of(*[shapes()] * 4, st.sampled_from(LUKS)),
    st.lists(steps, min_size=1, max_size=30),
    st.sampled_from([32 << 20, 1]),
)
@settings(max_examples=300)
async def test_an_image_behaves_as_plain_bytes_do(shape: Shape, rules: list[Step], table_cache: int) -> None:
    machine = Machine(make(shape), OpenOptions(table_cache=table_cache))
    await machine.start()
    for step in rules:
        await machine.do(step)
    await machine.finish()
    assert machine.folder.left_open() == []
