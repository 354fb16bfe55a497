"""Sectors to ciphertext and back, against published vectors and the library's own modes."""

from __future__ import annotations

import random
from hashlib import sha256

import numpy as np
import pytest
from Crypto.Cipher import AES, CAST
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.codecs.encryption import Cbc, IvGenerator, Xts, _aes, make_cipher, make_legacy_cipher
from qcowfs.errors import UnsupportedFeature
from tests.asserting import raises_exactly

SECTOR = 512
SECOND_KEY = "d6e13ffdf2418d8d1911c004cda58da3d619b7e2b9141e58318eea392cf41b08"
IEEE_END = "b738b18deb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568"
AES_KEYS = {16: "aes-128", 24: "aes-192", 32: "aes-256"}


def sectors(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count * SECTOR)


def fixed(iv: str) -> IvGenerator:
    """The same IV for every sector."""
    return lambda _, count: np.frombuffer(bytes.fromhex(iv) * count, "<u8").reshape(count, 2)


@pytest.mark.parametrize(
    ("key", "iv", "plain", "expected"),
    [
        (
            "a1b90cba3f06ac353b2c343876081762090923026e91771815f29dab01932f2f",
            "4faef7117cda59c66e4b92013e768ad5",
            "ebabce95b14d3c8d6fb350390790311c",
            "778ae8b43cb98d5a825081d5be471c63",
        ),
        (
            "1ea661c58d943a0e4801e42f4b0947149e7f9f8e3e68d0c7505210bd311a0e7c" + SECOND_KEY,
            "adf8d92627464ad2f0428e84a9f87564",
            "2eedea52cd8215e1acc647e810bbc3642e87287f8d2e57e36c0a24fbc12a202e",
            "cbaad0e2f6cea3f50b37f934d46a9b130b9d54f07e34f36af793e86f73c6d7db",
        ),
    ],
    ids=["XTSGenAES128", "XTSGenAES256"],
)
def test_xts_gives_what_nist_publishes(key: str, iv: str, plain: str, expected: str) -> None:
    cipher = Xts(_aes, bytes.fromhex(key), fixed(iv))
    start = bytes.fromhex(plain)
    encrypted = bytes(cipher.encrypt(start.ljust(SECTOR, b"\0"), 0))
    assert encrypted[: len(start)].hex() == expected


def test_xts_gives_the_sector_that_ieee_1619_publishes() -> None:
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    encrypted = bytes(make_cipher("aes", "xts-plain64", key).encrypt(bytes(range(256)) * 2, 0))
    assert encrypted[:32].hex() == "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"
    assert encrypted[-32:].hex() == IEEE_END[-64:]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "2b7e151628aed2a6abf7158809cf4f3c",
            "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2",
        ),
        (
            "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b",
            "4f021db243bc633d7178183a9fa071e8b4d9ada9ad7dedf4e5e738763f69145a",
        ),
        (
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d",
        ),
    ],
    ids=["F.2.1", "F.2.3", "F.2.5"],
)
@pytest.mark.parametrize("count", [1, 40], ids=["few", "many"])
def test_cbc_gives_what_nist_sp_800_38a_publishes(key: str, expected: str, count: int) -> None:
    cipher = Cbc(_aes, bytes.fromhex(key), fixed("000102030405060708090a0b0c0d0e0f"))
    start = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    encrypted = bytes(cipher.encrypt(start.ljust(SECTOR, b"\0") * count, 0))
    assert {encrypted[n * SECTOR :][:32].hex() for n in range(count)} == {expected}


@pytest.mark.parametrize("size", AES_KEYS, ids=AES_KEYS.values())
@pytest.mark.parametrize("iv", ["plain", "plain64", "essiv:sha256"])
@given(first=st.sampled_from([0, 5, (1 << 32) - 3, 1 << 40]), count=st.integers(1, 40))
def test_cbc_is_the_librarys_a_sector_each(size: int, iv: str, first: int, count: int) -> None:
    key, data = bytes(range(size)), sectors(count)
    encrypted = bytes(make_cipher("aes", f"cbc-{iv}", key).encrypt(data, first))
    for n in range(count):
        part = slice(n * SECTOR, (n + 1) * SECTOR)
        assert encrypted[part] == AES.new(key, AES.MODE_CBC, iv=iv_of(iv, key, first + n)).encrypt(data[part])


def iv_of(generator: str, key: bytes, sector: int) -> bytes:
    """The IV as cryptsetup's manual describes it."""
    if generator == "plain":
        return (sector % (1 << 32)).to_bytes(16, "little")
    if generator == "plain64":
        return sector.to_bytes(16, "little")
    return AES.new(sha256(key).digest(), AES.MODE_ECB).encrypt(sector.to_bytes(16, "little"))


@pytest.mark.parametrize("size", AES_KEYS, ids=AES_KEYS.values())
@given(first=st.sampled_from([0, 7, (1 << 32) - 3, 1 << 40]), seed=st.integers(0, 99))
def test_xts_is_what_doubling_block_by_block_gives(size: int, first: int, seed: int) -> None:
    key, data = random.Random(seed).randbytes(2 * size), sectors(3, seed)
    encrypted = bytes(make_cipher("aes", "xts-plain64", key).encrypt(data, first))
    assert encrypted == b"".join(slow_xts(key, data[n * 512 : n * 512 + 512], first + n) for n in range(3))


def slow_xts(key: bytes, sector: bytes, number: int) -> bytes:
    """XTS as IEEE 1619 tells it, a block at a time."""
    half = len(key) // 2
    ecb, tweaking = AES.new(key[:half], AES.MODE_ECB), AES.new(key[half:], AES.MODE_ECB)
    tweak = int.from_bytes(tweaking.encrypt(number.to_bytes(16, "little")), "little")
    out = b""
    for start in range(0, SECTOR, 16):
        block = int.from_bytes(sector[start : start + 16], "little") ^ tweak
        coded = int.from_bytes(ecb.encrypt(block.to_bytes(16, "little")), "little") ^ tweak
        out += coded.to_bytes(16, "little")
        tweak = tweak << 1 if tweak < 1 << 127 else (tweak << 1) % (1 << 128) ^ 0x87
    return out


@pytest.mark.parametrize("mode", ["xts-plain64", "cbc-plain64", "cbc-essiv:sha256"])
@pytest.mark.parametrize("count", [1, 12, 13, 256, 257, 2048])
def test_decrypting_gives_back_what_was_encrypted_however_it_is_cut(mode: str, count: int) -> None:
    cipher, data = make_cipher("aes", mode, bytes(range(32))), sectors(count)
    encrypted = bytearray(cipher.encrypt(data, 99))
    for cut in (1, count // 2):
        assert cipher.encrypt(data[cut * SECTOR :], 99 + cut) == encrypted[cut * SECTOR :]
    cipher.decrypt(memoryview(encrypted)[SECTOR:], 100)
    cipher.decrypt(memoryview(encrypted)[:SECTOR], 99)
    assert encrypted == data


def test_cast5_has_blocks_of_half_the_size() -> None:
    key, data = bytes(range(16)), sectors(20)
    cipher = make_cipher("cast5", "cbc-plain64", key)
    encrypted = bytearray(cipher.encrypt(data, 3))
    alone = CAST.new(key, CAST.MODE_CBC, iv=(22).to_bytes(8, "little")).encrypt(data[-SECTOR:])
    assert encrypted[-SECTOR:] == alone
    cipher.decrypt(memoryview(encrypted), 3)
    assert encrypted == data


def test_the_legacy_key_is_the_start_of_the_passphrase() -> None:
    data = sectors(1)
    for passphrase, key in (
        (b"short", b"short".ljust(16, b"\0")),
        (b"0123456789abcdefgh", b"0123456789abcdef"),
    ):
        expected = AES.new(key, AES.MODE_CBC, iv=(9).to_bytes(16, "little")).encrypt(data)
        assert make_legacy_cipher(passphrase).encrypt(data, 9) == expected


@pytest.mark.parametrize(
    ("cipher", "mode", "size", "text"),
    [
        ("serpent", "xts-plain64", 64, "is not supported; aes in xts and cbc is"),
        ("aes", "ecb", 16, "is not supported; aes in xts and cbc is"),
        ("aes", "ctr-plain64", 16, "is not supported; aes in xts and cbc is"),
        ("cast5", "xts-plain64", 32, "is not supported; aes in xts and cbc is"),
        ("aes", "xts-plain64", 16, "has keys of [32, 48, 64] bytes, not 16"),
        ("aes", "cbc-plain64", 33, "has keys of [16, 24, 32] bytes, not 33"),
        ("aes", "cbc-essiv:sha1", 16, "is not supported: its IVs are unknown"),
        ("aes", "cbc-null", 16, "is not supported: its IVs are unknown"),
        ("aes", "cbc", 16, "is not supported: its IVs are unknown"),
        ("cast5", "cbc-essiv:sha256", 16, "is not supported: its IVs are unknown"),
    ],
)
def test_what_is_not_there_is_refused_by_name(cipher: str, mode: str, size: int, text: str) -> None:
    with raises_exactly(UnsupportedFeature, f'encryption by "{cipher}" in mode "{mode}" {text}'):
        make_cipher(cipher, mode, bytes(size))
