"""Key slots and power cuts: all other keys open the image at each moment, and an empty slot holds nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import pytest

from qcowfs.codecs.luks_keys import unlock
from qcowfs.disk.image import read_header
from qcowfs.disk.key_slots import add_key, remove_key
from qcowfs.disk.keys import Keys
from qcowfs.disk.unlocking import LuksArea, load_area, load_materials
from qcowfs.errors import BadPassphrase, UsageError
from qcowfs.format.luks import REMOVAL_ITERATIONS, slot_position
from qcowfs.testing import MemoryHostFile
from tests.asserting import raises_exactly
from tests.memory import FOLDER, MemoryFolder
from tests.power_cuts import crash_states, torn_states
from tests.shapes import DISK, KEY, SECTOR, Made, Shape, make, qemu

SHAPE = Shape(cluster_size=4096, size=64 << 10, encryption="luks")
FIRST, SECOND, NEW = KEY.encode(), b"second", b"new"
STATES = 40
QEMU_JUDGES = 4
STRADDLING = 6
"""The key slot in whose middle a sector of the header ends."""
add = partial(add_key, iter_time=0)


async def area_of(data: bytes | bytearray) -> tuple[MemoryHostFile, LuksArea]:
    file = MemoryHostFile(bytes(data))
    return file, await load_area(file, await read_header(file, "disk"), "disk")


async def opened_by(data: bytes | bytearray, passphrase: bytes) -> int | None:
    """The number of the key slot that a passphrase opens."""
    file, area = await area_of(data)
    found = unlock(area.header, await load_materials(file, area), passphrase)
    return None if found is None else found[0]


async def slot_of(data: bytes, number: int) -> tuple[bool, bytes]:
    """Whether a key slot is in use, and what lies where its key material does."""
    _, area = await area_of(data)
    slot = area.header.slots[number]
    start = area.offset + slot.key_offset
    return slot.active, data[start : start + area.header.material_size].ljust(area.header.material_size)


class Slots:
    """An image with two keys, whose slots are changed in memory."""

    def __init__(self, made: Made) -> None:
        self.made = made
        self.folder = MemoryFolder(made.files)
        self.file = self.folder.files[DISK]
        self.before = b""

    async def start(self, second: int) -> None:
        """Add the second key; the log starts anew."""
        await add(FOLDER / DISK, Keys(default=FIRST), SECOND, slot=second, open_host=self.folder.open)
        self.file.log.clear()
        self.before = bytes(self.file.data)

    def states(self, name: str) -> Iterator[tuple[str, bytes]]:
        """What a power cut may leave, and how messages call it."""
        log = self.file.log
        crashes = crash_states(self.before, log, STATES, random.Random(name))
        for cut, state in chain(crashes, torn_states(self.before, log)):
            yield f"{name}, cut at {cut} of {len(log)}", state
        assert self.folder.left_open() == []


@pytest.fixture(scope="module")
def made() -> Made:
    return make(SHAPE)


def check_by_qemu(made: Made, state: bytes, folder: Path) -> None:
    """QEMU opens the image by the first key and finds no fault."""
    qemu("qemu-img", "check", *SHAPE.opened(made.save(state, folder)))


@pytest.mark.parametrize("number", [2, STRADDLING])
async def test_a_power_cut_while_a_key_is_added_spares_every_other_key(
    number: int, made: Made, tmp_path: Path
) -> None:
    slots = Slots(made)
    await slots.start(second=1)
    await add(FOLDER / DISK, Keys(default=SECOND), NEW, slot=number, open_host=slots.folder.open)
    ends = set()
    for count, (told, state) in enumerate(slots.states(f"adding to slot {number}")):
        assert await opened_by(state, FIRST) == 0, told
        assert await opened_by(state, SECOND) == 1, told
        in_use, _ = await slot_of(state, number)
        assert await opened_by(state, NEW) == (number if in_use else None), told
        ends.add(in_use)
        if count % (STATES // QEMU_JUDGES) == 0:
            check_by_qemu(made, state, tmp_path)
    assert ends == {False, True}
    assert await opened_by(slots.file.data, NEW) == number


@pytest.mark.parametrize("number", [1, STRADDLING])
async def test_a_power_cut_while_a_key_is_removed_spares_every_other_key(
    number: int, made: Made, tmp_path: Path
) -> None:
    slots = Slots(made)
    await slots.start(second=number)
    _, material = await slot_of(slots.before, number)
    old = {material[at : at + SECTOR] for at in range(0, len(material), SECTOR)}
    await remove_key(FOLDER / DISK, Keys(default=SECOND), open_host=slots.folder.open)
    ends = set()
    for count, (told, state) in enumerate(slots.states(f"removing slot {number}")):
        assert await opened_by(state, FIRST) == 0, told
        in_use, left = await slot_of(state, number)
        if not in_use:
            assert old.isdisjoint(left[at : at + SECTOR] for at in range(0, len(left), SECTOR)), told
        ends.add((in_use, await opened_by(state, SECOND)))
        if count % (STATES // QEMU_JUDGES) == 0:
            check_by_qemu(made, state, tmp_path)
    assert ends == {(True, number), (True, None), (False, None)}


async def test_a_removal_that_was_cut_short_is_told_apart_and_can_be_done_again(made: Made) -> None:
    slots = Slots(made)
    await slots.start(second=1)
    await remove_key(FOLDER / DISK, Keys(default=SECOND), open_host=slots.folder.open)
    state = [state for _, state in slots.states("again") if await is_cut_short(state)][-1]
    folder = MemoryFolder({DISK: state})
    for slot in (None, 0):
        with raises_exactly(
            UsageError, f"{FOLDER / DISK}: key slot 0 has the last key; add another one first"
        ):
            await remove_key(FOLDER / DISK, Keys(default=FIRST), slot, open_host=folder.open)
    assert await remove_key(FOLDER / DISK, Keys(default=FIRST), 1, open_host=folder.open) == 1
    assert await slot_of(bytes(folder.files[DISK].data), 1) != await slot_of(state, 1)
    assert await opened_by(folder.files[DISK].data, FIRST) == 0


async def is_cut_short(state: bytes) -> bool:
    slot = (await area_of(state))[1].header.slots[1]
    return slot.active and slot.iterations == REMOVAL_ITERATIONS and not slot.opens


async def test_a_wrong_passphrase_changes_nothing(made: Made) -> None:
    folder = MemoryFolder(made.files)
    with pytest.raises(BadPassphrase):
        await add(FOLDER / DISK, Keys(default=NEW), NEW, open_host=folder.open)
    with pytest.raises(BadPassphrase):
        await remove_key(FOLDER / DISK, Keys(default=NEW), open_host=folder.open)
    assert folder.files[DISK].log == []
    assert folder.left_open() == []


def test_no_sector_ends_within_what_turns_a_key_slot_on_and_off() -> None:
    starts = [slot_position(number) for number in range(8)]
    assert [start // SECTOR for start in starts] == [(start + 7) // SECTOR for start in starts]
