"""Writing a new snapshot table: with what records lacked, and without those whose snapshot is given up.

Owns what becomes of the records. Must not know what else is repaired. The new table lies behind the end of
the file and is counted before one write of the header names it: a crash leaves the old table, and a leak.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from qcowfs.check.areas import WITH_DISK_SIZE, is_incomplete, load_all_records
from qcowfs.check.checker import inspect
from qcowfs.check.recount import Recount
from qcowfs.check.subject import Subject
from qcowfs.errors import CorruptImage
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.host.hostfile import HostFile

SNAPSHOTS_FIELD = 60
_PLACE = struct.Struct(">IQ")
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
    await _write(file, subject, [_completed(subject, record) for record in records])
    return True


def _completed(subject: Subject, snapshot: Snapshot) -> Snapshot:
    """The record with the live disk's size where it told none."""
    if not is_incomplete(subject, snapshot):
        return snapshot
    extra = _SIZES.pack(snapshot.vm_state_size, subject.header.virtual_size)
    return replace(snapshot, extra=extra[:WITH_DISK_SIZE])


async def _write(file: HostFile, subject: Subject, records: list[Snapshot]) -> None:
    """Put a new table in force."""
    offset = subject.clusters << subject.bits if records else 0
    if records:
        table = b"".join(record.pack() for record in records)
        await _append(file, subject, table)
    await file.write_from([(SNAPSHOTS_FIELD, _PLACE.pack(len(records), offset))])
    await file.sync()


async def _append(file: HostFile, subject: Subject, table: bytes) -> None:
    """Write the table behind the end of the file, and count it."""
    if not file.facts().regular:
        raise CorruptImage(f"{file.name}: its snapshot table needs a new place, which a device has not")
    whole = table.ljust(subject.geometry.cluster_round_up(len(table)), b"\0")
    await file.write_from([(subject.clusters << subject.bits, whole)])
    await file.sync()
    grown = (await inspect(file, passes=subject.passes)).subject
    grown.refer_to_run(subject.clusters, grown.clusters)
    await Recount(grown, may_raise=True, may_free=False).write(file)
