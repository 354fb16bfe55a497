"""Internal snapshots: reading the table, and the file name that each snapshot gets.

Owns the list of snapshots and the naming rule. Must not know FUSE. The rule for names: bytes that a file name
or a terminal cannot carry become %XX; a name that is then empty, too long or already taken is made unique by
%id=ID, failing that by %n=POSITION. A plain % is always %25, so no two rules collide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator

from qcowfs.errors import CorruptImage, UsageError
from qcowfs.format.header import Header
from qcowfs.format.snapshot_table import FIXED_SIZE, MAX_TABLE_BYTES, Snapshot, record_length, unpack_record
from qcowfs.host.hostfile import HostFile
from qcowfs.text import quoted

SUFFIX = ".raw"
MAX_FILE_NAME = 255
_CHUNK = 64 << 10
_LONGEST_ID = 32
_ESCAPED = re.compile(rb"%([0-9A-F]{2})")


async def load_snapshots(file: HostFile, header: Header) -> list[Snapshot]:
    """Every record of the snapshot table, in its order.

    Raises `CorruptImage` where the table is incomplete or breaks a limit. Reads no more than the host
    file holds.
    """
    snapshots: list[Snapshot] = []
    table = bytearray()
    start = 0
    end = header.geometry.cluster_round_up(file.facts().size)  # the rest of the last cluster is zeros
    available = max(0, end - header.snapshots_offset)
    while len(snapshots) < header.nb_snapshots:
        length = record_length(bytes(table[start : start + FIXED_SIZE]), 0)
        if length is not None and start + length <= len(table):
            snapshots.append(unpack_record(bytes(table[start : start + length]), 0))
            start += length
        elif len(table) < min(available, MAX_TABLE_BYTES):
            await _read_more(file, header.snapshots_offset, table, available)
        else:
            raise CorruptImage(
                f"snapshot table at {header.snapshots_offset:#x}: record {len(snapshots) + 1} of "
                f"{header.nb_snapshots} is cut short by the end of the file or of the 64 MiB limit"
            )
    return snapshots


async def _read_more(file: HostFile, offset: int, table: bytearray, available: int) -> None:
    chunk = bytearray(min(_CHUNK, available - len(table)))
    await file.read_into([(offset + len(table), memoryview(chunk))])
    table += chunk


def find_snapshot(snapshots: list[Snapshot], wanted: str) -> Snapshot:
    """The snapshot with that id, else the first with that name; raises `UsageError` listing all."""
    key = wanted.encode("utf-8", "surrogateescape")
    for attribute in ("id", "name"):
        for snapshot in snapshots:
            if getattr(snapshot, attribute) == key:
                return snapshot
    known = ", ".join(f"{quoted(s.id)} {quoted(s.name)}" for s in snapshots) or "none"
    raise UsageError(f"no snapshot has the id or name {wanted!r}; there are: {known}")


def file_names(snapshots: list[Snapshot]) -> list[str]:
    """A unique file name for each snapshot, in their order; see the module's rule."""
    names: list[str] = []
    for position, snapshot in enumerate(snapshots, 1):
        names.append(file_name(snapshot, position, set(names)))
    return names


def file_name(snapshot: Snapshot, position: int, taken: Container[str]) -> str:
    """The file name of the snapshot at a position of the table, counted from 1, beside those taken."""
    named = (name + SUFFIX for name in _candidates(snapshot, position))
    return next(name for name in named if name not in taken)


def name_of(file_name: str) -> bytes | None:
    """The snapshot name that gets this file name where it is free; None if no name does."""
    text = file_name.removesuffix(SUFFIX)
    try:
        name = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), os.fsencode(text))
    except ValueError:
        return None
    return name if text and text != file_name and escape(name) == text else None


def _candidates(snapshot: Snapshot, position: int) -> Iterator[str]:
    """Names to try in turn, without the suffix; none is empty, and the last one is always free."""
    pieces = _escaped(snapshot.name)
    name = "".join(pieces)
    if _fits(name):
        yield name
    if len(snapshot.id) <= _LONGEST_ID:
        yield _shortened(pieces, f"%id={escape(snapshot.id)}")
    yield _shortened(pieces, f"%n={position}")


def escape(name: bytes) -> str:
    """The name as part of a file name: `/`, `%`, controls, bad UTF-8 and a leading dot as %XX."""
    return "".join(_escaped(name))


def _escaped(name: bytes) -> list[str]:
    """One piece for each character of the name, that may be cut off but not apart."""
    pieces = [_escape_char(char) for char in name.decode("utf-8", "surrogateescape")]
    if pieces[:1] == ["."]:
        pieces[0] = "%2E"
    return pieces


def _escape_char(char: str) -> str:
    if char in "/%" or not (char.isprintable() or char == " "):
        return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
    return char


def _fits(name: str) -> bool:
    return bool(name) and len((name + SUFFIX).encode()) <= MAX_FILE_NAME


def _shortened(pieces: list[str], mark: str) -> str:
    """As much of the name as fits before the mark."""
    kept = pieces[:MAX_FILE_NAME]
    while not _fits("".join(kept) + mark):
        kept.pop()
    return "".join(kept) + mark
