"""Sectors to ciphertext and back, many at a time: AES or CAST5 in the modes XTS and CBC, and their IVs.

Owns the arithmetic of modes and IV generators. Must not know where keys come from or where sectors lie. A
library gives the block cipher. Calling it for each sector would be slow, so a mode is one call in ECB over a
whole run, with vectorised arithmetic around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from Crypto.Cipher import AES, CAST

from qcowfs.errors import UnsupportedFeature
from qcowfs.geometry import SECTOR_SIZE
from qcowfs.text import quoted

Buffer: TypeAlias = bytes | bytearray | memoryview
Words: TypeAlias = npt.NDArray[np.uint64]
"""Little-endian words of 64 bits, a row for each sector."""
IvGenerator = Callable[[int, int], Words]
"""From a first sector number and a count, one IV a row."""
NewCipher = Callable[..., Any]
"""From a key, an object of the library that does ECB; from a key and an IV, one that does CBC."""

LEGACY_KEY_SIZE = 16
_RUN = 256
"""Sectors that are done together: what XTS needs for them stays in the processor's cache."""
_FEW = 12
"""Up to here the library's own CBC, a call a sector, is quicker than ours, 32 calls a run."""
_LE = np.dtype("<u8")
_HALF = 64
_DOUBLINGS = np.arange(SECTOR_SIZE // 16, dtype=_LE)
_POLYNOMIAL = (0, 1, 2, 7)
"""x^128 is x^7 + x^2 + x + 1 in the field of XTS."""


class SectorCipher(Protocol):
    """Encrypts and decrypts whole sectors of 512 bytes; many threads may use one."""

    def encrypt(self, data: Buffer, sector: int) -> memoryview:
        """The ciphertext of sectors that are numbered from `sector` on."""

    def decrypt(self, buffer: memoryview, sector: int) -> None:
        """Turn the ciphertext in the buffer into plain bytes, where it lies."""


class Xts:
    """The mode XTS (IEEE 1619): data unit is a sector, its tweak the IV encrypted by the second key."""

    def __init__(self, new: NewCipher, key: bytes, iv: IvGenerator) -> None:
        """Half of the key is for data, half for tweaks; `new` makes an AES cipher."""
        half = len(key) // 2
        self._data, self._tweak, self._iv = new(key[:half]), new(key[half:]), iv

    def encrypt(self, data: Buffer, sector: int) -> memoryview:
        """The ciphertext of sectors that are numbered from `sector` on."""
        out = np.empty(len(data) // _LE.itemsize, _LE)
        self._apply(_words(data), out, sector, self._data.encrypt)
        return out.data.cast("B")

    def decrypt(self, buffer: memoryview, sector: int) -> None:
        """Turn the ciphertext in the buffer into plain bytes, where it lies."""
        words = _words(buffer)
        self._apply(words, words, sector, self._data.decrypt)

    def _apply(self, source: Words, out: Words, sector: int, ecb: Callable[..., None]) -> None:
        step = _RUN * SECTOR_SIZE // _LE.itemsize
        for start in range(0, len(out), step):
            part = out[start : start + step]
            tweaks = self._tweaks(sector, len(part) * _LE.itemsize // SECTOR_SIZE)
            np.bitwise_xor(source[start : start + step], tweaks, out=part)
            view = part.data.cast("B")
            ecb(view, output=view)
            np.bitwise_xor(part, tweaks, out=part)
            sector += _RUN

    def _tweaks(self, sector: int, count: int) -> Words:
        """What each block of each sector is XORed with: the sector's tweak, doubled once a block."""
        first = np.frombuffer(self._tweak.encrypt(self._iv(sector, count).tobytes()), _LE)
        low, high = first[0::2, None], first[1::2, None]
        tweaks = np.empty((count, len(_DOUBLINGS), 2), _LE)
        over = _HALF - _DOUBLINGS  # a shift by all 64 bits gives 0, as it should
        np.bitwise_or(high << _DOUBLINGS, low >> over, out=tweaks[:, :, 1])
        carried = high >> over
        doubled = low << _DOUBLINGS
        for power in _POLYNOMIAL:
            doubled ^= carried << np.uint64(power)
        tweaks[:, :, 0] = doubled
        return tweaks.reshape(-1)


class Cbc:
    """The mode CBC: chained within a sector."""

    def __init__(self, new: NewCipher, key: bytes, iv: IvGenerator) -> None:
        """`new` makes a cipher of any block size."""
        self._new, self._key, self._iv = new, key, iv
        self._ecb = new(key)
        self._width = self._ecb.block_size // _LE.itemsize

    def encrypt(self, data: Buffer, sector: int) -> memoryview:
        """The ciphertext of sectors that are numbered from `sector` on."""
        count = len(data) // SECTOR_SIZE
        ivs = self._iv(sector, count)
        return self._encrypt_few(data, ivs) if count <= _FEW else self._encrypt_many(_words(data), ivs)

    def _encrypt_few(self, data: Buffer, ivs: Words) -> memoryview:
        view, parts = memoryview(data), []
        for number, iv in enumerate(ivs):
            part = view[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE]
            parts.append(self._new(self._key, iv.tobytes()).encrypt(part))
        return memoryview(b"".join(parts))

    def _encrypt_many(self, data: Words, ivs: Words) -> memoryview:
        """Block after block, each in all sectors at once."""
        source = data.reshape(len(ivs), -1, self._width)
        out = np.empty_like(source)
        previous = ivs
        for number in range(source.shape[1]):
            block = (source[:, number] ^ previous).tobytes()
            previous = np.frombuffer(self._ecb.encrypt(block), _LE).reshape(-1, self._width)
            out[:, number] = previous
        return out.reshape(-1).data.cast("B")

    def decrypt(self, buffer: memoryview, sector: int) -> None:
        """Turn the ciphertext in the buffer into plain bytes, where it lies."""
        for start in range(0, len(buffer), _RUN * SECTOR_SIZE):
            part = buffer[start : start + _RUN * SECTOR_SIZE]
            self._decrypt_run(_words(part), self._iv(sector, len(part) // SECTOR_SIZE))
            sector += _RUN

    def _decrypt_run(self, words: Words, ivs: Words) -> None:
        chained = np.empty_like(words)
        chained[self._width :] = words[: -self._width]
        chained.reshape(len(ivs), -1)[:, : self._width] = ivs
        view = words.data.cast("B")
        self._ecb.decrypt(view, output=view)
        np.bitwise_xor(words, chained, out=words)


def _words(data: Buffer) -> Words:
    return np.frombuffer(data, _LE)


# -- the ciphers and generators by their names in LUKS headers


def _aes(key: bytes, iv: bytes | None = None) -> Any:  # noqa: ANN401 - one type for each mode
    return AES.new(key, AES.MODE_ECB) if iv is None else AES.new(key, AES.MODE_CBC, iv=iv)


def _cast5(key: bytes, iv: bytes | None = None) -> Any:  # noqa: ANN401 - one type for each mode
    return CAST.new(key, CAST.MODE_ECB) if iv is None else CAST.new(key, CAST.MODE_CBC, iv=iv)


_CIPHERS: dict[str, tuple[NewCipher, int, tuple[int, ...]]] = {
    "aes": (_aes, 16, (16, 24, 32)),
    "cast5": (_cast5, 8, (16,)),
}
"""Name: how it is made, bytes of a block, bytes that a key may have."""
_MODES = ("xts", "cbc")


def make_legacy_cipher(passphrase: bytes) -> SectorCipher:
    """The cipher of encryption method 1: AES-128 in CBC with plain64 and the passphrase itself as key."""
    return Cbc(_aes, passphrase[:LEGACY_KEY_SIZE].ljust(LEGACY_KEY_SIZE, b"\0"), _plain(16, _HALF))


def make_cipher(cipher: str, mode: str, key: bytes) -> SectorCipher:
    """The cipher that a LUKS header names, for instance "aes" and "xts-plain64".

    Raises `UnsupportedFeature` that names what is missing, as `check_supported` does.
    """
    check_supported(cipher, mode, len(key))
    chaining, _, iv = mode.partition("-")
    new, block, _ = _CIPHERS[cipher]
    generator = _make_generator(iv, block, key)
    return Xts(new, key, generator) if chaining == "xts" else Cbc(new, key, generator)


def check_supported(cipher: str, mode: str, key_size: int) -> None:
    """Raise `UnsupportedFeature` unless there is such a cipher with keys of so many bytes."""
    chaining, _, iv = mode.partition("-")
    shown = f"{quoted(cipher.encode())} in mode {quoted(mode.encode())}"
    if cipher not in _CIPHERS or chaining not in _MODES or (cipher, chaining) == ("cast5", "xts"):
        raise UnsupportedFeature(f"encryption by {shown} is not supported; aes in xts and cbc is")
    keys = 2 if chaining == "xts" else 1
    sizes = [keys * size for size in _CIPHERS[cipher][2]]
    if key_size not in sizes:
        raise UnsupportedFeature(f"encryption by {shown} has keys of {sizes} bytes, not {key_size}")
    generator, _, name = iv.partition(":")
    essiv = generator == "essiv" and cipher == "aes" and name in _ESSIV_HASHES
    if iv not in ("plain", "plain64") and not essiv:
        raise UnsupportedFeature(f"encryption by {shown} is not supported: its IVs are unknown")


_ESSIV_HASHES = ("md5", "sha256")
"""Those whose digest is an AES key."""


def _make_generator(iv: str, block: int, key: bytes) -> IvGenerator:
    generator, _, name = iv.partition(":")
    if generator == "essiv":
        return _essiv(hashlib.new(name, key, usedforsecurity=False).digest())
    return _plain(block, 32 if generator == "plain" else _HALF)


def _plain(block: int, bits: int) -> IvGenerator:
    """The number of the sector, of which the lowest bits count, little-endian."""
    mask = (1 << bits) - 1

    def generate(sector: int, count: int) -> Words:
        ivs = np.zeros((count, block // _LE.itemsize), _LE)
        ivs[:, 0] = np.arange(sector, sector + count, dtype=_LE) & _LE.type(mask)
        return ivs

    return generate


def _essiv(key: bytes) -> IvGenerator:
    """The number of the sector, encrypted by a hash of the key."""
    cipher, plain = _aes(key), _plain(16, _HALF)

    def generate(sector: int, count: int) -> Words:
        return np.frombuffer(cipher.encrypt(plain(sector, count).tobytes()), _LE).reshape(count, 2)

    return generate
