"""Random changes to images of random shapes do what they do to plain bytes, and leave a clean image."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from qcowfs.check import check
from qcowfs.image import OpenOptions
from tests.memory import MemoryFolder, read
from tests.power_cuts import Workload
from tests.shapes import SECTOR, SNAPSHOT, Made, Shape, make, open_disk, qemu

KIB = 1 << 10
KINDS = ["write", "write", "write", "zero", "unmap", "discard", "read", "flush", "reopen"]


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

    def place(self, shape: Shape) -> tuple[int, int]:
        """The guest offset and the length, within the disk."""
        unit = {"byte": 1, "sector": SECTOR, "cluster": shape.cluster_size}[self.unit]
        start = self.start * unit * (101 if self.unit == "byte" else 1) % shape.size
        return start, min(self.length * unit, shape.size - start)


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
        self.workload = Workload(disk, self.made.shape, self.made.content, 0)

    @property
    def model(self) -> bytearray:
        return self.workload.history.model

    async def do(self, step: Step) -> None:
        """Apply one rule to the image and to the model."""
        guest, length = step.place(self.made.shape)
        if step.kind == "read":
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
        """The disk and the snapshot read as they should, also by QEMU, and nothing leaked."""
        image, disk = self.workload.disk.image, self.workload.disk
        assert await disk.read(0, disk.size) == self.model
        for snapshot in image.snapshots:
            view = image.snapshot_view(snapshot)
            assert await read(view, 0, view.size) == self.made.snapshot
        await image.aclose()
        report = await check(disk.file)
        assert (report.errors, report.leaks) == ([], [])
        self.compare_by_qemu(bytes(disk.file.data))

    def compare_by_qemu(self, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path, raw = self.made.save(data, Path(scratch)), Path(scratch) / "model.raw"
            words = self.made.shape.opened(path)
            qemu("qemu-img", "check", *words)
            raw.write_bytes(self.model)
            qemu("qemu-img", "compare", *words, f"driver=raw,file.filename={raw}")
            if self.made.snapshot is not None:
                qemu("qemu-img", "convert", "-O", "raw", "-l", SNAPSHOT, *words, raw)
                assert raw.read_bytes() == self.made.snapshot


@given(
    st.one_of(*[shapes()] * 4, st.sampled_from(LUKS)),
    st.lists(steps, min_size=1, max_size=30),
    st.sampled_from([32 << 20, 1]),
)
@settings(max_examples=500)
async def test_an_image_behaves_as_plain_bytes_do(shape: Shape, rules: list[Step], table_cache: int) -> None:
    machine = Machine(make(shape), OpenOptions(table_cache=table_cache))
    await machine.start()
    for step in rules:
        await machine.do(step)
    await machine.finish()
    assert machine.folder.left_open() == []
