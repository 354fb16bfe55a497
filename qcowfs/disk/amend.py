"""Changing what an image is: its version, lazy refcounts, the width of refcounts, its backing file's name.

Owns the order of these changes and what each demands. Must not know how bytes are read from the image. Each
step is one switch of the header, before which all that is new is on disk; the image is sound after each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qcowfs.check.checker import Inspection, inspect
from qcowfs.check.expand import expand_zeros, forget_zeros
from qcowfs.check.opening import opened
from qcowfs.check.passes import Passes, Tell
from qcowfs.check.recount import Recount, change_width
from qcowfs.check.repair import Wishes, repair
from qcowfs.errors import CorruptImage, UnsupportedFeature, UsageError
from qcowfs.format import extensions as ext
from qcowfs.format.extensions import Extension
from qcowfs.format.features import Compatible, Incompatible
from qcowfs.format.header import (
    KNOWN_LENGTH,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    V2_LENGTH,
    V2_REFCOUNT_ORDER,
    V3_LENGTH,
    Header,
)
from qcowfs.host.hostfile import HostFile
from qcowfs.metadata.header_store import store_header

_MOST_PASSES = 11
"""Walks over all tables that the changes may take."""


@dataclass(frozen=True)
class Amendments:
    """What is to be changed; None leaves it as it is.

    `version` is 2 or 3, `refcount_bits` a power of two up to 64. An empty `backing_name` takes the
    backing file away; `backing_format` alone declares it anew.
    """

    version: int | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    backing_name: bytes | None = None
    backing_format: str | None = None


async def amend(path: Path, wanted: Amendments, tell: Tell | None = None) -> None:
    """Change the image at `path`, which must be sound; leaks do no harm. `tell` hears how far it is.

    Raises `UsageError` or `UnsupportedFeature` for what the version or the image cannot have, before
    anything is changed, `CorruptImage` where a check finds errors, `OSError` as the host does.
    """
    with opened(path, writable=True) as file:
        await amend_file(file, wanted, tell)


async def amend_file(file: HostFile, wanted: Amendments, tell: Tell | None = None) -> None:
    """As `amend`, on a file that is open and locked."""
    passes = Passes(tell, _MOST_PASSES)
    found = await inspect_sound(file, passes)
    header = found.subject.header
    version = wanted.version or header.version
    _refuse_impossible(file.name, header, wanted, version)
    if version == 3 and header.version == 2:
        header = await _store(file, header, _upgraded(header))
        found = await inspect(file, passes=passes)
        if found.subject.report.corruptions:  # old snapshots do not tell the disk's size
            await repair(file, found, Wishes(errors=True))
    if wanted.refcount_bits is not None:
        await _set_width(file, wanted.refcount_bits.bit_length() - 1, passes)
    header = (await inspect(file, passes=passes)).subject.header
    header = await _store(file, header, with_backing(header, wanted))
    if wanted.lazy_refcounts is not None:
        lazy = Compatible.LAZY_REFCOUNTS.value  # ~ of a flag would drop unknown bits
        bits = header.compatible & ~lazy | (lazy if wanted.lazy_refcounts else 0)
        header = await _store(file, header, replace(header, compatible=bits))
    if version == 2 and header.version == 3:
        await _downgrade(file, passes)
    passes.end()


async def inspect_sound(file: HostFile, passes: Passes | None = None) -> Inspection:
    """Check an image; raises `CorruptImage` if that finds errors, or marks of damage."""
    found = await inspect(file, passes=passes)
    report = found.subject.report
    marked = found.subject.header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT)
    if report.corruptions or marked:
        first = f" (the first: {report.errors[0]})" if report.errors else ""
        raise CorruptImage(
            f"{file.name}: is damaged or was not closed{first}; repair it with qcowfs check --repair all"
        )
    return found


def _refuse_impossible(name: str, header: Header, wanted: Amendments, version: int) -> None:
    if version == 2:
        _refuse_in_version_2(name, header, wanted)
    bits = wanted.refcount_bits
    if bits is not None and (bits not in (1, 2, 4, 8, 16, 32, 64)):
        raise UsageError(f"{name}: refcounts of {bits} bits; 1, 2, 4, 8, 16, 32 and 64 are possible")
    if bits == 1 and header.nb_snapshots:
        raise UsageError(f"{name}: has snapshots, which refcounts of 1 bit cannot count")
    if len(wanted.backing_name or b"") > MAX_BACKING_NAME:
        raise UsageError(f"{name}: the backing file's name is over {MAX_BACKING_NAME} bytes")
    if len((wanted.backing_format or "").encode()) > MAX_BACKING_FORMAT:
        raise UsageError(f"{name}: the backing format's name is over {MAX_BACKING_FORMAT} bytes")
    has_backing = header.backing_name if wanted.backing_name is None else wanted.backing_name
    if wanted.backing_format and not has_backing:
        raise UsageError(f"{name}: has no backing file whose format could be declared")
    if wanted.backing_name and header.raw_data_file:
        raise UsageError(f"{name}: its data file is a raw image, which excludes a backing file")


def _refuse_in_version_2(name: str, header: Header, wanted: Amendments) -> None:
    order = header.refcount_order if wanted.refcount_bits is None else wanted.refcount_bits.bit_length() - 1
    if order != V2_REFCOUNT_ORDER:
        raise UsageError(
            f"{name}: version 2 has refcounts of 16 bits only; change that as well: refcount_bits=16"
        )
    if wanted.lazy_refcounts:
        raise UsageError(f"{name}: version 2 has no lazy refcounts")
    if header.incompatible:
        raise UnsupportedFeature(
            f"{name}: version 2 has no data files, extended L2 entries or compression types"
        )
    if header.version == 3 and header.extension(ext.BITMAPS) is not None:
        raise UnsupportedFeature(f"{name}: has bitmaps, which version 2 has not; remove them first")


async def _store(file: HostFile, old: Header, new: Header) -> Header:
    if new != old:
        await store_header(file, old, new)
    return new


def _upgraded(header: Header) -> Header:
    length = KNOWN_LENGTH
    return replace(header, version=3, header_length=length, extra=bytes(length - V3_LENGTH - 1))


def with_backing(header: Header, wanted: Amendments) -> Header:
    """The header that names another backing file, or declares its format anew."""
    name = header.backing_name if wanted.backing_name is None else wanted.backing_name or None
    if wanted.backing_name is None and wanted.backing_format is None:
        return header
    declared = header.extension(ext.BACKING_FORMAT)
    if wanted.backing_format is not None:
        declared = wanted.backing_format.encode()
    kept = tuple(e for e in header.extensions if e.kind != ext.BACKING_FORMAT)
    if name is not None and declared:
        kept = (Extension(ext.BACKING_FORMAT, declared), *kept)
    return replace(header, backing_name=name, extensions=kept)


async def _set_width(file: HostFile, order: int, passes: Passes) -> None:
    found = await inspect(file, passes=passes)
    if found.subject.header.refcount_order != order:
        await change_width(file, found.subject, order)


async def _downgrade(file: HostFile, passes: Passes) -> None:
    """To version 2: zero clusters become unallocated, or data over a backing file; then the header."""
    found = await inspect(file, passes=passes)
    if found.subject.header.backing_name is None:
        await forget_zeros(file, found)
    else:
        await expand_zeros(file, found, passes)
    found = await inspect(file, passes=passes)
    await Recount(found.subject, may_raise=False, may_free=True).write(file)
    header = found.subject.header  # the refcount table may have moved
    kept = tuple(e for e in header.extensions if e.kind != ext.FEATURE_NAMES)
    old = replace(
        header, version=2, header_length=V2_LENGTH, compatible=0, autoclear=0, extra=b"", extensions=kept
    )  # fmt: skip
    await store_header(file, header, old)
