"""The snapshot table: variable-length records of internal snapshots.

Owns the record layout and its limits. Must not know how a snapshot is read, or file names. Implements the
section "Snapshot table".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qcowfs.errors import CorruptImage
from qcowfs.format.header import MAX_L1_BYTES, MAX_OFFSET
from qcowfs.geometry import SECTOR_SIZE, Geometry

MAX_TABLE_BYTES = 64 << 20
MAX_EXTRA = 1024
NO_ICOUNT = (1 << 64) - 1

_RECORD = struct.Struct(">QIHHIIQII")
FIXED_SIZE = _RECORD.size
_VM_STATE_END, _DISK_SIZE_END, _ICOUNT_END = 8, 16, 24


@dataclass(frozen=True)
class Snapshot:
    """One internal snapshot. `id` and `name` are arbitrary bytes; times in seconds and nanoseconds.

    `extra` keeps the extra data as stored, so that fields unknown here survive a rewrite.
    """

    l1_table_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size_32: int
    extra: bytes = b""

    @property
    def vm_state_size(self) -> int:
        """Bytes of VM state; the extra data's 64-bit field overrides the 32-bit one."""
        large = self._extra_field(_VM_STATE_END)
        return self.vm_state_size_32 if large is None else large

    @property
    def disk_size(self) -> int | None:
        """Bytes of the virtual disk when the snapshot was made; None if the record does not tell."""
        size = self._extra_field(_DISK_SIZE_END)
        return None if size is None else size // SECTOR_SIZE * SECTOR_SIZE

    @property
    def icount(self) -> int | None:
        """The instruction counter of record/replay, None where it is off or not stored."""
        value = self._extra_field(_ICOUNT_END)
        return None if value == NO_ICOUNT else value

    @property
    def date_ns(self) -> int:
        """When the snapshot was made, in nanoseconds since 1970."""
        return self.date_sec * 1_000_000_000 + self.date_nsec

    def check(self, geometry: Geometry, size: int) -> None:
        """Raise `CorruptImage` where the snapshot's L1 table breaks a limit or misses the disk's end."""
        label = f"snapshot id {self.id.decode('utf-8', 'backslashreplace')}"
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise CorruptImage(f"{label}: L1 table of {self.l1_size * 8} bytes, over {MAX_L1_BYTES}")
        if not geometry.is_cluster_aligned(self.l1_table_offset):
            raise CorruptImage(
                f"{label}: L1 table at offset {self.l1_table_offset:#x} is not cluster aligned"
            )
        if self.l1_table_offset + self.l1_size * 8 > MAX_OFFSET:
            raise CorruptImage(f"{label}: L1 table at {self.l1_table_offset:#x} ends beyond 2^63")
        if self.l1_size < geometry.l1_entries_for(size):
            raise CorruptImage(f"{label}: L1 table of {self.l1_size} entries is short of its size")

    def pack(self) -> bytes:
        """The record, padded to 8 bytes."""
        fixed = _RECORD.pack(
            self.l1_table_offset, self.l1_size, len(self.id), len(self.name), self.date_sec,
            self.date_nsec, self.vm_clock_nsec, self.vm_state_size_32, len(self.extra),
        )  # fmt: skip
        record = fixed + self.extra + self.id + self.name
        return record.ljust(_padded(len(record)), b"\0")

    def _extra_field(self, end: int) -> int | None:
        if len(self.extra) < end:
            return None
        return int.from_bytes(self.extra[end - 8 : end], "big")


def record_length(table: bytes, start: int) -> int | None:
    """Padded length of the record at `start`, None if too little of it is there to tell.

    Raises `CorruptImage` for extra data over the limit.
    """
    if start + _RECORD.size > len(table):
        return None
    _, _, id_size, name_size, _, _, _, _, extra_size = _RECORD.unpack_from(table, start)
    if extra_size > MAX_EXTRA:
        raise CorruptImage(f"snapshot table: extra data of {extra_size} bytes, over {MAX_EXTRA}")
    return _padded(_RECORD.size + extra_size + id_size + name_size)


def unpack_record(table: bytes, start: int) -> Snapshot:
    """The snapshot whose whole record lies at `start` of `table`."""
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, vm_state, extra_size = _RECORD.unpack_from(
        table, start
    )
    extra_at = start + _RECORD.size
    id_at = extra_at + extra_size
    name_at = id_at + id_size
    return Snapshot(
        l1_offset, l1_size, table[id_at:name_at], table[name_at : name_at + name_size],
        sec, nsec, clock, vm_state, table[extra_at:id_at],
    )  # fmt: skip


def _padded(length: int) -> int:
    return (length + 7) & ~7
