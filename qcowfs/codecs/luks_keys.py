"""The keys of a LUKS area: a passphrase opens a key slot, the slot's key material gives the master key.

Owns key derivation, the anti-forensic splitter and the master key's digest. Must not know where the area
lies. Implements the sections "PBKDF2", "AF splitting" and "Key hierarchy" of the LUKS1 on-disk format.
Headers must be checked before (`check_header`); what is here may take seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qcowfs.codecs.encryption import check_supported, make_cipher
from qcowfs.errors import UnsupportedFeature
from qcowfs.format.luks import (
    DIGEST_SIZE,
    MAX_ITERATIONS,
    SALT_SIZE,
    SLOTS,
    STRIPES,
    KeySlot,
    LuksHeader,
    slot_place,
)
from qcowfs.text import quoted

HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
DEFAULT_CIPHER, DEFAULT_MODE, DEFAULT_HASH, DEFAULT_KEY_BYTES = "aes", "xts-plain64", "sha256", 64
DEFAULT_ITER_TIME = 2.0
"""Seconds that opening a new key slot takes, as with QEMU's tools."""
LEAST_ITERATIONS = 1000
_DIGEST_SHARE = 8
"""The digest of a key that is random anyway needs a fraction of the iterations."""
_TRIAL_ITERATIONS = 20_000


@dataclass(frozen=True, repr=False)
class LuksVolume:
    """A new LUKS area: what to store at its start, its whole length, and the master key (a secret)."""

    area: bytes
    length: int
    header: LuksHeader
    master_key: bytes


def check_header(header: LuksHeader, length: int) -> None:
    """Everything that can be wrong with a header before a passphrase is tried.

    Raises `CorruptImage` for broken bounds and `UnsupportedFeature` for unknown names.
    """
    header.check(length)
    check_supported(header.cipher, header.mode, header.key_bytes)
    if header.hash not in HASHES or header.hash not in hashlib.algorithms_available:
        raise UnsupportedFeature(f"encryption with the hash {quoted(header.hash.encode())} is not supported")


def count_rounds(header: LuksHeader) -> int:
    """How often a digest is taken, at most, until it is known whether a passphrase opens any key slot."""
    width = hashlib.new(header.hash, usedforsecurity=False).digest_size
    digest = header.digest_iterations * -(-DIGEST_SIZE // width)
    blocks = -(-header.key_bytes // width)
    return sum(slot.iterations * blocks + digest for slot in header.slots if slot.active)


def unlock(header: LuksHeader, materials: Mapping[int, bytes], passphrase: bytes) -> tuple[int, bytes] | None:
    """The number of the key slot that the passphrase opens, and the master key; None if there is none.

    `materials` has the key material of every active slot.
    """
    for number, material in materials.items():
        key = _open_slot(header, header.slots[number], material, passphrase)
        if hmac.compare_digest(_digest(header, key), header.digest):
            return number, key
    return None


def _open_slot(header: LuksHeader, slot: KeySlot, material: bytes, passphrase: bytes) -> bytes:
    key = _derive(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
    buffer = bytearray(material)
    make_cipher(header.cipher, header.mode, key).decrypt(memoryview(buffer), 0)
    return merge(bytes(buffer), header.key_bytes, header.hash)


def seal(
    header: LuksHeader, number: int, passphrase: bytes, master_key: bytes, iter_time: float
) -> tuple[LuksHeader, bytes]:
    """The header with a slot that the passphrase opens, and that slot's key material.

    Opening it takes some `iter_time` seconds on this machine.
    """
    count = count_iterations(header.hash, header.key_bytes, iter_time)
    slot = replace(
        header.slots[number], active=True, iterations=count, stripes=STRIPES,
        salt=secrets.token_bytes(SALT_SIZE),
    )  # fmt: skip
    key = _derive(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
    spread = split(master_key, header.hash).ljust(header.material_size, b"\0")
    material = bytes(make_cipher(header.cipher, header.mode, key).encrypt(spread, 0))
    return with_slot(header, number, slot), material


def with_slot(header: LuksHeader, number: int, slot: KeySlot) -> LuksHeader:
    """The header with one slot replaced."""
    return replace(header, slots=(*header.slots[:number], slot, *header.slots[number + 1 :]))


def make_luks_volume(
    passphrase: bytes,
    *,
    cipher: str = DEFAULT_CIPHER,
    mode: str = DEFAULT_MODE,
    key_bytes: int = DEFAULT_KEY_BYTES,
    hash_name: str = DEFAULT_HASH,
    iter_time: float = DEFAULT_ITER_TIME,
) -> LuksVolume:
    """A new area with a random master key, which the passphrase opens in some `iter_time` seconds.

    The image must store `area` at a cluster's start, keep `length` bytes for it, and name both in its
    encryption header pointer. Raises `UnsupportedFeature` for unknown names.
    """
    master_key = secrets.token_bytes(key_bytes)
    slots = tuple(
        KeySlot(False, 0, bytes(SALT_SIZE), slot_place(n, key_bytes), STRIPES) for n in range(SLOTS)
    )
    length = slot_place(SLOTS, key_bytes)
    header = LuksHeader(
        cipher, mode, hash_name, length, key_bytes, bytes(DIGEST_SIZE), secrets.token_bytes(SALT_SIZE),
        LEAST_ITERATIONS, str(uuid.uuid4()), slots,
    )  # fmt: skip
    check_header(header, length)
    count = count_iterations(hash_name, DIGEST_SIZE, iter_time) // _DIGEST_SHARE
    header = replace(header, digest_iterations=max(count, LEAST_ITERATIONS))
    header = replace(header, digest=_digest(header, master_key))
    header, material = seal(header, 0, passphrase, master_key, iter_time)
    area = header.pack().ljust(header.slots[0].key_offset, b"\0") + material
    return LuksVolume(area, length, header, master_key)


def count_iterations(hash_name: str, size: int, seconds: float) -> int:
    """How many iterations this machine does in that time to derive a key of `size` bytes."""
    start = time.perf_counter()
    _derive(hash_name, b"passphrase", bytes(SALT_SIZE), _TRIAL_ITERATIONS, size)
    spent = time.perf_counter() - start
    return min(max(int(_TRIAL_ITERATIONS * seconds / spent), LEAST_ITERATIONS), MAX_ITERATIONS)


def _derive(hash_name: str, passphrase: bytes, salt: bytes, iterations: int, size: int) -> bytes:
    return hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, size)


def _digest(header: LuksHeader, key: bytes) -> bytes:
    return _derive(header.hash, key, header.digest_salt, header.digest_iterations, DIGEST_SIZE)


# -- the anti-forensic splitter: a key spread over stripes, all of which are needed


def split(key: bytes, hash_name: str) -> bytes:
    """Random stripes and a last one that together give the key back."""
    stripes = [secrets.token_bytes(len(key)) for _ in range(STRIPES - 1)]
    return b"".join(stripes) + _xor(_gathered(stripes, len(key), hash_name), key)


def merge(material: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key that was spread over the stripes."""
    stripes = [material[n * key_bytes : (n + 1) * key_bytes] for n in range(STRIPES)]
    return _xor(_gathered(stripes[:-1], key_bytes, hash_name), stripes[-1])


def _gathered(stripes: list[bytes], key_bytes: int, hash_name: str) -> bytes:
    gathered = bytes(key_bytes)
    for stripe in stripes:
        gathered = _diffused(_xor(gathered, stripe), hash_name)
    return gathered


def _diffused(data: bytes, hash_name: str) -> bytes:
    """Each piece of a digest's size replaced by the digest of its number and itself."""
    pieces: list[bytes] = []
    start = 0
    while start < len(data):
        new = hashlib.new(hash_name, len(pieces).to_bytes(4, "big"), usedforsecurity=False)
        piece = data[start : start + new.digest_size]
        new.update(piece)
        pieces.append(new.digest()[: len(piece)])
        start += len(piece)
    return b"".join(pieces)


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")
