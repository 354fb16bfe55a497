"""Key slots: derivation, the splitter, unlocking, and new areas that QEMU can open."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowfs.codecs import luks_keys
from qcowfs.codecs.luks_keys import (
    LuksVolume,
    check_header,
    count_iterations,
    make_luks_volume,
    merge,
    seal,
    split,
    unlock,
    with_slot,
)
from qcowfs.errors import CorruptImage, UnsupportedFeature
from qcowfs.format.luks import MAX_ITERATIONS, LuksHeader
from tests.asserting import raises_exactly

PASSPHRASE = b"correct horse"
QUICK = 0.001


def volume(**fields: object) -> LuksVolume:
    return make_luks_volume(PASSPHRASE, iter_time=QUICK, **fields)  # type: ignore[arg-type]


def materials(made: LuksVolume) -> dict[int, bytes]:
    start = made.header.slots[0].key_offset
    return {0: made.area[start : start + made.header.material_size]}


@pytest.mark.parametrize("hash_name", luks_keys.HASHES)
@given(key=st.binary(min_size=16, max_size=64))
@settings(max_examples=4)
def test_what_was_split_merges_again_and_needs_every_stripe(hash_name: str, key: bytes) -> None:
    material = split(key, hash_name)
    assert len(material) == 4000 * len(key)
    assert merge(material, len(key), hash_name) == key
    spoilt = bytearray(material)
    spoilt[len(key) * 1234] ^= 1
    assert merge(bytes(spoilt), len(key), hash_name) != key


@pytest.mark.parametrize(
    ("mode", "key_bytes"),
    [("xts-plain64", 32), ("xts-plain64", 48), ("xts-plain64", 64), ("cbc-essiv:sha256", 24)],
)
def test_a_new_area_opens_by_its_passphrase_and_no_other(mode: str, key_bytes: int) -> None:
    made = volume(mode=mode, key_bytes=key_bytes)
    header = LuksHeader.unpack(made.area[:592])
    check_header(header, made.length)
    assert unlock(header, materials(made), PASSPHRASE) == (0, made.master_key)
    assert unlock(header, materials(made), PASSPHRASE + b"\n") is None
    assert len(made.area) <= made.length


def test_a_second_slot_opens_by_its_own_passphrase() -> None:
    made = volume()
    header, material = seal(made.header, 5, b"another", made.master_key, QUICK)
    both = {**materials(made), 5: material}
    assert unlock(header, both, b"another") == (5, made.master_key)
    assert unlock(header, both, PASSPHRASE) == (0, made.master_key)
    assert made.master_key not in made.area + material


def test_a_secret_is_not_shown_when_the_volume_is_printed() -> None:
    made = volume()
    assert repr(made.master_key) not in repr(made)


def test_iterations_follow_the_time_within_their_bounds() -> None:
    assert count_iterations("sha256", 32, 0) == 1000
    assert count_iterations("sha256", 32, 1e9) == MAX_ITERATIONS


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"key_bytes": 0}, "LUKS header: a master key of 0 bytes is outside 1..64"),
        ({"key_bytes": 1 << 31}, "LUKS header: a master key of 2147483648 bytes is outside 1..64"),
        (
            {"digest_iterations": 0},
            "LUKS header: 0 iterations for the master key's digest are outside 1..33554432",
        ),
        (
            {"digest_iterations": (1 << 32) - 1},
            "LUKS header: 4294967295 iterations for the master key's digest are outside 1..33554432",
        ),
        (
            {"payload_offset": 4096},
            "LUKS header: key material goes beyond the area (4096 bytes): that of slot 7",
        ),
    ],
)
def test_a_header_that_breaks_a_bound_is_damage(changes: dict[str, int], text: str) -> None:
    made = volume()
    with raises_exactly(CorruptImage, text):
        check_header(replace(made.header, **changes), made.length)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"iterations": 0}, "0 iterations for key slot 0 are outside 1..33554432"),
        ({"iterations": 1 << 25 | 1}, "33554433 iterations for key slot 0 are outside 1..33554432"),
        ({"stripes": 4001}, "key slot 0 has 4001 stripes, not 4000"),
        ({"key_offset": 512}, "the key material of slot 0 overlaps the header"),
        ({"key_offset": 4096 + 258048 - 512}, "the key material of slot 1 overlaps that of slot 0"),
        ({"key_offset": 1 << 40}, "key material goes beyond the area (2068480 bytes): that of slot 0"),
    ],
)
def test_a_slot_that_breaks_a_bound_is_damage(changes: dict[str, int], text: str) -> None:
    made = volume()
    slot = replace(made.header.slots[0], **changes)  # type: ignore[arg-type]
    with raises_exactly(CorruptImage, f"LUKS header: {text}"):
        check_header(with_slot(made.header, 0, slot), made.length)


def test_slots_that_are_not_in_use_need_no_sound_counts() -> None:
    made = volume()
    slot = replace(made.header.slots[3], iterations=0, stripes=0)
    check_header(with_slot(made.header, 3, slot), made.length)
    assert not slot.active


def test_an_unknown_hash_is_refused_by_name() -> None:
    with raises_exactly(UnsupportedFeature, 'encryption with the hash "md5" is not supported'):
        volume(hash_name="md5")
