"""The key slots of a LUKS image: listed, added and removed.

Owns the order of writes: a crash leaves an image that still opens by every passphrase that it should. Must
not know where passphrases come from. Nothing but a slot's first two words, which share a sector, ever turns
it on or off: a new slot's key material and its other fields are on disk before it counts as in use, an old
one's material is overwritten before it counts as empty.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qcowfs.codecs.luks_keys import count_rounds, seal
from qcowfs.data.backing import OpenHost, open_for_reading, open_for_writing
from qcowfs.disk.image import OpenOptions, lock, read_header
from qcowfs.disk.keys import Keys
from qcowfs.disk.unlocking import LuksArea, load_area, unlock_area
from qcowfs.errors import UnsupportedFeature, UsageError
from qcowfs.format.header import CRYPT_LUKS
from qcowfs.format.luks import MOST_ROUNDS, REMOVAL_ITERATIONS, SLOTS, SWITCH_SIZE, KeySlot, slot_position
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import run_in_thread

_OVERWRITES = 3
"""How often key material is overwritten before its slot is given up."""


@dataclass
class _Open:
    """An image whose key slots are changed."""

    label: str
    file: HostFile
    area: LuksArea

    async def store_slot(self, number: int, slot: KeySlot, size: int | None = None) -> None:
        """Write the slot, or its first bytes, alone: the rest of the header stays as its maker wrote it."""
        await self.file.write_from([(self.area.offset + slot_position(number), slot.pack()[:size])])
        await self.file.sync()

    async def store_material(self, slot: KeySlot, material: bytes) -> None:
        await self.file.write_from([(self.area.offset + slot.key_offset, material)])
        await self.file.sync()

    async def unlock(self, keys: Keys) -> tuple[int, bytes]:
        passphrase = keys.get(self.file.name, self.label, "LUKS")
        keys.check_use()
        return await unlock_area(self.file, self.area, passphrase, self.label)


@asynccontextmanager
async def _opened(path: Path, open_host: OpenHost, *, writable: bool) -> AsyncIterator[_Open]:
    """The image at `path` with QEMU's locks taken, so that nobody else changes it."""
    file = open_host(path)
    try:
        lock(file, OpenOptions(writable=writable), top=True)
        label = str(path)
        header = await read_header(file, label)
        if header.crypt_method != CRYPT_LUKS:
            raise UnsupportedFeature(f"{label}: has no key slots, since it is not encrypted by LUKS")
        yield _Open(label, file, await load_area(file, header, label))
    finally:
        file.close()


async def read_slots(path: Path, open_host: OpenHost = open_for_reading) -> tuple[KeySlot, ...]:
    """The key slots of an image. Raises `QcowError`, `OSError` as the host does."""
    async with _opened(path, open_host, writable=False) as image:
        return image.area.header.slots


async def add_key(
    path: Path, keys: Keys, new: bytes, *,
    iter_time: float, slot: int | None = None, open_host: OpenHost = open_for_writing,
) -> int:  # fmt: skip
    """Let one more passphrase open the image, in some `iter_time` seconds; the number of its slot.

    Raises `UsageError` where no slot is free or the new one would cost too much, `BadPassphrase` where
    `keys` do not open the image.
    """
    async with _opened(path, open_host, writable=True) as image:
        _, master_key = await image.unlock(keys)
        header = image.area.header
        number = _free_slot(image, slot)
        sealed, material = await run_in_thread(partial(seal, header, number, new, master_key, iter_time))
        if count_rounds(sealed) > MOST_ROUNDS:
            raise UsageError(
                f"{image.label}: with this key, trying a passphrase in every key slot would take more than "
                f"{MOST_ROUNDS} rounds, and nobody could open the image here; lower --iter-time"
            )
        filled = sealed.slots[number]
        await image.store_material(filled, material)
        await image.store_slot(number, replace(filled, active=False))
        await image.store_slot(number, filled, SWITCH_SIZE)
        return number


def _free_slot(image: _Open, wanted: int | None) -> int:
    slots = image.area.header.slots
    if wanted is not None and slots[_checked(image, wanted)].active:
        raise UsageError(f"{image.label}: key slot {wanted} is in use; remove its key first")
    free = [n for n, slot in enumerate(slots) if not slot.active and wanted in (None, n)]
    if not free:
        raise UsageError(f"{image.label}: all {SLOTS} key slots are in use; remove a key first")
    return free[0]


def _checked(image: _Open, number: int) -> int:
    if not 0 <= number < SLOTS:
        raise UsageError(f"{image.label}: has key slots 0 to {SLOTS - 1}, none of number {number}")
    return number


async def remove_key(
    path: Path, keys: Keys, slot: int | None = None, *, open_host: OpenHost = open_for_writing
) -> int:
    """Take a key away: that of the passphrase that `keys` have, or with its help that of another slot.

    A removal that was cut short leaves its slot in use, and told apart, so that it can be done again: a slot
    that counts as empty holds nothing of its key. Raises `UsageError` for the last key, without which nobody
    could read the image again.
    """
    async with _opened(path, open_host, writable=True) as image:
        opened, _ = await image.unlock(keys)
        number = opened if slot is None else _checked(image, slot)
        header = image.area.header
        old = header.slots[number]
        if not old.active:
            raise UsageError(f"{image.label}: key slot {number} is not in use")
        if not any(s.opens for n, s in enumerate(header.slots) if n != number):
            raise UsageError(f"{image.label}: key slot {number} has the last key; add another one first")
        await image.store_slot(number, replace(old, iterations=REMOVAL_ITERATIONS), SWITCH_SIZE)
        for _ in range(_OVERWRITES):
            await image.store_material(old, secrets.token_bytes(header.material_size))
        empty = replace(old, active=False, iterations=0, salt=bytes(len(old.salt)))
        await image.store_slot(number, empty)
        return number
