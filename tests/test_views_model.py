"""Random layouts over random geometries, read at random places and compared with a model of plain bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import BACKING_FORMAT, BIT_COMPRESSION, ImageBuilder, deflate, extension, zstd_frame
from tests.memory import MemoryFolder, read

KINDS = ["unallocated", "normal", "zero_plain", "zero_allocated", "compressed", "subclusters"]
BACKING_NAME = "base.raw"


@dataclass
class Layout:
    """An image of random clusters, and the guest's bytes that it must read as."""

    image: ImageBuilder
    backing: bytes
    random: random.Random
    zstd: bool
    model: bytearray = field(init=False)

    def __post_init__(self) -> None:
        clusters = -(-self.image.size // self.image.cluster_size)
        below = self.backing[: self.image.size]
        self.model = bytearray(below.ljust(clusters * self.image.cluster_size, b"\0"))

    def place(self, number: int, kind: str) -> None:
        """Give one guest cluster its kind, in the image and in the model."""
        size = self.image.cluster_size
        guest = number * size
        content = self.content()
        if kind == "normal":
            self.image.normal(guest, content)
        elif kind == "compressed":
            self.image.compressed(guest, self.compress(content))
        elif kind == "zero_plain":
            self.image.zero_plain(guest)
        elif kind == "zero_allocated":
            self.image.zero_allocated(guest)
        elif kind == "subclusters":
            content = self.place_subclusters(guest, content)
        if kind.startswith("zero"):
            content = bytes(size)
        if kind != "unallocated":
            self.model[guest : guest + size] = content

    def content(self) -> bytes:
        """A cluster that compresses, and that nothing else looks like."""
        word = self.random.randbytes(self.random.choice([1, 7, 64]))
        return (word * self.image.cluster_size)[: self.image.cluster_size]

    def compress(self, content: bytes) -> bytes:
        return zstd_frame(content) if self.zstd else deflate(content, self.random.choice([9, 12, 15]))

    def place_subclusters(self, guest: int, content: bytes) -> bytes:
        """Store a cluster with random subclusters; returns what the guest sees of it."""
        if not self.image.extended_l2:
            self.image.normal(guest, content)
            return content
        size = self.image.cluster_size // 32
        seen = bytearray(self.model[guest : guest + self.image.cluster_size])
        bitmap = 0
        for n in range(32):
            kind = self.random.choice(["allocated", "zero", "neither"])
            part = slice(n * size, (n + 1) * size)
            if kind == "allocated":
                bitmap |= 1 << n
                seen[part] = content[part]
            elif kind == "zero":
                bitmap |= 1 << 32 + n
                seen[part] = bytes(size)
        self.image.subclusters(guest, content, bitmap)
        return bytes(seen)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A random geometry with up to 20 clusters of random kinds, the first and last ones likely."""
    cluster_bits, extended = draw(st.sampled_from([(9, False), (10, False), (12, False), (14, True)]))
    version = 3 if extended else draw(st.sampled_from([2, 3]))
    zstd = version == 3 and draw(st.booleans())
    clusters = draw(st.integers(1, 300 if cluster_bits < 12 else 24))
    image = ImageBuilder(
        (clusters << cluster_bits) - 512 * draw(st.integers(0, (1 << cluster_bits - 9) - 1)),
        cluster_bits=cluster_bits,
        version=version,
        extended_l2=extended,
        fields={"incompatible": BIT_COMPRESSION, "compression_type": 1} if zstd else {},
    )
    backing = b""
    if draw(st.booleans()):
        image.backing_name = BACKING_NAME.encode()
        image.extensions = extension(BACKING_FORMAT, b"raw")
        backing = bytes(range(1, 252)) * (draw(st.integers(0, 2 * image.size)) // 251)
    layout = Layout(image, backing, draw(st.randoms(use_true_random=False)), zstd)
    numbers = st.integers(0, clusters - 1) | st.sampled_from([0, clusters - 1])
    kinds = st.sampled_from(KINDS if version == 3 else [k for k in KINDS if not k.startswith("zero")])
    for number, kind in draw(st.dictionaries(numbers, kinds, max_size=20)).items():
        layout.place(number, kind)
    return layout


@settings(max_examples=200)
@given(layouts(), st.lists(st.tuples(st.integers(0, 1 << 18), st.integers(0, 1 << 16)), max_size=6))
async def test_reads_agree_with_a_model(layout: Layout, places: list[tuple[int, int]]) -> None:
    folder = MemoryFolder({"a": layout.image.build(), BACKING_NAME: layout.backing})
    disk = await folder.image("a")
    size = layout.image.size
    model = bytes(layout.model[:size])
    assert await read(disk, 0, size) == model
    for place, length in places:
        start = place % (size + 1)
        assert await read(disk, start, length) == model[start : start + length].ljust(length, b"\0")
        folder.files["a"].is_cached = True
        within = model[start : start + length]
        assert disk.active.read_now(start, memoryview(bytearray(len(within)))) in (None, within)
