"""Writing a new snapshot table: with what records lacked, and without those whose snapshot is given up.

Owns what becomes of the records. Must not know what else is repaired. The new table lies behind the end of
the file and is counted before one write of the header names it: a crash leaves the old table, and a leak.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from qcowfs.check.areas import WITH_DISK_SIZE, is_incomplete, load_all_records
from qcowfs.check.checker import inspect
from qcowfs.check.growth import place_behind_end
from qcowfs.check.recount import Recount
from qcowfs.check.subject import NOBODY, Subject
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.host.hostfile import HostFile

SNAPSHOTS_FIELD = 60
_PLACE = struct.Struct(">IQ")
_UNALIGNED = 1
_SIZES = struct.Struct(">QQ")


async def mend_snapshots(file: HostFile, subject: Subject, *, drop_lost: bool) -> bool:
    """Complete records that do not tell the disk's size; whether that, or `drop_lost`, took a new table.

    With `drop_lost` the records whose snapshot cannot be read are left out.
    """
    records = await load_all_records(subject)
    if drop_lost:
        broken = subject.broken_snapshots
        is_needed = bool(broken) or subject.is_snapshot_table_broken
        records = [record for index, record in enumerate(records) if index not in broken]
    else:
        is_needed = False
        if len(records) != subject.header.nb_snapshots:
            return False
    if not is_needed and not any(is_incomplete(subject, record) for record in records):
        return False
    if drop_lost:
        subject = await _forget_gone(file, subject)
    await _write(file, subject, [_completed(subject, record) for record in records])
    return True


async def _forget_gone(file: HostFile, subject: Subject) -> Subject:
    """Let the old table name nothing behind the end of the file, before that grows; what is known then.

    Each step is one write within a sector: first the records behind the end, then their L1 tables.
    """
    records = await load_all_records(subject)
    if subject.first_gone == NOBODY or subject.header.snapshots_offset >> subject.bits >= subject.clusters:
        return subject
    if len(records) != subject.header.nb_snapshots:
        await file.write_from([(SNAPSHOTS_FIELD, len(records).to_bytes(4, "big"))])
        await file.sync()
        subject = (await inspect(file, passes=subject.passes)).subject
    if subject.is_snapshot_table_broken:
        return subject
    place = subject.header.snapshots_offset
    for record in records:
        if subject.is_past_end(record.l1_table_offset, record.l1_size * 8):
            await file.write_from([(place, (record.l1_table_offset | _UNALIGNED).to_bytes(8, "big"))])
        place += len(record.pack())
    await file.sync()
    return (await inspect(file, passes=subject.passes)).subject


def _completed(subject: Subject, snapshot: Snapshot) -> Snapshot:
    """The record with the live disk's size where it told none."""
    if not is_incomplete(subject, snapshot):
        return snapshot
    extra = _SIZES.pack(snapshot.vm_state_size, subject.header.virtual_size)
    return replace(snapshot, extra=extra[:WITH_DISK_SIZE])


async def _write(file: HostFile, subject: Subject, records: list[Snapshot]) -> None:
    """Put a new table in force."""
    offset = 0
    if records:
        offset = await _append(file, subject, b"".join(record.pack() for record in records))
    await file.write_from([(SNAPSHOTS_FIELD, _PLACE.pack(len(records), offset))])
    await file.sync()


async def _append(file: HostFile, subject: Subject, table: bytes) -> int:
    """Write the table behind the end of the file, and count it; its host offset."""
    whole = table.ljust(subject.geometry.cluster_round_up(len(table)), b"\0")
    first = place_behind_end(file, subject, len(whole) >> subject.bits)
    await file.write_from([(first << subject.bits, whole)])
    await file.sync()
    grown = (await inspect(file, passes=subject.passes)).subject
    grown.refer_to_run(first, grown.clusters)
    await Recount(grown, may_raise=True, may_free=False).write(file)
    return first << subject.bits
