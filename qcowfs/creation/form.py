"""What a new image shall be: the creation options of qemu-img, checked, and the header that follows.

Owns the names, defaults and rules of the options. Must not know files or where clusters lie. Implements the
combinations that the section "Header" permits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qcowfs.creation.encrypting import PREFIX, Encryption
from qcowfs.errors import UsageError
from qcowfs.format import extensions as ext
from qcowfs.format.extensions import Extension
from qcowfs.format.features import NAME_TABLE, Autoclear, Compatible, Incompatible
from qcowfs.format.header import (
    COMPRESSION_DEFLATE,
    COMPRESSION_NAMES,
    CRYPT_LUKS,
    CRYPT_NONE,
    KNOWN_LENGTH,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_L1_BYTES,
    Header,
)
from qcowfs.format.luks import pack_pointer
from qcowfs.geometry import (
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    SECTOR_SIZE,
    TABLE_ENTRY_SIZE,
    Geometry,
    HostOffset,
)

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
PREALLOCATIONS = ("off", "metadata", "falloc", "full")
BACKING_FORMATS = ("qcow2", "raw")
MAX_SIZE = (1 << 63) - SECTOR_SIZE
_COMPRESSIONS = {name: number for number, name in COMPRESSION_NAMES.items()}
_SWITCHES = {"on": True, "off": False}
_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", *"KMGTPE"))} | {"B": 1}
_SIZE = re.compile(r"(\d+)(?:\.(\d+))?(?:([KMGTPE])(?:i?B)?|(B))?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from text such as 4096, 1.5G or 20GiB; raises `UsageError`."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no size such as 4096, 1.5G or 20GiB")
    unit = _UNITS[(match[3] or match[4] or "").upper()]
    fraction = match[2] or "0"
    size: int = int(match[1]) * unit + int(fraction) * unit // 10 ** len(fraction)
    if size > MAX_SIZE:
        raise UsageError(f"{text!r} is beyond {MAX_SIZE} bytes, the largest size")
    return size


@dataclass(frozen=True)
class Creation:
    """The form of a new image. Sizes are in bytes; names are as the header shall have them."""

    version: int = 3
    cluster_size: int = 1 << 16
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression_type: int = COMPRESSION_DEFLATE
    preallocation: str = "off"
    data_file: str | None = None
    data_file_raw: bool = False
    backing_file: str | None = None
    backing_format: str | None = None
    size: int | None = None
    encryption: Encryption | None = None
    geometry: Geometry = field(init=False)

    def __post_init__(self) -> None:
        """Check every rule; raises `UsageError` that names the option."""
        bits, order = self.cluster_size.bit_length() - 1, self.refcount_bits.bit_length() - 1
        if self.cluster_size != 1 << max(bits, 0) or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            raise UsageError(f"cluster_size={self.cluster_size}: must be a power of two from 512 to 2M")
        if self.refcount_bits != 1 << max(order, 0) or self.refcount_bits > 64:
            raise UsageError(f"refcount_bits={self.refcount_bits}: must be 1, 2, 4, 8, 16, 32 or 64")
        object.__setattr__(self, "geometry", Geometry(bits, self.extended_l2, order))
        self._check_version()
        self._check_combinations()
        self._check_encryption()
        self._check_backing()

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> Creation:
        """The form that options such as `{"cluster_size": "4k"}` ask for, under qemu-img's names."""
        values: dict[str, object] = {}
        encrypting = {name: text for name, text in words.items() if name.startswith(PREFIX)}
        if encrypting:
            values["encryption"] = Encryption.from_words(encrypting)
        for name, text in words.items():
            if name in encrypting:
                continue
            if name not in _OPTIONS:
                raise UsageError(f"{name!r} is no creation option; there are: {', '.join(_OPTIONS)}")
            own_name, parse = _OPTIONS[name]
            values[own_name] = parse(name, text)
        made: Callable[..., Creation] = cls
        form = made(**values)
        # a raw data file is found by its offsets alone, so its tables must be complete from the start
        raw = form.data_file_raw and form.preallocation == "off"
        return replace(form, preallocation="metadata") if raw else form

    def _check_version(self) -> None:
        if self.version >= 3:
            return
        beyond = {
            "lazy_refcounts": self.lazy_refcounts,
            "extended_l2": self.extended_l2,
            "compression_type": self.compression_type != COMPRESSION_DEFLATE,
            "refcount_bits": self.refcount_bits != 16,
            "data_file": self.data_file is not None,
        }
        for name in (name for name, asked in beyond.items() if asked):
            raise UsageError(f"{name}: version 2 images do not have this; leave it out or use compat=v3")

    def _check_combinations(self) -> None:
        if self.extended_l2 and self.cluster_size < 1 << MIN_EXTENDED_L2_CLUSTER_BITS:
            raise UsageError("extended_l2=on: needs cluster_size=16k or more")
        if self.data_file_raw and self.data_file is None:
            raise UsageError("data_file_raw=on: needs data_file")
        if self.data_file_raw and self.backing_file is not None:
            raise UsageError("data_file_raw=on: cannot be combined with a backing file")
        if self.backing_file is not None and self.preallocation != "off" and not self.extended_l2:
            raise UsageError(
                f"preallocation={self.preallocation}: would hide the backing file; needs extended_l2=on"
            )

    def _check_encryption(self) -> None:
        if self.encryption is None:
            return
        if self.data_file_raw:
            raise UsageError("data_file_raw=on: an encrypted data file cannot be read as a raw disk")
        if self.version < 3 and self.preallocation != "off":
            raise UsageError(
                f"preallocation={self.preallocation}: with encryption needs compat=v3, for what nobody wrote "
                "would read as noise"
            )

    @property
    def luks_clusters(self) -> int:
        """Clusters behind the header's that the LUKS area takes."""
        return 0 if self.encryption is None else self.geometry.clusters_for(self.encryption.length)

    @property
    def luks_offset(self) -> HostOffset:
        """Where the LUKS area lies, if there is one: right behind the header's cluster."""
        return self.cluster_size

    def _check_backing(self) -> None:
        if self.backing_file is None:
            if self.backing_format is not None:
                raise UsageError("backing_fmt: needs a backing file")
            return
        if not self.backing_file or len(os.fsencode(self.backing_file)) > MAX_BACKING_NAME:
            raise UsageError(f"backing_file: the name must have 1 to {MAX_BACKING_NAME} bytes")
        if self.backing_format is None:
            raise UsageError("backing_file: needs its format, -F qcow2 or -F raw; it is never guessed")
        if len(self.backing_format.encode()) > MAX_BACKING_FORMAT:
            raise UsageError(f"backing_fmt: has more than {MAX_BACKING_FORMAT} bytes")

    def check_size(self, size: int) -> None:
        """Raise `UsageError` where an image of this form cannot have a disk of `size` bytes."""
        most = MAX_L1_BYTES // TABLE_ENTRY_SIZE * self.geometry.l2_coverage
        if size > min(most, MAX_SIZE):
            raise UsageError(
                f"a disk of {size} bytes needs larger clusters: with cluster_size={self.cluster_size} "
                f"the most is {min(most, MAX_SIZE)}"
            )

    def header(self, size: int, *further: Extension) -> Header:
        """The header of an image whose disk has `size` bytes, its tables still without places.

        It has the further extensions as well.
        """
        self.check_size(size)
        header = Header(
            version=self.version,
            cluster_bits=self.geometry.cluster_bits,
            size=size,
            crypt_method=CRYPT_NONE if self.encryption is None else CRYPT_LUKS,
            l1_size=self.geometry.l1_entries_for(size),
            l1_table_offset=0,
            refcount_table_offset=0,
            refcount_table_clusters=0,
            nb_snapshots=0,
            snapshots_offset=0,
            refcount_order=self.geometry.refcount_order,
            backing_name=None if self.backing_file is None else os.fsencode(self.backing_file),
            extensions=(*further, *self._extensions()),
        )
        return self._fitting(replace(header, **self._version_3_fields()) if self.version >= 3 else header)

    def _version_3_fields(self) -> dict[str, Any]:
        incompatible = Incompatible(0)
        if self.data_file is not None:
            incompatible |= Incompatible.EXTERNAL_DATA_FILE
        if self.compression_type != COMPRESSION_DEFLATE:
            incompatible |= Incompatible.COMPRESSION_TYPE
        if self.extended_l2:
            incompatible |= Incompatible.EXTENDED_L2
        return {
            "incompatible": incompatible.value,
            "compatible": Compatible.LAZY_REFCOUNTS.value if self.lazy_refcounts else 0,
            "autoclear": Autoclear.RAW_EXTERNAL_DATA.value if self.data_file_raw else 0,
            "header_length": KNOWN_LENGTH,
            "compression_type": self.compression_type,
            "extra": bytes(7),
        }

    def _extensions(self) -> tuple[Extension, ...]:
        found = []
        if self.backing_format is not None:
            found.append(Extension(ext.BACKING_FORMAT, self.backing_format.encode()))
        if self.data_file is not None:
            found.append(Extension(ext.DATA_FILE_NAME, os.fsencode(self.data_file)))
        if self.encryption is not None:
            pointer = pack_pointer(self.luks_offset, self.encryption.length)
            found.append(Extension(ext.ENCRYPTION_HEADER, pointer))
        if self.version >= 3:
            found.append(Extension(ext.FEATURE_NAMES, NAME_TABLE))
        return tuple(found)

    def _fitting(self, header: Header) -> Header:
        """The header without its table of feature names where that would not fit in the first cluster."""
        needed = tuple(e for e in header.extensions if e.kind != ext.FEATURE_NAMES)
        for candidate in (header, replace(header, extensions=needed)):
            if len(candidate.pack()) <= self.cluster_size:
                return candidate
        raise UsageError(f"cluster_size={self.cluster_size}: too small for the names of the files below")


def _integer(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{name}={text}: must be a number")
    return int(text)


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _text(name: str, text: str) -> str:
    if not text or "\0" in text:
        raise UsageError(f"{name}: must name something")
    return text


def _one_of(choices: Mapping[str, object]) -> Callable[[str, str], object]:
    def choose(name: str, text: str) -> object:
        if text not in choices:
            raise UsageError(f"{name}={text}: must be one of {', '.join(choices)}")
        return choices[text]

    return choose


_OPTIONS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "compat": ("version", _one_of(VERSIONS)),
    "cluster_size": ("cluster_size", _size),
    "refcount_bits": ("refcount_bits", _integer),
    "lazy_refcounts": ("lazy_refcounts", _one_of(_SWITCHES)),
    "extended_l2": ("extended_l2", _one_of(_SWITCHES)),
    "compression_type": ("compression_type", _one_of(_COMPRESSIONS)),
    "preallocation": ("preallocation", _one_of({name: name for name in PREALLOCATIONS})),
    "data_file": ("data_file", _text),
    "data_file_raw": ("data_file_raw", _one_of(_SWITCHES)),
    "backing_file": ("backing_file", _text),
    "backing_fmt": ("backing_format", _one_of({name: name for name in BACKING_FORMATS})),
    "size": ("size", _size),
}
"""qemu-img's name of each option, the field that it sets, and how its text is read."""
