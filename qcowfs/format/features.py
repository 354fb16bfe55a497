"""Feature bits of the header: their numbers, names and what an unknown one means.

Owns the three bit sets and the feature name table. Must not know where the bits are stored. Implements
the header fields `incompatible_features`, `compatible_features`, `autoclear_features` and the
extension "Feature name table".
"""

from __future__ import annotations

from enum import IntFlag

from qcowfs.errors import UnsupportedFeature
from qcowfs.text import quoted

NAME_RECORD_SIZE = 48
_KIND_INCOMPATIBLE = 0


class Incompatible(IntFlag):
    """Bits that a program must know to open the image at all."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Bits that a program may ignore and must keep."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Bits that a writer which does not know them clears before its first write."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1


KNOWN_INCOMPATIBLE = sum(bit.value for bit in Incompatible)


_NAMES: tuple[tuple[int, IntFlag, bytes], ...] = (
    (0, Incompatible.DIRTY, b"dirty bit"),
    (0, Incompatible.CORRUPT, b"corrupt bit"),
    (0, Incompatible.EXTERNAL_DATA_FILE, b"external data file"),
    (0, Incompatible.COMPRESSION_TYPE, b"compression type"),
    (0, Incompatible.EXTENDED_L2, b"extended L2 entries"),
    (1, Compatible.LAZY_REFCOUNTS, b"lazy refcounts"),
    (2, Autoclear.BITMAPS, b"bitmaps"),
    (2, Autoclear.RAW_EXTERNAL_DATA, b"raw external data"),
)
NAME_TABLE = b"".join(
    bytes([kind, bit.bit_length() - 1]) + name.ljust(NAME_RECORD_SIZE - 2, b"\0")
    for kind, bit, name in _NAMES
)
"""The feature name table that new images get: kind, bit number and name of each known bit."""


def bit_numbers(bits: int) -> list[int]:
    """The positions of the bits that are set, lowest first."""
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def unpack_names(table: bytes) -> dict[tuple[int, int], bytes]:
    """The feature name table as (kind, bit) -> name; an incomplete last record is ignored."""
    whole = len(table) // NAME_RECORD_SIZE * NAME_RECORD_SIZE
    names = {}
    for start in range(0, whole, NAME_RECORD_SIZE):
        record = table[start : start + NAME_RECORD_SIZE]
        names[record[0], record[1]] = record[2:].split(b"\0", 1)[0]
    return names


def describe_unknown(incompatible: int, names: dict[tuple[int, int], bytes]) -> list[str]:
    """One text for each unknown incompatible bit: its number and its name if the image tells it."""
    texts = []
    for number in bit_numbers(incompatible & ~KNOWN_INCOMPATIBLE):
        name = names.get((_KIND_INCOMPATIBLE, number))
        shown = "unnamed" if name is None else quoted(name)
        texts.append(f"incompatible feature bit {number} ({shown})")
    return texts


def refuse_unknown(incompatible: int, names: dict[tuple[int, int], bytes]) -> None:
    """Raise `UnsupportedFeature` that lists every unknown incompatible bit by number and name."""
    unknown = describe_unknown(incompatible, names)
    if unknown:
        raise UnsupportedFeature(f"needs {', '.join(unknown)}, which this version does not support")
