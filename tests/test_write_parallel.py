"""Several writers at once, each with a range of its own that shares clusters with its neighbours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowfs.check import check
from qcowfs.disk.image import Image, OpenOptions
from qcowfs.disk.keys import Keys
from qcowfs.host.hostfile import HostFile, ReadRequest, WriteRequest
from qcowfs.testing import MemoryHostFile
from tests.host_files import writer_of
from tests.memory import FOLDER, read
from tests.shapes import DISK, KEY, SECTOR, Made, Shape, make

WRITERS, STEPS = 6, 15
SIZE = 200 << 10

shapes = st.sampled_from(
    [
        Shape(cluster_size=512, size=SIZE, snapshot=True),
        Shape(cluster_size=4096, size=SIZE, base=SIZE // 2, snapshot=True),
        Shape(snapshot=True),
        Shape(extended_l2=True, cluster_size=16384, size=2 * SIZE, snapshot=True),
        Shape(version=2, cluster_size=1024, size=SIZE, base=90_000),
        Shape(cluster_size=1024, size=SIZE, refcount_bits=1),
        Shape(cluster_size=4096, size=SIZE, snapshot=True, encryption="luks"),
        Shape(size=SIZE, base=90_000, encryption="aes"),
    ]
)


class YieldingFile(MemoryHostFile):
    """A file that lets other tasks run before, between and after all that it does."""

    def __init__(self, data: bytes, rng: random.Random) -> None:
        super().__init__(data)
        self.rng = rng

    async def _let_others_run(self) -> None:
        for _ in range(self.rng.randrange(3)):
            await trio.lowlevel.checkpoint()

    async def read_into(self, requests: Sequence[ReadRequest]) -> None:
        await self._let_others_run()
        await super().read_into(requests)
        await self._let_others_run()

    async def write_from(self, requests: Sequence[WriteRequest]) -> None:
        await self._let_others_run()
        for request in requests:
            await super().write_from([request])
            await self._let_others_run()

    async def sync(self) -> None:
        await self._let_others_run()
        await super().sync()


class Crowd:
    """An open image, a model of its bytes, and the writers."""

    def __init__(self, made: Made, seed: int) -> None:
        self.made, self.rng = made, random.Random(seed)
        self.files: dict[str, YieldingFile] = {}
        self.model = bytearray(made.content)
        self.image: Image

    async def open(self, table_cache: int) -> None:
        """Open the image for writing."""
        options = OpenOptions(
            writable=True, table_cache=table_cache, open_writable=self._host, open_host=self._host,
            keys=Keys(default=KEY.encode()),
        )  # fmt: skip
        self.image = await Image.open(FOLDER / DISK, options)

    def _host(self, path: Path) -> HostFile:
        self.files[path.name] = YieldingFile(self.made.files[path.name], self.rng)
        return self.files[path.name]

    async def write_in(self, low: int, high: int) -> None:
        """Random changes within a range that nobody else touches, each read back."""
        writer = writer_of(self.image)
        for _ in range(STEPS):
            at = self.rng.randrange(low, high)
            length = min(high - at, self.rng.choice([1, SECTOR, 5000, 20000]))
            kind = self.rng.choice(["write", "write", "write", "zero", "unmap", "flush"])
            data = self.rng.randbytes(length) if kind == "write" else bytes(length)
            if kind == "flush":
                await writer.flush()
                continue
            if kind == "write":
                await writer.write(at, data)
            else:
                await writer.zero(at, length, unmap=kind == "unmap")
            self.model[at : at + length] = data
            assert await read(self.image, at, length) == data, (kind, at, length)

    async def run(self) -> None:
        """All writers at once."""
        part = self.image.size // WRITERS
        async with trio.open_nursery() as nursery:
            for number in range(WRITERS):
                nursery.start_soon(self.write_in, number * part, (number + 1) * part)


@given(shapes, st.integers(0, 1 << 30), st.sampled_from([32 << 20, 1]))
@settings(max_examples=60)
async def test_writers_beside_each_other_lose_nothing(shape: Shape, seed: int, table_cache: int) -> None:
    crowd = Crowd(make(shape), seed)
    await crowd.open(table_cache)
    await crowd.run()
    image = crowd.image
    assert await read(image, 0, image.size) == crowd.model
    for snapshot in image.snapshots:
        view = image.snapshot_view(snapshot)
        assert await read(view, 0, view.size) == crowd.made.snapshot
    await image.aclose()
    report = await check(crowd.files[DISK])
    assert (report.errors, report.leaks) == ([], [])
