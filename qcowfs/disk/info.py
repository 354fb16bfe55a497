"""What an image is and holds, as the record that `qemu-img info --output=json` prints.

Owns the names of the keys. Must not know how the record is shown. Opens the image itself and nothing that it
names; works for images that cannot be mounted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcowfs.disk.image import read_header
from qcowfs.errors import CorruptImage, ImageInUse
from qcowfs.format import extensions as ext
from qcowfs.format.bitmaps import BitmapDirectory, unpack_directory
from qcowfs.format.features import Compatible, bit_numbers, describe_unknown
from qcowfs.format.header import COMPRESSION_NAMES, CRYPT_LUKS, Header
from qcowfs.format.luks import HEADER_SIZE, LuksHeader, unpack_pointer
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.host import locks
from qcowfs.host.hostfile import OsHostFile
from qcowfs.metadata.bitmaps import list_bitmaps
from qcowfs.metadata.snapshots import file_names, load_snapshots

Record = dict[str, Any]


async def read_info(path: Path, shown_as: str, warn: Callable[[str], None]) -> Record:
    """The record for the image at `path`.

    Damage that leaves the rest readable, and a program that writes the image meanwhile, is told by
    `warn`. Raises `QcowError` or `OSError` where nothing can be told.
    """
    file = OsHostFile.open(path)
    try:
        _lock_if_free(file, warn)
        header = await read_header(file, shown_as)
        record = _describe(header, file, shown_as)
        if header.nb_snapshots:
            record["snapshots"] = await _describe_snapshots(file, header, shown_as, warn)
        try:
            await _add_tables(record["format-specific"]["data"], file, header)
        except CorruptImage as error:
            warn(f"{shown_as}: {error}")
        return record
    finally:
        file.close()


async def read_bitmaps(path: Path, shown_as: str, warn: Callable[[str], None]) -> list[Record]:
    """A record for each persistent bitmap of the image at `path`.

    It has the keys of `qemu-img info`, and `dirty-bytes`: what of the disk the bitmap calls dirty, None
    where its bits cannot be trusted. Raises as `read_info` does, and `CorruptImage` for broken tables.
    """
    file = OsHostFile.open(path)
    try:
        _lock_if_free(file, warn)
        found = await list_bitmaps(file, await read_header(file, shown_as))
    except CorruptImage as error:
        prefix = "" if str(error).startswith(shown_as) else f"{shown_as}: "
        raise CorruptImage(f"{prefix}{error}") from None
    finally:
        file.close()
    return [
        {
            "name": os.fsdecode(bitmap.name),
            "granularity": bitmap.granularity,
            "flags": bitmap.flags,
            "dirty-bytes": bitmap.dirty_bytes,
        }
        for bitmap in found
    ]


def _lock_if_free(file: OsHostFile, warn: Callable[[str], None]) -> None:
    try:
        locks.acquire(file.fd, file.name, locks.READER)
    except ImageInUse as error:
        holder = str(error).partition("; ")[0]
        warn(f"{holder}; what follows may be out of date")


def _describe(header: Header, file: OsHostFile, shown_as: str) -> Record:
    record: Record = {
        "filename": shown_as,
        "format": "qcow2",
        "virtual-size": header.virtual_size,
        "actual-size": file.facts().allocated,
        "cluster-size": header.geometry.cluster_size,
        "dirty-flag": header.dirty,
    }
    if header.crypt_method:
        record["encrypted"] = True
    if header.backing_name is not None:
        name = os.fsdecode(header.backing_name)
        record["backing-filename"] = name
        record["full-backing-filename"] = str(Path(shown_as).parent / name)
        if header.backing_format is not None:
            record["backing-filename-format"] = header.backing_format
    record["format-specific"] = {"type": "qcow2", "data": _describe_format(header)}
    return record


def _describe_format(header: Header) -> Record:
    compression = COMPRESSION_NAMES.get(header.compression_type, f"unknown ({header.compression_type})")
    data: Record = {
        "compat": "1.1" if header.version >= 3 else "0.10",
        "compression-type": compression,
        "refcount-bits": 1 << header.refcount_order,
    }
    if header.version >= 3:
        data["lazy-refcounts"] = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
        data["corrupt"] = header.corrupt
        data["extended-l2"] = header.extended_l2
    if header.has_data_file:
        name = header.extension(ext.DATA_FILE_NAME)
        if name is not None:
            data["data-file"] = os.fsdecode(name)
        data["data-file-raw"] = header.raw_data_file
    unknown = describe_unknown(header.incompatible, header.feature_names)
    if unknown:
        data["unsupported-features"] = unknown
        data["unsupported-feature-bits"] = bit_numbers(header.incompatible)
    return data


async def _describe_snapshots(
    file: OsHostFile, header: Header, shown_as: str, warn: Callable[[str], None]
) -> list[Record]:
    try:
        snapshots = await load_snapshots(file, header)
    except CorruptImage as error:
        warn(f"{shown_as}: {error}")
        return []
    names = file_names(snapshots)
    return [describe_snapshot(s, n) for s, n in zip(snapshots, names, strict=True)]


def describe_snapshot(snapshot: Snapshot, file_name: str) -> Record:
    """A snapshot with the keys of `qemu-img info`, and the name of its file."""
    record = {
        "id": os.fsdecode(snapshot.id),
        "name": os.fsdecode(snapshot.name),
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
        "file-name": file_name,
    }
    if snapshot.icount is not None:
        record["icount"] = snapshot.icount
    if snapshot.disk_size is not None:
        record["disk-size"] = snapshot.disk_size
    return record


async def _add_tables(data: Record, file: OsHostFile, header: Header) -> None:
    """Add what lies outside the first cluster: bitmaps and the encryption header."""
    bitmaps = header.extension(ext.BITMAPS)
    if bitmaps is not None:
        directory = BitmapDirectory.unpack(bitmaps)
        raw = await _read(file, directory.offset, directory.size)
        data["bitmaps"] = [
            {"flags": e.flag_names, "name": os.fsdecode(e.name), "granularity": e.granularity}
            for e in unpack_directory(raw, directory.count)
        ]
    if header.crypt_method:
        data["encrypt"] = {"format": "luks" if header.crypt_method == CRYPT_LUKS else "aes"}
    pointer = header.extension(ext.ENCRYPTION_HEADER)
    if header.crypt_method == CRYPT_LUKS and pointer is not None:
        offset, _ = unpack_pointer(pointer)
        data["encrypt"] |= _describe_luks(LuksHeader.unpack(await _read(file, offset, HEADER_SIZE)))


async def _read(file: OsHostFile, offset: int, size: int) -> bytes:
    """As much of the range as the host file holds."""
    buffer = bytearray(max(0, min(size, file.facts().size - offset)))
    await file.read_into([(offset, memoryview(buffer))])
    return bytes(buffer)


def _describe_luks(luks: LuksHeader) -> Record:
    mode, _, iv = luks.mode.partition("-")
    generator, _, iv_hash = iv.partition(":")
    key_bits = luks.key_bytes * (4 if mode == "xts" else 8)
    record: Record = {
        "cipher-alg": f"{luks.cipher}-{key_bits}",
        "cipher-mode": mode,
        "ivgen-alg": generator,
        "hash-alg": luks.hash,
        "uuid": luks.uuid,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.digest_iterations,
        "slots": [],
    }
    if iv_hash:
        record["ivgen-hash-alg"] = iv_hash
    for slot in luks.slots:
        shown: Record = {"active": slot.active, "key-offset": slot.key_offset}
        if slot.active:
            shown |= {"iters": slot.iterations, "stripes": slot.stripes}
        record["slots"].append(shown)
    return record
