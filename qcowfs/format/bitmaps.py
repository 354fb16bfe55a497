"""The bitmaps extension and directory: which persistent dirty bitmaps an image carries.

Owns the record layout and its limits. Must not know what the bits say. Implements the sections "Bitmaps
extension" and "Bitmap directory".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from qcowfs.errors import CorruptImage

MAX_BITMAPS = 65535
MAX_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
FLAG_IN_USE, FLAG_AUTO = 1 << 0, 1 << 1
TYPE_DIRTY = 1
TABLE_SIZE_AT, FLAGS_AT = 8, 12
"""Where the number of table entries and the flags lie in a directory entry: 4 bytes each."""
TABLE_ALL_ONES = 1
"""The table entry of a cluster of bits that are all set; 0 means that none is."""
_KNOWN_FLAGS = FLAG_IN_USE | FLAG_AUTO
FLAG_NAMES = {FLAG_IN_USE: "in-use", FLAG_AUTO: "auto"}

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")


@dataclass(frozen=True)
class BitmapDirectory:
    """Where the directory lies: number of bitmaps, size in bytes, host offset."""

    count: int
    size: int
    offset: int

    @classmethod
    def unpack(cls, extension: bytes) -> BitmapDirectory:
        """Parse the extension's data; raises `CorruptImage` for a limit that is broken."""
        if len(extension) != _EXTENSION.size:
            raise CorruptImage(f"bitmaps extension has {len(extension)} bytes, not {_EXTENSION.size}")
        count, _, size, offset = _EXTENSION.unpack(extension)
        if not 0 < count <= MAX_BITMAPS or size > MAX_DIRECTORY_BYTES:
            raise CorruptImage(f"bitmaps extension: {count} bitmaps in {size} bytes break the limits")
        return cls(count, size, offset)

    def pack(self) -> bytes:
        """The extension's data."""
        return _EXTENSION.pack(self.count, 0, self.size, self.offset)


@dataclass(frozen=True)
class BitmapEntry:
    """One bitmap; `granularity` is the number of guest bytes a bit stands for.

    `start` is where its entry lies in the directory. A program may use it if it is `plain`: of the one
    known type, without flags or data that are unknown.
    """

    table_offset: int
    table_size: int
    flags: int
    granularity: int
    name: bytes
    start: int = field(default=0, compare=False)
    plain: bool = field(default=True, compare=False)

    def pack(self) -> bytes:
        """The entry of a directory, for a bitmap that is `plain`."""
        bits = self.granularity.bit_length() - 1
        head = _ENTRY.pack(
            self.table_offset, self.table_size, self.flags, TYPE_DIRTY, bits, len(self.name), 0
        )
        data = head + self.name
        return data + bytes(-len(data) % 8)

    @property
    def flag_names(self) -> list[str]:
        """Names of the flags that are set."""
        return [name for flag, name in FLAG_NAMES.items() if self.flags & flag]


def unpack_directory(data: bytes, count: int) -> list[BitmapEntry]:
    """The `count` entries of a directory; raises `CorruptImage` where they do not fit in `data`."""
    entries = []
    start = 0
    for number in range(1, count + 1):
        if start + _ENTRY.size > len(data):
            raise CorruptImage(f"bitmap directory: entry {number} of {count} is cut short")
        table, size, flags, kind, granularity, name_size, extra_size = _ENTRY.unpack_from(data, start)
        name_at = start + _ENTRY.size + extra_size
        if name_at + name_size > len(data) or granularity > 63:
            raise CorruptImage(f"bitmap directory: entry {number} of {count} is cut short or senseless")
        name = data[name_at : name_at + name_size]
        plain = kind == TYPE_DIRTY and not extra_size and not flags & ~_KNOWN_FLAGS
        entries.append(BitmapEntry(table, size, flags, 1 << granularity, name, start, plain))
        start = (name_at + name_size + 7) & ~7
    return entries
