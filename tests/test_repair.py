"""Repairs cut short by a power cut: the image is no worse, a second repair mends it, a backup undoes it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from qcowfs.check import Kind, check
from qcowfs.check.backup import BackedUpFile, restore
from qcowfs.check.checker import inspect
from qcowfs.check.repair import Wishes, repair
from qcowfs.disk import states
from qcowfs.errors import CorruptImage, UsageError
from qcowfs.host.hostfile import HostFile
from qcowfs.testing import MemoryHostFile, Write
from tests.asserting import raises_exactly
from tests.host_files import place_of_entry, poke_word, word
from tests.memory import open_bytes, read
from tests.power_cuts import crash_states
from tests.shapes import DISK, Shape, make, open_disk

C = 512
COPIED = 1 << 63
ALL = Wishes(errors=True)
STATES = 60
SHAPES = {
    "v3": Shape(cluster_size=C, size=200 << 10, snapshot=True),
    "v2": Shape(cluster_size=C, size=200 << 10, version=2, snapshot=True),
    "narrow": Shape(cluster_size=C, size=200 << 10, refcount_bits=4, bulk=40 * C, filled=False),
    "extended": Shape(extended_l2=True, snapshot=True),
}


def wipe_counts(data: bytearray) -> None:
    block, size = word(data, word(data, 48)), 1 << word(data, 20, 4)
    data[block : block + size] = bytes(size)


def raise_counts(data: bytearray) -> None:
    block = word(data, word(data, 48))
    data[block + 8 : block + 40] = b"\1" * 32


def drop_table(data: bytearray) -> None:
    poke_word(data, 48, 0x777)


def drop_block(data: bytearray) -> None:
    poke_word(data, word(data, 48), 1 << 50)


def flip_flags(data: bytearray) -> None:
    place = place_of_entry(data, 0)
    for at in [*range(place, place + 64, 16), word(data, 40)]:
        poke_word(data, at, word(data, at) ^ COPIED)


def forget_sizes(data: bytearray) -> None:
    if word(data, 4, 4) == 3 and word(data, 60, 4):
        poke_word(data, word(data, 64) + 36, 0, 4)


def lose_data(data: bytearray) -> None:
    poke_word(data, place_of_entry(data, 0), COPIED | 1 << 40)
    wipe_counts(data)


DAMAGES: list[Callable[[bytearray], None]] = [
    wipe_counts, raise_counts, drop_table, drop_block, flip_flags, forget_sizes, lose_data,
]  # fmt: skip
EACH = pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name in SHAPES for damage in DAMAGES],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip


def damaged(name: str, damage: Callable[[bytearray], None]) -> bytes:
    data = bytearray(make(SHAPES[name]).files[DISK])
    damage(data)
    return bytes(data)


async def content(data: bytes) -> list[bytes | None]:
    """What each cluster of the live disk reads as, None where it cannot be read."""
    header = bytearray(data)
    drop = word(header, 48) % (1 << word(header, 20, 4)) != 0
    if drop:
        poke_word(header, 48, 0)  # readers need no refcounts, but refuse what is not aligned
    image = await open_bytes(bytes(header))
    found: list[bytes | None] = []
    for guest in range(0, image.size, image.geometry.cluster_size):
        try:
            found.append(
                await read(image.active, guest, min(image.geometry.cluster_size, image.size - guest))
            )
        except CorruptImage:
            found.append(None)
    image.close()
    return found


async def mend(file: HostFile, wishes: Wishes = ALL) -> None:
    await repair(file, await inspect(file), wishes)


@EACH
async def test_a_power_cut_in_a_repair_leaves_what_a_second_repair_mends(
    name: str, damage: Callable[[bytearray], None]
) -> None:
    data = damaged(name, damage)
    before = await content(data)
    file = MemoryHostFile(data)
    await mend(file)
    for cut, state in crash_states(data, file.log, STATES, random.Random(f"{name} {damage}")):
        assert await content(state) == before, f"cut at {cut} of {len(file.log)}"
        again = MemoryHostFile(state)
        await mend(again)
        report = await check(again)
        assert not report.totals[Kind.ERROR], f"cut at {cut} of {len(file.log)}"
        assert damage is lose_data or report.is_clean, f"cut at {cut} of {len(file.log)}"
        assert await content(bytes(again.data)) == before


@EACH
async def test_a_backup_undoes_a_repair_that_was_cut_anywhere(
    name: str, damage: Callable[[bytearray], None]
) -> None:
    data = damaged(name, damage)
    file, backup = MemoryHostFile(data), MemoryHostFile(b"")
    await mend(BackedUpFile(file, backup), Wishes(errors=True, drop_lost=True))
    assert bool(file.log) == bool(backup.log) == (file.data != data)
    if not backup.log:
        return
    for cut, state in crash_states(data, file.log, STATES // 4, random.Random(f"{name} {damage}")):
        torn = MemoryHostFile(state)
        size = await restore(torn, backup)
        assert (size, bytes(torn.data[:size])) == (len(data), data), f"cut at {cut} of {len(file.log)}"
        assert not any(torn.data[size:])


async def test_a_backup_that_was_cut_short_undoes_what_had_begun() -> None:
    data = damaged("v3", drop_table)
    file, backup = MemoryHostFile(data), MemoryHostFile(b"")
    file.fail_writes(48, 12)
    with pytest.raises(OSError, match="Input/output error"):
        await mend(BackedUpFile(file, backup))
    cut = MemoryHostFile(bytes(backup.data[:-700]))
    file.heal()
    await restore(file, cut)
    assert file.data[: len(data)] == data


async def test_a_backup_is_on_disk_before_the_image_is_touched() -> None:
    file, backup = MemoryHostFile(damaged("v3", wipe_counts)), MemoryHostFile(b"")
    backup.fail_next_syncs = 1
    with pytest.raises(OSError, match="Input/output error"):
        await mend(BackedUpFile(file, backup))
    assert file.log == []


async def test_counts_that_the_width_cannot_hold_stay_an_error() -> None:
    data = bytearray(make(Shape(cluster_size=C, size=200 << 10, refcount_bits=1, bulk=40 * C)).files[DISK])
    poke_word(data, place_of_entry(data, 0), word(data, place_of_entry(data, C)) & ~COPIED)
    poke_word(data, place_of_entry(data, C), word(data, place_of_entry(data, 0)))
    file = MemoryHostFile(bytes(data))
    await mend(file)
    report = await check(file)
    assert [line for line in report.errors if "more than 1 bits hold" in line]
    assert word(file.data, 72) == 0


async def test_a_table_that_overlaps_the_header_is_never_written() -> None:
    data = bytearray(make(SHAPES["v3"]).files[DISK])
    poke_word(data, word(data, 64), 0)  # the snapshot's L1 table
    file = MemoryHostFile(bytes(data))
    await mend(file)
    assert {entry.offset for entry in file.log if isinstance(entry, Write)} >= {72}
    assert file.data[:48] == data[:48]
    assert (await check(file)).hidden
    await mend(file, Wishes(errors=True, drop_lost=True))
    assert file.data[:40] == data[:40]
    assert (await check(file)).is_clean
    assert word(file.data, 60, 4) == 0


def break_snapshot(data: bytearray) -> None:
    poke_word(data, word(data, 64), 1 << 40)


def break_table(data: bytearray) -> None:
    poke_word(data, 60, 7, 4)


def break_second_snapshot(data: bytearray) -> None:
    table = word(data, 64)
    length = 40 + word(data, table + 36, 4) + word(data, table + 12, 2) + word(data, table + 14, 2)
    poke_word(data, table + -(-length // 8) * 8, 0x777)


@pytest.mark.parametrize("name", ["v3", "v2"])
@pytest.mark.parametrize("damage", [break_snapshot, break_table, break_second_snapshot])
async def test_a_power_cut_while_snapshots_are_given_up_harms_nothing_else(
    name: str, damage: Callable[[bytearray], None]
) -> None:
    data = bytearray(await with_two_snapshots(SHAPES[name]))
    before = await content(bytes(data))
    damage(data)
    wishes = Wishes(errors=True, drop_lost=True)
    file = MemoryHostFile(bytes(data))
    await mend(file, wishes)
    assert (await check(file)).is_clean
    assert word(file.data, 60, 4) == (2 if damage is break_table else 1)
    for cut, state in crash_states(bytes(data), file.log, STATES, random.Random(f"{name} {damage}")):
        again = MemoryHostFile(state)
        report = await check(again)
        assert not [e for e in report.errors if ", references " in e or "has the COPIED" in e], (
            f"cut at {cut} of {len(file.log)}"
        )
        await mend(again, wishes)
        assert (await check(again)).is_clean, f"cut at {cut} of {len(file.log)}"
        assert await content(bytes(again.data)) == before, f"cut at {cut} of {len(file.log)}"


async def with_two_snapshots(shape: Shape) -> bytes:
    """An image whose second snapshot differs from the first and from the live disk."""
    disk = await open_disk(make(shape).folder())
    assert disk.image.writer
    await disk.image.writer.write(0, b"second" * 200)
    await states.create_snapshot(disk.image, b"second")
    await disk.image.writer.write(0, b"live" * 200)
    await disk.image.aclose()
    return bytes(disk.file.data)


async def test_random_damage_never_changes_what_can_be_read() -> None:
    for seed in range(60):
        source = random.Random(seed)
        name = source.choice(sorted(SHAPES))
        data = bytearray(make(SHAPES[name]).files[DISK])
        tables = [
            word(data, 40),
            word(data, word(data, 40)) & ~COPIED,
            word(data, 48),
            word(data, word(data, 48)),
        ]
        for _ in range(source.randint(1, 4)):
            at = source.choice(tables) + source.randrange(32) * 8
            poke_word(data, at, word(data, at) ^ 1 << source.randrange(64))
        before = await content(bytes(data))
        file = MemoryHostFile(bytes(data))
        found = await inspect(file)
        if any("overlap" in finding.rule for finding in found.subject.report.findings):
            continue  # what reads there are tables, which change
        await repair(file, found, ALL)
        after = await content(bytes(file.data))
        assert [b for b, a in zip(before, after, strict=True) if b is not None and a != b] == [], (
            f"seed {seed}"
        )
        report = await check(file)
        assert report.is_clean or found.subject.report.totals[Kind.LOST], f"seed {seed}"


async def test_a_sound_image_is_not_written_to() -> None:
    file = MemoryHostFile(make(SHAPES["v3"]).files[DISK])
    await mend(file)
    assert file.log == []


async def test_a_dirty_image_that_is_sound_is_only_marked_clean() -> None:
    data = bytearray(make(SHAPES["v3"]).files[DISK])
    sound = bytes(data)
    poke_word(data, 72, 3)
    file = MemoryHostFile(bytes(data))
    await mend(file)
    assert bytes(file.data) == sound


async def test_what_is_no_backup_is_refused() -> None:
    file = MemoryHostFile(b"x" * 512)
    for data in (b"", b"qcowfs backup 1\n", b"qcowfs backup 1\n\0\0\0\4null", b"\0" * 4096):
        with raises_exactly(UsageError, "odd: is no backup that qcowfs check has made"):
            await restore(file, MemoryHostFile(data, "odd"))
    assert file.log == []
