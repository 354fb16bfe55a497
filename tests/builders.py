"""Tiny qcow2 images put together byte by byte.

Knows the format's layout from its description and nothing of the package under test.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass, field

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"QFI\xfb"
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1

BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
DATA_FILE_NAME = 0x44415441

BIT_DIRTY, BIT_CORRUPT, BIT_DATA_FILE, BIT_COMPRESSION, BIT_EXTENDED_L2 = (1 << n for n in range(5))

V2_FIELDS = {
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
}
V3_FIELDS = {
    "incompatible": (72, 8),
    "compatible": (80, 8),
    "autoclear": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}
FIELDS = V2_FIELDS | V3_FIELDS
"""Every header field: its offset and size in bytes."""

_SOUND = {
    "version": 3,
    "cluster_bits": 16,
    "size": 1 << 20,
    "l1_size": 1,
    "l1_table_offset": 3 << 16,
    "refcount_table_offset": 1 << 16,
    "refcount_table_clusters": 1,
}
_SOUND_V3 = {"refcount_order": 4, "header_length": 112}


def header(**values: int) -> bytes:
    """The fixed part of a header: that of a sound 1 MiB image, but for the fields that are given."""
    version = values.get("version", 3)
    fields = _SOUND | (_SOUND_V3 if version >= 3 else {}) | values
    image = bytearray(72 if version < 3 else fields["header_length"])
    image[:4] = MAGIC
    for name, value in fields.items():
        poke(image, name, value)
    return bytes(image)


def poke(image: bytearray, name: str, value: int) -> None:
    """Overwrite one header field, cut to the field's size."""
    offset, size = FIELDS[name]
    image[offset : offset + size] = (value % (1 << 8 * size)).to_bytes(size, "big")


def extension(kind: int, data: bytes) -> bytes:
    """A header extension, padded to 8 bytes."""
    return struct.pack(">II", kind, len(data)) + padded(data)


def padded(data: bytes) -> bytes:
    """The data with zeros up to a multiple of 8 bytes."""
    return data + bytes(-len(data) % 8)


def feature_name(kind: int, bit: int, name: bytes) -> bytes:
    """One record of the feature name table."""
    return bytes([kind, bit]) + name.ljust(46, b"\0")


def snapshot_record(
    id_: bytes, name: bytes, *, l1_offset: int = 0, l1_size: int = 0, extra: bytes = b"", **times: int
) -> bytes:
    """One record of the snapshot table; `times` may hold sec, nsec, clock and vm_state."""
    numbers = [times.get(key, 0) for key in ("sec", "nsec", "clock", "vm_state")]
    fixed = struct.pack(">QIHHIIQII", l1_offset, l1_size, len(id_), len(name), *numbers, len(extra))
    return padded(fixed + extra + id_ + name)


def deflate(content: bytes, window_bits: int = 12) -> bytes:
    """A raw deflate stream; QEMU writes a window of 12 bits, the format allows 15."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -window_bits)
    return compressor.compress(content) + compressor.flush()


def zstd_frame(content: bytes) -> bytes:
    """One zstd frame."""
    return zstd.compress(content)


@dataclass(frozen=True)
class Tree:
    """Where one L1 table lies, and how many entries it has."""

    offset: int
    entries: int


@dataclass
class ImageBuilder:
    """An image under construction: clusters are appended in the order of the calls.

    `fields` overrides header fields at the end. Refcounts are left out: readers do not need them.
    """

    size: int
    cluster_bits: int = 9
    version: int = 3
    extended_l2: bool = False
    l1_size: int | None = None
    fields: dict[str, int] = field(default_factory=dict)
    extensions: bytes = b""
    backing_name: bytes | None = None
    snapshots: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cluster_size = 1 << self.cluster_bits
        self.entry_size = 16 if self.extended_l2 else 8
        self.l2_coverage = self.cluster_size // self.entry_size * self.cluster_size
        self.data = bytearray(2 * self.cluster_size)  # the header, and a refcount table of zeros
        self._stored_end = 0
        entries = -(-self.size // self.l2_coverage) if self.l1_size is None else self.l1_size
        self.active = self.new_tree(entries)

    def new_tree(self, entries: int) -> Tree:
        """Append an L1 table without L2 tables."""
        return Tree(self.place(bytes(max(1, entries * 8))), entries)

    def place(self, content: bytes) -> int:
        """Append whole new clusters that start with the content; returns their host offset."""
        self.data += bytes(-len(self.data) % self.cluster_size)
        offset = len(self.data)
        self.data += content + bytes(-len(content) % self.cluster_size)
        return offset

    def word(self, offset: int) -> int:
        """The 64-bit word at a host offset."""
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def set_word(self, offset: int, value: int) -> None:
        """Overwrite the 64-bit word at a host offset."""
        self.data[offset : offset + 8] = value.to_bytes(8, "big")

    def set_l1(self, index: int, value: int, tree: Tree | None = None) -> None:
        """Overwrite an L1 entry."""
        self.set_word((tree or self.active).offset + index * 8, value)

    def l2_table(self, guest: int, tree: Tree | None = None) -> int:
        """Host offset of the L2 table that covers a guest offset, appended if there is none."""
        at = (tree or self.active).offset + guest // self.l2_coverage * 8
        if not self.word(at):
            self.set_word(at, self.place(bytes(self.cluster_size)) | COPIED)
        return self.word(at) & ~COPIED

    def entry_at(self, guest: int, tree: Tree | None = None) -> int:
        """Host offset of the L2 entry of a guest cluster."""
        index = guest % self.l2_coverage // self.cluster_size
        return self.l2_table(guest, tree) + index * self.entry_size

    def entry(self, guest: int, word: int, bitmap: int = 0, tree: Tree | None = None) -> int:
        """Overwrite an L2 entry; returns where it lies in the file."""
        at = self.entry_at(guest, tree)
        self.set_word(at, word)
        if self.extended_l2:
            self.set_word(at + 8, bitmap)
        return at

    def normal(self, guest: int, content: bytes, tree: Tree | None = None) -> int:
        """Store a guest cluster as it is; returns the host offset of its data."""
        host = self.place(content)
        self.entry(guest, host | COPIED, 0xFFFFFFFF, tree)
        return host

    def subclusters(self, guest: int, content: bytes, bitmap: int) -> int:
        """Store a guest cluster whose subclusters the bitmap tells; returns its data's host offset."""
        host = self.place(content)
        self.entry(guest, host | COPIED, bitmap)
        return host

    def zero_plain(self, guest: int, tree: Tree | None = None) -> None:
        """Make a guest cluster read as zeros without a host cluster."""
        if self.extended_l2:
            self.entry(guest, 0, 0xFFFFFFFF << 32, tree)
        else:
            self.entry(guest, ZERO, 0, tree)

    def zero_allocated(self, guest: int) -> int:
        """Make a guest cluster read as zeros above a host cluster full of something else."""
        host = self.place(b"\xee" * self.cluster_size)
        if self.extended_l2:
            self.entry(guest, host | COPIED, 0xFFFFFFFF << 32)
        else:
            self.entry(guest, host | COPIED | ZERO)
        return host

    def compressed(self, guest: int, stored: bytes, tree: Tree | None = None) -> int:
        """Store a compressed cluster, unaligned after the one before it; returns its host offset."""
        if self._stored_end != len(self.data):
            self.data += b"\xdd" * 3  # no compressed data starts where a cluster does
        host = len(self.data)
        self.data += stored
        self._stored_end = len(self.data)
        self.entry(guest, self.descriptor(host, len(stored)), 0, tree)
        return host

    def descriptor(self, host: int, length: int) -> int:
        """The L2 entry of a compressed cluster."""
        more_sectors = (host + length - 1) // 512 - host // 512
        return COMPRESSED | more_sectors << 62 - (self.cluster_bits - 8) | host

    def build(self) -> bytes:
        """The finished image."""
        fields = {"version": self.version, "cluster_bits": self.cluster_bits, "size": self.size}
        fields |= {"l1_size": self.active.entries, "l1_table_offset": self.active.offset}
        fields |= {"refcount_table_offset": self.cluster_size}
        if self.snapshots:
            fields["nb_snapshots"] = len(self.snapshots)
            fields["snapshots_offset"] = self.place(b"".join(self.snapshots))
        fields |= self.fields
        if self.extended_l2:
            fields["incompatible"] = fields.get("incompatible", 0) | BIT_EXTENDED_L2
        self.data[: self.cluster_size] = self._first_cluster(fields)
        return bytes(self.data)

    def _first_cluster(self, fields: dict[str, int]) -> bytes:
        area = self.extensions + bytes(8)
        if self.backing_name is not None:
            start = len(header(**fields)) + len(area)
            fields = {"backing_file_offset": start, "backing_file_size": len(self.backing_name)} | fields
        cluster = header(**fields) + area + (self.backing_name or b"")
        assert len(cluster) <= self.cluster_size
        return cluster.ljust(self.cluster_size, b"\0")
