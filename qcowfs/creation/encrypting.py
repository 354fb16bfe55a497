"""How a new image shall be encrypted: qemu-img's options for LUKS, checked, and the area that follows.

Owns the names, defaults and rules of these options. Must not know where the area lies or where passphrases
come from. Implements the choices that the section "Header" of the LUKS1 on-disk format leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcowfs.errors import UsageError
from qcowfs.format.luks import SLOTS, slot_place

if TYPE_CHECKING:
    from qcowfs.codecs.luks_keys import LuksVolume

PREFIX = "encrypt."
"""What qemu-img puts before each of these options."""
_CIPHERS = {
    "aes-128": ("aes", 16),
    "aes-192": ("aes", 24),
    "aes-256": ("aes", 32),
    "cast5-128": ("cast5", 16),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "format": ("luks",),
    "cipher-alg": tuple(_CIPHERS),
    "cipher-mode": ("xts", "cbc"),
    "ivgen-alg": ("plain", "plain64", "essiv"),
    "ivgen-hash-alg": ("md5", "sha256"),
    "hash-alg": ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"),
}
_ITER_TIME = "iter-time"
OPTIONS = tuple(PREFIX + name for name in (*_CHOICES, _ITER_TIME))
"""qemu-img's name of each option."""
DEFAULT_ITER_TIME = 2000


@dataclass(frozen=True)
class Encryption:
    """The form of a new LUKS area; `iter_time` is in milliseconds, the names are qemu-img's."""

    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str = "sha256"
    hash_alg: str = "sha256"
    iter_time: int = DEFAULT_ITER_TIME

    def __post_init__(self) -> None:
        """Check what goes together; raises `UsageError` that names the option."""
        if self.cipher_alg == "cast5-128" and (self.cipher_mode, self.ivgen_alg == "essiv") != ("cbc", False):
            raise UsageError(
                f"{PREFIX}cipher-alg=cast5-128: needs {PREFIX}cipher-mode=cbc, and {PREFIX}ivgen-alg=plain64 "
                "or plain"
            )
        if (self.cipher_alg, self.cipher_mode) == ("aes-192", "cbc"):
            raise UsageError(
                f"{PREFIX}cipher-alg=aes-192: with {PREFIX}cipher-mode=cbc key material ends within a sector "
                "and QEMU's tools abort; take xts or another key size"
            )
        if self.iter_time < 1:
            raise UsageError(f"{PREFIX}{_ITER_TIME}={self.iter_time}: must be 1 or more milliseconds")

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> Encryption:
        """What options such as `{"encrypt.cipher-alg": "aes-128"}` ask for; raises `UsageError`."""
        values: dict[str, Any] = {}
        for name, text in words.items():
            values[name.removeprefix(PREFIX).replace("-", "_")] = _value(name, text)
        if values.pop("format", None) is None:
            raise UsageError(f"{next(iter(words))}: needs {PREFIX}format=luks")
        return cls(**values)

    @property
    def key_bytes(self) -> int:
        """Length of the master key; XTS has two keys in it."""
        return _CIPHERS[self.cipher_alg][1] * (2 if self.cipher_mode == "xts" else 1)

    @property
    def length(self) -> int:
        """Bytes of the whole area."""
        return slot_place(SLOTS, self.key_bytes)

    @property
    def mode(self) -> str:
        """Mode and IV generator as a LUKS header names them."""
        generator = f"essiv:{self.ivgen_hash_alg}" if self.ivgen_alg == "essiv" else self.ivgen_alg
        return f"{self.cipher_mode}-{generator}"

    def make_volume(self, passphrase: bytes) -> LuksVolume:
        """A new area that the passphrase opens. Takes some `iter_time`; for worker threads.

        Raises `UnsupportedFeature` where this host's library lacks the hash.
        """
        from qcowfs.codecs.luks_keys import make_luks_volume

        return make_luks_volume(
            passphrase,
            cipher=_CIPHERS[self.cipher_alg][0],
            mode=self.mode,
            key_bytes=self.key_bytes,
            hash_name=self.hash_alg,
            iter_time=self.iter_time / 1000,
        )


def _value(name: str, text: str) -> str | int:
    """The value of one option; raises `UsageError`."""
    own = name.removeprefix(PREFIX)
    if own == _ITER_TIME:
        if not text.isascii() or not text.isdigit():
            raise UsageError(f"{name}={text}: must be a number of milliseconds")
        return int(text)
    if own == "key-secret":
        raise UsageError(f"{name}: there are no secret objects here; give the passphrase by --key-file FILE")
    if own not in _CHOICES:
        raise UsageError(f"{name!r} is no creation option; of encryption there are: {', '.join(OPTIONS)}")
    if text not in _CHOICES[own]:
        raise UsageError(f"{name}={text}: must be one of {', '.join(_CHOICES[own])}")
    return text
