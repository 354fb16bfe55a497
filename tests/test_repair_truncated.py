"""Repairs of images whose end is gone: what was lost stays lost, whatever the repair has to append."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs.check import Kind, check
from qcowfs.check.checker import inspect
from qcowfs.check.repair import Wishes, repair
from qcowfs.disk import states
from qcowfs.disk.image import Image
from qcowfs.errors import CorruptImage
from qcowfs.testing import MemoryHostFile
from tests.host_files import place_of_entry, poke_word, word
from tests.memory import open_bytes, read
from tests.power_cuts import crash_states
from tests.shapes import DISK, Shape, make, open_disk, qemu

C = 512
CUTS = 9
REFUSED = re.compile(r"needs \d+ new clusters behind the end of the file, .* --drop-lost --data$")
SHAPES = {
    "v3": Shape(cluster_size=C, size=200 << 10, snapshot=True),
    "v2": Shape(cluster_size=C, size=200 << 10, version=2, snapshot=True),
    "large clusters": Shape(snapshot=True),
    "extended": Shape(extended_l2=True, snapshot=True),
}
Content = dict[tuple[bytes, int], bytes | None]


def drop_table(data: bytearray) -> None:
    poke_word(data, 48, 0x777)


def drop_block(data: bytearray) -> None:
    poke_word(data, word(data, 48), 1 << 50)


def forget_sizes(data: bytearray) -> None:
    """Let the snapshot not tell the disk's size: version 3 then needs a new snapshot table."""
    table = word(data, 64)
    if word(data, 4, 4) == 3 and table + 40 < len(data):
        poke_word(data, table + 36, 0, 4)


def nothing(data: bytearray) -> None:
    """Truncated, and nothing else."""


DAMAGES: list[Callable[[bytearray], None]] = [drop_table, drop_block, forget_sizes, nothing]
EACH = pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name in SHAPES for damage in DAMAGES],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip


async def two_snapshots(shape: Shape) -> bytes:
    """An image with a second snapshot, whose tables lie near the end, and data after that."""
    disk = await open_disk(make(shape).folder())
    assert disk.image.writer
    await disk.image.writer.write(0, b"second" * 200)
    await states.create_snapshot(disk.image, b"second")
    await disk.image.writer.write(0, b"live" * 20_000)
    await disk.image.aclose()
    return bytes(disk.file.data)


async def truncated(name: str, damage: Callable[[bytearray], None], source: random.Random) -> bytes:
    data = bytearray(await two_snapshots(SHAPES[name]))
    del data[source.randrange(len(data) // 3, len(data)) :]
    damage(data)
    return bytes(data)


async def content(data: bytes) -> Content:
    """What each cluster of each disk reads as, None where it cannot be read."""
    readable = bytearray(data)
    if word(readable, 48) % (1 << word(readable, 20, 4)):
        poke_word(readable, 48, 0)  # readers need no refcounts, but refuse what is not aligned
    try:
        image = await open_bytes(bytes(readable))
    except CorruptImage:
        return {}
    found: Content = {}
    for guest in range(0, image.size, image.geometry.cluster_size):
        found[b"", guest] = await _cluster(image, b"", guest)
    for snapshot in image.snapshots:
        for guest in range(0, snapshot.disk_size or image.size, image.geometry.cluster_size):
            found[snapshot.id, guest] = await _cluster(image, snapshot.id, guest)
    image.close()
    return found


async def _cluster(image: Image, which: bytes, guest: int) -> bytes | None:
    try:
        view = next((image.snapshot_view(s) for s in image.snapshots if s.id == which), image.active)
        return await read(view, guest, min(image.geometry.cluster_size, view.size - guest))
    except CorruptImage:
        return None


@EACH
async def test_what_was_lost_stays_lost(name: str, damage: Callable[[bytearray], None]) -> None:
    refused = 0
    for seed in range(CUTS):
        data = await truncated(name, damage, random.Random(f"{name} {damage.__name__} {seed}"))
        file = MemoryHostFile(data)
        found = await inspect(file)
        before = await content(data)
        try:
            await repair(file, found, Wishes(errors=True))
        except CorruptImage as error:
            assert REFUSED.search(str(error))  # noqa: PT017 - the repair may as well succeed
            refused += 1
        after = await content(bytes(file.data))
        changed = {place for place in before if after.get(place) != before[place]}
        assert not changed, f"seed {seed}"
        report = await check(file)
        assert any(data is None for data in before.values()) <= bool(report.totals[Kind.LOST])
    if damage in (drop_table, drop_block):
        assert refused


@EACH
async def test_what_is_given_up_is_given_up_at_every_moment(
    name: str, damage: Callable[[bytearray], None]
) -> None:
    """After a power cut a second repair ends as the first would have: nothing lost reads as tables do."""
    wishes = Wishes(errors=True, drop_lost=True, data=True)
    for seed in range(CUTS // 3):
        source = random.Random(f"{name} {damage.__name__} {seed}")
        data = await truncated(name, damage, source)
        before = await content(data)
        file = MemoryHostFile(data)
        try:
            await repair(file, await inspect(file), wishes)
        except CorruptImage:
            assert not before or None in before.values()
            continue
        report = await check(file)
        if any("live disk, L1 table" in line for line in report.errors):
            continue  # which nothing replaces
        assert not report.corruptions
        expected = await content(bytes(file.data))
        assert not before or assert_given_up(before, expected)
        for cut, state in crash_states(data, file.log, 12, source):
            again = MemoryHostFile(state)
            await repair(again, await inspect(again), wishes)
            assert await content(bytes(again.data)) == expected, f"seed {seed}, cut at {cut}"


def assert_given_up(before: Content, after: Content) -> bool:
    """Fail unless what could be read is as it was, and the rest reads as zeros or is gone."""
    for place, now in after.items():
        was = before.get(place)
        assert now is not None
        assert now == was or (was is None and not any(now)), place
    return True


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
async def test_a_stream_that_the_end_cuts_is_not_taken_for_the_whole(kind: str, tmp_path: Path) -> None:
    raw, image, source = tmp_path / "raw", tmp_path / "image", random.Random(5)
    raw.write_bytes(b"".join(source.randbytes(2048) * 4 for _ in range(4 * 8)))
    qemu(
        "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", f"compression_type={kind}", raw, image
    )  # fmt: skip
    whole = bytearray(image.read_bytes())
    start = word(whole, place_of_entry(whole, 3 << 16)) & (1 << 54) - 1
    for length in (start + 9000, len(whole)):
        data = whole[:length]
        drop_table(data)
        before = await content(bytes(data))
        file = MemoryHostFile(bytes(data))
        if length < len(whole):
            assert before[b"", 3 << 16] is None
            with pytest.raises(CorruptImage, match=REFUSED):
                await repair(file, await inspect(file), Wishes(errors=True))
            assert file.data == data
        else:
            await repair(file, await inspect(file), Wishes(errors=True))
            assert (await check(file)).is_clean
        assert await content(bytes(file.data)) == before


async def test_an_entry_that_points_far_away_does_not_make_the_file_large() -> None:
    data = bytearray(make(SHAPES["v3"]).files[DISK])
    poke_word(data, place_of_entry(data, 0), (1 << 56) - C)
    drop_table(data)
    before = await content(bytes(data))
    file = MemoryHostFile(bytes(data))
    await repair(file, await inspect(file), Wishes(errors=True))
    assert await content(bytes(file.data)) == before
    assert len(file.data) < len(data) + 64 * C
