"""The image header with its extensions and backing file name, as one frozen dataclass.

Owns the layout of the first cluster and the limits of its fields. Must not know what lies at the offsets
it names. Implements the sections "Header" and "Header extensions" for versions 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from qcowfs.errors import CorruptImage, NotQcow2, UnsupportedFeature
from qcowfs.format import extensions as ext
from qcowfs.format.extensions import Extension
from qcowfs.format.features import Autoclear, Incompatible, refuse_unknown, unpack_names
from qcowfs.geometry import (
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    SECTOR_SIZE,
    Geometry,
)

MAGIC = b"QFI\xfb"
V2_LENGTH = 72
V3_LENGTH = 104
KNOWN_LENGTH = 112
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
MAX_REFCOUNT_ORDER = 6
V2_REFCOUNT_ORDER = 4
MAX_OFFSET = (1 << 63) - 1

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
CRYPT_NAMES = {CRYPT_AES: "legacy AES", CRYPT_LUKS: "LUKS"}
COMPRESSION_DEFLATE, COMPRESSION_ZSTD = 0, 1
COMPRESSION_NAMES = {COMPRESSION_DEFLATE: "zlib", COMPRESSION_ZSTD: "zstd"}

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


@dataclass(frozen=True)
class Header:
    """Every field of the header; `extra` holds bytes beyond the known ones, kept for rewriting.

    `size` is the virtual disk's size in bytes as stored; `virtual_size` is what a reader shows.
    """

    version: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = V2_REFCOUNT_ORDER
    header_length: int = V2_LENGTH
    compression_type: int = COMPRESSION_DEFLATE
    extra: bytes = b""
    backing_name: bytes | None = None
    extensions: tuple[Extension, ...] = field(default=())

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Parse the start of an image; `data` should hold the first cluster, less if the file ends.

        Raises `NotQcow2` for another kind of file, `CorruptImage` naming the field and the limit it
        breaks. Unknown feature bits are not judged here: see `check_supported`.
        """
        fields = _unpack_fixed(data)
        _check_cluster_bits(fields["cluster_bits"])
        fields.update(_unpack_v3(data) if fields["version"] >= 3 else {})
        backing_offset, backing_size = fields.pop("backing_offset"), fields.pop("backing_size")
        geometry = Geometry(fields["cluster_bits"])
        name = _unpack_backing_name(data, backing_offset, backing_size, geometry)
        area_end = backing_offset or geometry.cluster_size
        start = fields.get("header_length", V2_LENGTH)
        fields["extensions"] = ext.unpack(data[:area_end], start)
        header = cls(**fields, backing_name=name)
        header._check_limits()
        return header

    def pack(self, name_at: int = 0) -> bytes:
        """The header, its extensions and the backing file name as QEMU lays them out.

        The name may be put further back, at `name_at`.
        """
        body = ext.pack(self.extensions)
        name = self.backing_name or b""
        name_offset = max(name_at, self.header_length + len(body)) if self.backing_name is not None else 0
        fixed = _V2.pack(
            MAGIC, self.version, name_offset, len(name), self.cluster_bits, self.size,
            self.crypt_method, self.l1_size, self.l1_table_offset, self.refcount_table_offset,
            self.refcount_table_clusters, self.nb_snapshots, self.snapshots_offset,
        )  # fmt: skip
        if self.version >= 3:
            fixed += self._pack_v3()
        return (fixed + body).ljust(name_offset, b"\0") + name

    def _pack_v3(self) -> bytes:
        fixed = _V3.pack(
            self.incompatible, self.compatible, self.autoclear, self.refcount_order,
            self.header_length,
        )  # fmt: skip
        if self.header_length > V3_LENGTH:
            fixed += bytes([self.compression_type]) + self.extra
        return fixed

    @property
    def geometry(self) -> Geometry:
        """How this image divides offsets."""
        return Geometry(self.cluster_bits, self.extended_l2, self.refcount_order)

    @property
    def virtual_size(self) -> int:
        """Bytes of the virtual disk: whole sectors, as QEMU rounds a stored size down."""
        return self.size // SECTOR_SIZE * SECTOR_SIZE

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are 16 bytes with 32 subclusters."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether guest data lives in an external data file."""
        return bool(self.incompatible & Incompatible.EXTERNAL_DATA_FILE)

    @property
    def dirty(self) -> bool:
        """Whether reference counts may be out of date."""
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether a writer found damage and marked the image."""
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def raw_data_file(self) -> bool:
        """Whether the external data file alone is a valid raw image."""
        return bool(self.autoclear & Autoclear.RAW_EXTERNAL_DATA)

    @property
    def feature_names(self) -> dict[tuple[int, int], bytes]:
        """The image's own names of feature bits, by (kind, bit)."""
        return unpack_names(self.extension(ext.FEATURE_NAMES) or b"")

    @property
    def backing_format(self) -> str | None:
        """The declared format of the backing file, None if undeclared."""
        data = self.extension(ext.BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "backslashreplace")

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of that type, None if absent."""
        return next((e.data for e in self.extensions if e.kind == kind), None)

    def check_supported(self) -> None:
        """Raise `UnsupportedFeature` for anything that makes the guest's data unreadable here."""
        refuse_unknown(self.incompatible, self.feature_names)
        if self.crypt_method not in (CRYPT_NONE, *CRYPT_NAMES):
            raise UnsupportedFeature(f"encryption method {self.crypt_method} is unknown")
        if self.compression_type not in COMPRESSION_NAMES:
            raise UnsupportedFeature(f"compression type {self.compression_type} is unknown")
        marked = bool(self.incompatible & Incompatible.COMPRESSION_TYPE)
        if marked != (self.compression_type != COMPRESSION_DEFLATE):
            raise CorruptImage(
                f"compression type {self.compression_type} contradicts incompatible feature bit 3 "
                f"({'set' if marked else 'clear'})"
            )

    def _check_limits(self) -> None:
        geometry = self.geometry
        if self.refcount_order > MAX_REFCOUNT_ORDER:
            _fail("refcount_order", self.refcount_order, f"exceeds {MAX_REFCOUNT_ORDER}")
        if self.extended_l2 and self.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
            _fail("cluster_bits", self.cluster_bits, "is below 14, the least for extended L2")
        _check_table("l1_size", self.l1_size * 8, MAX_L1_BYTES, self.l1_table_offset, geometry)
        needed = geometry.l1_entries_for(self.size)
        if needed * 8 > MAX_L1_BYTES:
            _fail("size", self.size, f"needs an L1 table over {MAX_L1_BYTES >> 20} MiB")
        if self.l1_size < needed:
            _fail("l1_size", self.l1_size, f"is below the {needed} entries that the size needs")
        if not self.refcount_table_clusters:
            _fail("refcount_table_clusters", 0, "must not be 0")
        reftable_bytes = self.refcount_table_clusters << self.cluster_bits
        _check_table(
            "refcount_table_clusters", reftable_bytes, MAX_REFCOUNT_TABLE_BYTES,
            self.refcount_table_offset, geometry,
        )  # fmt: skip
        if self.nb_snapshots > MAX_SNAPSHOTS:
            _fail("nb_snapshots", self.nb_snapshots, f"exceeds {MAX_SNAPSHOTS}")
        _check_table("snapshots_offset", 0, 0, self.snapshots_offset, geometry)


def _unpack_fixed(data: bytes) -> dict[str, Any]:
    if not data:
        raise NotQcow2("is empty; a qcow2 image starts with its header")
    if data[:4] != MAGIC[: len(data[:4])] or len(data) < 4:
        raise NotQcow2(
            f"is not a qcow2 image (starts with {data[:4].hex(' ')}, not {MAGIC.hex(' ')}); "
            "another format can be converted: qemu-img convert -O qcow2"
        )
    if len(data) < V2_LENGTH:
        raise CorruptImage(f"header is cut short: {len(data)} bytes of at least {V2_LENGTH}")
    names = (
        "version backing_offset backing_size cluster_bits size crypt_method l1_size l1_table_offset"
        " refcount_table_offset refcount_table_clusters nb_snapshots snapshots_offset"
    )
    fields = dict(zip(names.split(), _V2.unpack_from(data)[1:], strict=True))
    if fields["version"] not in (2, 3):
        raise UnsupportedFeature(f"is qcow version {fields['version']}; versions 2 and 3 are known")
    return fields


def _unpack_v3(data: bytes) -> dict[str, Any]:
    if len(data) < V3_LENGTH:
        raise CorruptImage(f"header is cut short: {len(data)} bytes of at least {V3_LENGTH}")
    names = ("incompatible", "compatible", "autoclear", "refcount_order", "header_length")
    fields: dict[str, Any] = dict(zip(names, _V3.unpack_from(data, V2_LENGTH), strict=True))
    length: int = fields["header_length"]
    if length < V3_LENGTH or length % 8:
        _fail("header_length", length, f"must be a multiple of 8 and at least {V3_LENGTH}")
    if length > len(data):
        _fail("header_length", length, f"goes beyond the first cluster ({len(data)} bytes read)")
    if length > V3_LENGTH:
        fields["compression_type"] = data[V3_LENGTH]
        fields["extra"] = data[V3_LENGTH + 1 : length]
    return fields


def _unpack_backing_name(data: bytes, offset: int, size: int, geometry: Geometry) -> bytes | None:
    if not offset:
        return None
    if size > MAX_BACKING_NAME:
        _fail("backing_file_size", size, f"exceeds {MAX_BACKING_NAME}")
    if offset + size > geometry.cluster_size:
        _fail("backing_file_offset", offset, "puts the name beyond the first cluster")
    if offset + size > len(data):
        raise CorruptImage(f"the backing file name at offset {offset:#x} is cut short")
    return data[offset : offset + size]


def _check_cluster_bits(bits: int) -> None:
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        _fail("cluster_bits", bits, f"is outside {MIN_CLUSTER_BITS}..{MAX_CLUSTER_BITS}")


def _check_table(name: str, size: int, limit: int, offset: int, geometry: Geometry) -> None:
    if size > limit:
        raise CorruptImage(f"header field {name} makes a table of {size} bytes, over {limit}")
    if not geometry.is_cluster_aligned(offset):
        raise CorruptImage(f"header: the table of {name} at offset {offset:#x} is not cluster aligned")
    if offset + size > MAX_OFFSET:
        raise CorruptImage(f"header: the table of {name} at offset {offset:#x} ends beyond 2^63")


def _fail(name: str, value: int, rule: str) -> None:
    raise CorruptImage(f"header field {name} = {value} {rule}")
