"""Tables of equal unsigned integers: big-endian bytes to arrays of host-order integers and back.

Owns byte order and the widths below a byte, which fill each byte from its least significant bit. Must not
know what the integers mean. Implements the layout of L1, L2 and refcount tables and of refcount blocks.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from functools import cache

_TYPE_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


@dataclass(frozen=True)
class Words:
    """Entries of `bits` bits each: 1, 2, 4, 8, 16, 32 or 64."""

    bits: int

    @property
    def maximum(self) -> int:
        """The largest value of an entry."""
        return (1 << self.bits) - 1

    def unpack(self, data: bytes | bytearray) -> array[int]:
        """The entries of a piece of a table."""
        if self.bits < 8:
            return array("B", b"".join(map(_spread(self.bits).__getitem__, data)))
        words = array(_TYPE_CODES[self.bits], data)
        if sys.byteorder == "little":
            words.byteswap()
        return words

    def pack(self, words: array[int]) -> bytes:
        """The bytes of a piece of a table."""
        if self.bits < 8:
            per_byte = 8 // self.bits
            gathered = bytearray(len(words) // per_byte)
            for place in range(per_byte):
                shift = place * self.bits
                for index, value in enumerate(words[place::per_byte]):
                    gathered[index] |= value << shift
            return bytes(gathered)
        if sys.byteorder == "big":
            return words.tobytes()
        swapped = words[:]
        swapped.byteswap()
        return swapped.tobytes()


@cache
def _spread(bits: int) -> list[bytes]:
    """For each byte the entries that it holds, as one byte each."""
    mask = (1 << bits) - 1
    return [bytes(byte >> shift & mask for shift in range(0, 8, bits)) for byte in range(256)]


TABLE_WORDS = Words(64)
