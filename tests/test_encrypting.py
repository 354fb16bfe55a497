"""The options of a new image's encryption: each choice can be opened again, and its area has its length."""

from __future__ import annotations

from itertools import product

import pytest

from qcowfs.codecs.encryption import check_supported
from qcowfs.creation.encrypting import OPTIONS, Encryption
from qcowfs.errors import UsageError

CIPHERS = ("aes-128", "aes-192", "aes-256", "cast5-128")
MODES = ("xts", "cbc")
GENERATORS = ("plain", "plain64", "essiv")


@pytest.mark.parametrize("choice", [*product(CIPHERS, MODES, GENERATORS, ("md5", "sha256"))], ids="-".join)
def test_each_choice_is_supported_or_refused(choice: tuple[str, ...]) -> None:
    names = ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg")
    words = {f"encrypt.{name}": text for name, text in zip(names, choice, strict=True)}
    if choice[0] == "cast5-128" and (choice[1] == "xts" or choice[2] == "essiv"):
        with pytest.raises(UsageError, match=r"cast5-128: needs encrypt\.cipher-mode=cbc"):
            Encryption.from_words({"encrypt.format": "luks", **words})
        return
    if choice[:2] == ("aes-192", "cbc"):
        with pytest.raises(UsageError, match=r"and QEMU's tools abort; take xts or another key size$"):
            Encryption.from_words({"encrypt.format": "luks", **words})
        return
    made = Encryption.from_words({"encrypt.format": "luks", **words})
    check_supported(choice[0].partition("-")[0], made.mode, made.key_bytes)


@pytest.mark.parametrize("words", [{}, {"cipher-alg": "aes-128"}, {"cipher-mode": "cbc", "hash-alg": "sha1"}])
def test_the_area_is_as_long_as_was_said_before_it_was_made(words: dict[str, str]) -> None:
    named = {f"encrypt.{name}": text for name, text in words.items()}
    form = Encryption.from_words({"encrypt.format": "luks", "encrypt.iter-time": "1", **named})
    volume = form.make_volume(b"passphrase")
    assert volume.length == form.length >= len(volume.area)
    assert (volume.header.hash, volume.header.mode) == (form.hash_alg, form.mode)


def test_the_defaults_are_qemus() -> None:
    form = Encryption.from_words({"encrypt.format": "luks"})
    assert (form.cipher_alg, form.mode, form.hash_alg) == ("aes-256", "xts-plain64", "sha256")
    assert form.iter_time == 2000


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_value_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}=-1: must be "):
        Encryption.from_words({"encrypt.format": "luks", name: "-1"})
