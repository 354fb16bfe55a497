"""What the header names beside the trees: snapshot table, LUKS header, bitmaps; each claimed and judged.

Owns the rules of these areas. Must not know L2 tables. Implements the sections "Snapshot table" and
"Bitmaps", and the encryption header pointer.
"""

from __future__ import annotations

import numpy as np

from qcowfs.check.arrays import load_bytes, load_words
from qcowfs.check.findings import Finding, Kind
from qcowfs.check.subject import BITMAP, DIRECTORY, LUKS, SNAPSHOT_TABLE, TABLE, UNCLAIMED, Subject
from qcowfs.errors import CorruptImage
from qcowfs.format import extensions as ext
from qcowfs.format.bitmaps import BitmapDirectory, BitmapEntry, unpack_directory
from qcowfs.format.entries import OFFSET_MASK
from qcowfs.format.features import Autoclear
from qcowfs.format.header import CRYPT_LUKS
from qcowfs.format.luks import HEADER_SIZE, STRIPES, LuksHeader, unpack_pointer
from qcowfs.format.snapshot_table import (
    FIXED_SIZE,
    MAX_TABLE_BYTES,
    Snapshot,
    record_length,
    unpack_record,
)
from qcowfs.text import quoted

WITH_DISK_SIZE = 16
"""Bytes of extra data that version 3 demands of a snapshot."""
WHOLE = "the whole snapshot"
_ALL_ONES = 1
_CUT = "is cut short"


async def load_snapshots(subject: Subject) -> dict[int, Snapshot]:
    """The snapshots whose L1 table can be looked at, by their index; what is broken is a finding.

    The table is claimed as far as there are sound records: what follows may be something else.
    """
    records = await load_all_records(subject, report=True)
    sound = {index: record for index, record in enumerate(records) if _is_sound(subject, record)}
    subject.broken_snapshots = set(range(len(records))) - sound.keys()
    end = max(sound, default=0) + 1
    size = sum(len(record.pack()) for record in records[:end])
    if not subject.claim(subject.header.snapshots_offset, size, SNAPSHOT_TABLE, "snapshot table"):
        subject.is_snapshot_table_broken = True
    return sound


async def load_all_records(subject: Subject, *, report: bool = False) -> list[Snapshot]:
    """The records of the snapshot table; a broken one ends the list, with a finding if that is wanted."""
    header = subject.header
    if not header.nb_snapshots:
        return []
    offset = header.snapshots_offset
    available = max(0, (subject.clusters << subject.bits) - offset)
    table = await load_bytes(subject.file, offset, min(available, MAX_TABLE_BYTES))
    records: list[Snapshot] = []
    start = 0
    while len(records) < header.nb_snapshots:
        record = _next_record(table, start)
        if isinstance(record, str):
            if report:
                which = f"record {len(records) + 1} of {header.nb_snapshots}"
                whole = "what cannot be read of the snapshot table"
                subject.hide(f"{which} {record}", "snapshot table", whole=whole, host=offset + start)
                subject.is_snapshot_table_broken = True
            if record == _CUT and available < MAX_TABLE_BYTES:
                subject.note_gone(max(subject.clusters, offset >> subject.bits), "snapshot table")
            break
        records.append(record)
        start += len(record.pack())
    return records


def _next_record(table: bytes, start: int) -> Snapshot | str:
    """The record at a place of the table, or the rule that it breaks."""
    try:
        length = record_length(table[start : start + FIXED_SIZE], 0)
    except CorruptImage as error:
        return f"cannot be read: {error}"
    if length is None or start + length > len(table):
        return _CUT
    return unpack_record(table[start : start + length], 0)


def name_of(snapshot: Snapshot) -> str:
    """How findings call a snapshot."""
    return f"snapshot {quoted(snapshot.id)}"


def is_incomplete(subject: Subject, snapshot: Snapshot) -> bool:
    """Whether a record lacks what its version demands: the disk's size."""
    return subject.header.version >= 3 and len(snapshot.extra) < WITH_DISK_SIZE


def _is_sound(subject: Subject, snapshot: Snapshot) -> bool:
    """Whether the snapshot's L1 table can be looked at."""
    if is_incomplete(subject, snapshot):
        subject.error("the record does not tell the disk's size, as version 3 demands", name_of(snapshot))
    size = subject.header.virtual_size if snapshot.disk_size is None else snapshot.disk_size
    try:
        snapshot.check(subject.geometry, size)
    except CorruptImage as error:
        subject.hide(str(error), name_of(snapshot), whole=WHOLE, host=snapshot.l1_table_offset)
        return False
    return True


async def claim_luks(subject: Subject) -> None:
    """Claim the LUKS header and hold it against the bounds that opening the image has."""
    pointer = subject.header.extension(ext.ENCRYPTION_HEADER)
    is_luks = subject.header.crypt_method == CRYPT_LUKS
    owner = "LUKS header"
    if (pointer is not None) != is_luks:
        rule = "is missing" if is_luks else "is there but the encryption method is another one"
        subject.report.add(Finding(Kind.LOST if is_luks else Kind.ERROR, rule, owner))
    if pointer is None:
        return
    try:
        offset, length = unpack_pointer(pointer)
        if subject.claim(offset, length, LUKS, owner):
            luks = LuksHeader.unpack(await load_bytes(subject.file, offset, min(length, HEADER_SIZE)))
            luks.check(length)
            for number, slot in enumerate(luks.slots):
                if slot.stripes != STRIPES:  # opening overlooks it where the slot is empty, QEMU does not
                    subject.error(f"key slot {number} has {slot.stripes} stripes, not {STRIPES}", owner)
    except CorruptImage as error:
        subject.hide(str(error), owner)


# -- bitmaps


async def claim_bitmaps(subject: Subject) -> None:
    """Claim the bitmaps' directory, tables and bits, if the header says that they can be trusted.

    Otherwise nobody does, and their clusters are leaks, as they are to QEMU.
    """
    extension = subject.header.extension(ext.BITMAPS)
    trusted = bool(subject.header.autoclear & Autoclear.BITMAPS)
    if extension is None and trusted:
        subject.error("the header promises bitmaps, but has no extension that names them", "bitmaps")
    if extension is None or not trusted:
        return
    hidden, subject.report.hidden = subject.report.hidden, False
    try:
        directory = BitmapDirectory.unpack(extension)
        if subject.claim(directory.offset, directory.size, DIRECTORY, "bitmap directory", Kind.ERROR):
            data = await load_bytes(subject.file, directory.offset, directory.size)
            for entry in unpack_directory(data, directory.count):
                await _claim_bitmap(subject, entry)
    except CorruptImage as error:
        subject.hide(str(error), "bitmap directory", Kind.ERROR)
    subject.are_bitmaps_broken = subject.report.hidden
    subject.report.hidden |= hidden


async def _claim_bitmap(subject: Subject, entry: BitmapEntry) -> None:
    """Claim a bitmap's table and the clusters of bits that it names."""
    owner = f"bitmap {quoted(entry.name)}"
    if not subject.claim(entry.table_offset, entry.table_size * 8, TABLE, f"{owner}, table", Kind.ERROR):
        return
    words = await load_words(subject.file, entry.table_offset, entry.table_size)
    offsets = words & np.uint64(OFFSET_MASK)
    reserved = ~np.uint64(OFFSET_MASK | _ALL_ONES)
    wrong = ((words & reserved) != 0) | ((offsets != 0) & ((words & np.uint64(_ALL_ONES)) != 0))
    size = subject.geometry.cluster_size
    wrong |= (offsets % np.uint64(size)) != 0
    wrong |= (offsets >> np.uint64(subject.bits)) >= np.uint64(subject.clusters)
    for index in np.flatnonzero(wrong).tolist():
        subject.hide(
            "names no cluster of bits in the file", owner, Kind.ERROR, host=int(offsets[index]),
            place=entry.table_offset + index * 8, entry=int(words[index]),
        )  # fmt: skip
    past = (offsets % np.uint64(size) == 0) & (offsets >> np.uint64(subject.bits) >= subject.clusters)
    if past.any():
        subject.note_gone(int(offsets[past].min()) >> subject.bits, owner)
    clusters = (offsets[~wrong & (offsets != 0)] >> np.uint64(subject.bits)).astype(np.int64)
    for cluster in clusters[subject.owners[clusters] != UNCLAIMED].tolist():
        subject.error("its bits overlap other metadata", owner, host=cluster << subject.bits)
    subject.owners[clusters] = BITMAP
    subject.refer(clusters)
