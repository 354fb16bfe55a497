"""Header extensions: the typed records between the header and the backing file name.

Owns the record layout and the known type numbers. Must not know what a record's data means. Implements the
section "Header extensions".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qcowfs.errors import CorruptImage

END = 0x00000000
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
ENCRYPTION_HEADER = 0x0537BE77
DATA_FILE_NAME = 0x44415441
MAX_EXTENSIONS = 256
"""Each type may appear once and a handful are defined; more is a way to waste a reader's memory."""

_RECORD = struct.Struct(">II")


@dataclass(frozen=True)
class Extension:
    """One record: its type number and its data without padding."""

    kind: int
    data: bytes


def unpack(area: bytes, start: int) -> tuple[Extension, ...]:
    """The records from `start` to the end record or the end of `area`.

    Raises `CorruptImage` where a record claims more bytes than remain, or there are too many.
    """
    found: list[Extension] = []
    while start + _RECORD.size <= len(area):
        kind, length = _RECORD.unpack_from(area, start)
        if kind == END:
            break
        start += _RECORD.size
        if len(found) == MAX_EXTENSIONS:
            raise CorruptImage(f"header has more than {MAX_EXTENSIONS} extensions")
        if length > len(area) - start:
            raise CorruptImage(
                f"header extension {kind:#010x} claims {length} bytes, {len(area) - start} remain"
            )
        found.append(Extension(kind, area[start : start + length]))
        start += _padded(length)
    return tuple(found)


def pack(extensions: tuple[Extension, ...]) -> bytes:
    """The records, each padded to 8 bytes, followed by the end record."""
    records = [
        _RECORD.pack(e.kind, len(e.data)) + e.data.ljust(_padded(len(e.data)), b"\0") for e in extensions
    ]
    return b"".join(records) + _RECORD.pack(END, 0)


def _padded(length: int) -> int:
    return (length + 7) & ~7
