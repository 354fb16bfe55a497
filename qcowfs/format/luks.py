"""The LUKS version 1 header inside an encrypted image: ciphers, key slots, where key material lies.

Owns the layout and its bounds. Must not know keys or how they are derived. Implements the section "Header"
of the LUKS1 on-disk format as the encryption header pointer extension places it. A stranger may have written
it, so what it asks for is bounded here.
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
STRIPES = 4000
"""How often key material is spread; every program uses this number, and QEMU takes no other."""
MAX_KEY_BYTES = 64
MAX_ITERATIONS = 1 << 25
"""Some ten seconds for a key slot; more is a way to waste a reader's time."""
MOST_ROUNDS = 8 * 24_000_000
"""Digests that trying a passphrase in all key slots may take: some 40 seconds.

The eight slots of an image may well open in the usual 2 seconds each, made where a processor does 12 million
rounds a second, which is more than today's do.
"""
REMOVAL_ITERATIONS = 1
"""Of a key slot whose removal has begun; nobody makes a key with fewer than 1000."""
DIGEST_SIZE, SALT_SIZE = 20, 32
SWITCH_SIZE = 8
"""The bytes of a key slot that tell whether and how it opens; in no slot does a sector end within them."""
_SLOTS_START = 4096
_SLOT_ALIGNMENT = 4096

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

    @property
    def opens(self) -> bool:
        """Whether some passphrase may open it: it is in use, and nobody has begun to remove it."""
        return self.active and self.iterations != REMOVAL_ITERATIONS

    def pack(self) -> bytes:
        """The 48 bytes of the slot."""
        state = SLOT_ACTIVE if self.active else SLOT_INACTIVE
        sector = self.key_offset // SECTOR_SIZE
        return _SLOT.pack(state, self.iterations, self.salt, sector, self.stripes)


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
        slots = tuple(_unpack_slot(data, slot_position(i)) for i in range(SLOTS))
        return cls(
            _text(cipher, "cipher name"), _text(mode, "cipher mode"), _text(hash_name, "hash"),
            payload * SECTOR_SIZE, key_bytes, digest[0], digest[1], digest[2], _text(uuid, "uuid"), slots,
        )  # fmt: skip

    def pack(self) -> bytes:
        """The first `HEADER_SIZE` bytes of the area."""
        fixed = _HEADER.pack(
            MAGIC, VERSION, self.cipher.encode(), self.mode.encode(), self.hash.encode(),
            self.payload_offset // SECTOR_SIZE, self.key_bytes, self.digest, self.digest_salt,
            self.digest_iterations, self.uuid.encode(),
        )  # fmt: skip
        return fixed + b"".join(slot.pack() for slot in self.slots)

    @property
    def material_size(self) -> int:
        """Bytes of a slot's key material, in whole sectors."""
        return -(-self.key_bytes * STRIPES // SECTOR_SIZE) * SECTOR_SIZE

    def check(self, length: int) -> None:
        """Hold everything that unlocking relies on against its bounds; `length` is the area's in bytes.

        Raises `CorruptImage` naming the field and the rule it breaks.
        """
        if not 0 < self.key_bytes <= MAX_KEY_BYTES:
            raise CorruptImage(f"LUKS header: a master key of {self.key_bytes} bytes is outside 1..64")
        _check_iterations(self.digest_iterations, "the master key's digest")
        for number, slot in enumerate(self.slots):
            if slot.active:
                _check_iterations(slot.iterations, f"key slot {number}")
                if slot.stripes != STRIPES:
                    raise CorruptImage(f"LUKS header: key slot {number} has {slot.stripes} stripes, not 4000")
        self._check_places(length)

    def _check_places(self, length: int) -> None:
        """Key material must lie apart from the header, from other key material, and before the payload."""
        size = self.material_size
        end, owner = HEADER_SIZE, "the header"
        for place, number in sorted((slot.key_offset, n) for n, slot in enumerate(self.slots)):
            if place < end:
                raise CorruptImage(f"LUKS header: the key material of slot {number} overlaps {owner}")
            end, owner = place + size, f"that of slot {number}"
        limit = min(length, self.payload_offset)
        if end > limit:
            raise CorruptImage(f"LUKS header: key material goes beyond the area ({limit} bytes): {owner}")


def slot_position(number: int) -> int:
    """Where a key slot itself lies in the header, in bytes."""
    return _HEADER.size + number * _SLOT.size


def slot_place(number: int, key_bytes: int) -> int:
    """Where the key material of a slot starts in a new area, in bytes; of slot 8, where the area ends."""
    material = -(-key_bytes * STRIPES // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
    return _SLOTS_START + number * material


def pack_pointer(offset: int, length: int) -> bytes:
    """The data of the encryption header pointer extension; both in bytes."""
    return _POINTER.pack(offset, length)


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


def _check_iterations(count: int, owner: str) -> None:
    if not 0 < count <= MAX_ITERATIONS:
        raise CorruptImage(f"LUKS header: {count} iterations for {owner} are outside 1..{MAX_ITERATIONS}")


def _text(field: bytes, name: str) -> str:
    text, end, _ = field.partition(b"\0")
    if not end:
        raise CorruptImage(f"LUKS header: the {name} is not terminated")
    return text.decode("ascii", "backslashreplace")
