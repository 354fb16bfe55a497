"""Damaged images, made by overwriting bytes of a sound one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.e2e.tools import (
    KIB,
    MIB,
    create,
    host_offset,
    l1_entry_at,
    l2_entry_at,
    poke,
    poke_word,
    qemu_img,
    qemu_io,
    snapshot_table_at,
    word,
)

REFCOUNT_TABLE_AT, INCOMPATIBLE_AT, AUTOCLEAR_AT = 48, 72, 88
COPIED = 1 << 63


def make_sound(folder: Path) -> Path:
    """An image with a snapshot, a bitmap and compressed clusters."""
    image = create(folder / "sound.qcow2", 4 * MIB)
    qemu_io(image, "write -q -P 1 0 1M", "write -q -c -P 2 1M 64k", "write -q -z 2M 128k")
    qemu_img("snapshot", "-c", "one", image)
    qemu_img("bitmap", "--add", image, "bits")
    qemu_io(image, "write -q -P 3 256k 128k", "write -q -P 4 3M 64k")
    return image


def block_at(image: Path) -> int:
    """Where the first refcount block lies."""
    return word(image, word(image, REFCOUNT_TABLE_AT))


Damage = Callable[[Path], None]
DAMAGES: dict[str, Damage] = {
    "L2 table in the L1 table": lambda i: poke_word(i, l1_entry_at(i), word(i, 40) | COPIED),
    "data on a refcount block": lambda i: poke_word(i, l2_entry_at(i, 0), block_at(i) | COPIED),
    "data on the header": lambda i: poke_word(i, l2_entry_at(i, 0), 1 << 62),
    "a reserved bit in an L2 entry": lambda i: poke_word(
        i, l2_entry_at(i, 0), word(i, l2_entry_at(i, 0)) | 2
    ),
    "a reserved bit in an L1 entry": lambda i: poke_word(i, l1_entry_at(i), word(i, l1_entry_at(i)) | 2),
    "data not aligned": lambda i: poke_word(i, l2_entry_at(i, 0), word(i, l2_entry_at(i, 0)) | 0x200),
    "L2 table not aligned": lambda i: poke_word(i, l1_entry_at(i), word(i, l1_entry_at(i)) | 0x200),
    "data at 32 PiB": lambda i: poke_word(i, l2_entry_at(i, 0), 1 << 55 | COPIED),
    "L2 table past the end": lambda i: poke_word(i, l1_entry_at(i), 1 << 40 | COPIED),
    "compressed length too long": lambda i: poke_word(
        i, l2_entry_at(i, MIB), word(i, l2_entry_at(i, MIB)) | 0xFF << 54
    ),
    "compressed past the end": lambda i: poke_word(i, l2_entry_at(i, MIB), 1 << 62 | 1 << 50),
    "compressed with COPIED": lambda i: poke_word(
        i, l2_entry_at(i, MIB), word(i, l2_entry_at(i, MIB)) | COPIED
    ),
    "refcounts wiped": lambda i: poke(i, block_at(i), bytes(64 * KIB)),
    "refcounts raised": lambda i: poke(i, block_at(i), b"\0\7" * 64),
    "refcount block past the end": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT), 1 << 40),
    "refcount block at 2^62": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT), 1 << 62),
    "refcount block not aligned": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT), block_at(i) | 0x200),
    "no refcount table": lambda i: poke(i, REFCOUNT_TABLE_AT, bytes(12)),
    "refcount table not aligned": lambda i: poke_word(i, REFCOUNT_TABLE_AT, 0x123),
    "two blocks in one place": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT) + 8, block_at(i)),
    "snapshot's L1 table not aligned": lambda i: poke_word(i, snapshot_table_at(i), 0x123),
    "snapshot's L1 table past the end": lambda i: poke_word(i, snapshot_table_at(i), 1 << 40),
    "snapshot without disk size": lambda i: poke(i, snapshot_table_at(i) + 36, bytes(4)),
    "snapshot table cut short": lambda i: poke(i, 60, (9999).to_bytes(4, "big")),
    "snapshot's L1 table on the header": lambda i: poke_word(i, snapshot_table_at(i), 0),
    "snapshot's L2 table past the end": lambda i: poke_word(i, word(i, snapshot_table_at(i)), 1 << 40),
    "snapshot's L2 table not aligned": lambda i: poke_word(i, word(i, snapshot_table_at(i)), 0x50200),
    "snapshot's L2 table in the L1 table": lambda i: poke_word(i, word(i, snapshot_table_at(i)), word(i, 40)),
    "snapshot table not aligned": lambda i: poke_word(i, 64, 0x777),
    "snapshot table past the end": lambda i: poke_word(i, 64, 1 << 40),
    "truncated": lambda i: os.truncate(i, 5 * 64 * KIB),
    "COPIED missing": lambda i: poke_word(i, l2_entry_at(i, 3 * MIB), host_offset(i, 3 * MIB)),
    "COPIED on shared data": lambda i: poke_word(i, l2_entry_at(i, 0), host_offset(i, 0) | COPIED),
    "no bitmaps extension": lambda i: poke(i, i.read_bytes().index(b"\x23\x85\x28\x75"), b"\x01"),
    "bitmaps given up": lambda i: poke_word(i, AUTOCLEAR_AT, 0),
}
