"""The LUKS version 1 header inside an encrypted image: ciphers, key slots, where key material lies.

Owns the layout and its bounds. Must not know keys or how they are derived. Implements the section "Header"
of the LUKS1 on-disk format as the encryption header pointer extension places it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qcowfs.errors import CorruptImage
from qcowfs.geometry import SECTOR_SIZE

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
HEADER_SIZE = 592
SLOTS = 8
SLOT_ACTIVE, SLOT_INACTIVE = 0x00AC71F3, 0x0000DEAD

_POINTER = struct.Struct(">QQ")
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")


@dataclass(frozen=True)
class KeySlot:
    """One key slot; `key_offset` in bytes from the start of the LUKS header."""

    active: bool
    iterations: int
    salt: bytes
    key_offset: int
    stripes: int


@dataclass(frozen=True)
class LuksHeader:
    """The header's fields; `key_bytes` is the master key's length, `payload_offset` in bytes."""

    cipher: str
    mode: str
    hash: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @classmethod
    def unpack(cls, data: bytes) -> LuksHeader:
        """Parse the first `HEADER_SIZE` bytes; raises `CorruptImage` naming the broken rule."""
        if len(data) < HEADER_SIZE:
            raise CorruptImage(f"LUKS header is cut short: {len(data)} bytes of {HEADER_SIZE}")
        magic, version, cipher, mode, hash_name, payload, key_bytes, *digest, uuid = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise CorruptImage(f"LUKS header: magic {magic.hex()} version {version} is not LUKS version 1")
        slots = tuple(_unpack_slot(data, _HEADER.size + i * _SLOT.size) for i in range(SLOTS))
        return cls(
            _text(cipher, "cipher name"), _text(mode, "cipher mode"), _text(hash_name, "hash"),
            payload * SECTOR_SIZE, key_bytes, digest[0], digest[1], digest[2], _text(uuid, "uuid"), slots,
        )  # fmt: skip


def unpack_pointer(extension: bytes) -> tuple[int, int]:
    """(offset, length) in bytes of the LUKS area, from the encryption header pointer extension."""
    if len(extension) != _POINTER.size:
        raise CorruptImage(f"encryption header pointer has {len(extension)} bytes, not {_POINTER.size}")
    offset, length = _POINTER.unpack(extension)
    return offset, length


def _unpack_slot(data: bytes, start: int) -> KeySlot:
    state, iterations, salt, sector, stripes = _SLOT.unpack_from(data, start)
    if state not in (SLOT_ACTIVE, SLOT_INACTIVE):
        raise CorruptImage(f"LUKS header: key slot state {state:#010x} is unknown")
    return KeySlot(state == SLOT_ACTIVE, iterations, salt, sector * SECTOR_SIZE, stripes)


def _text(field: bytes, name: str) -> str:
    text, end, _ = field.partition(b"\0")
    if not end:
        raise CorruptImage(f"LUKS header: the {name} is not terminated")
    return text.decode("ascii", "backslashreplace")
