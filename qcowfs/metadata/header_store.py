"""Storing a changed header, extensions and backing file name included: a crash leaves the old or the new one.

Owns how the first cluster is overwritten. Must not know why. The first sector is written last and switches
over; what lies behind it goes to places that the old header does not use, as far as there are any.
"""

from __future__ import annotations

from qcowfs.errors import UsageError
from qcowfs.format.header import Header
from qcowfs.geometry import SECTOR_SIZE
from qcowfs.host.hostfile import HostFile


async def store_header(file: HostFile, old: Header, new: Header) -> None:
    """Replace the header `old`, which the file has, by `new`.

    Raises `UsageError` where it does not fit into the first cluster, `OSError` as the host does.
    """
    size = new.geometry.cluster_size
    current = bytearray(size)
    await file.read_into([(0, memoryview(current))])
    used = _used_ranges(old, bytes(current))
    packed = _placed(new, used, size)
    if len(packed) > size:
        raise UsageError(
            f"{file.name}: the header would take {len(packed)} bytes, more than its cluster of {size}; "
            "a shorter backing file name may fit"
        )
    target = packed.ljust(max(r.stop for r in used), b"\0")
    behind = bytearray(current[: len(target)])
    for offset in range(SECTOR_SIZE, len(target)):
        if not any(offset in r for r in used):
            behind[offset] = target[offset]
    needed = _used_ranges(new, packed)
    if all(
        behind[r.start : r.stop][skip:] == target[r.start : r.stop][skip:] for r, skip in map(_behind, needed)
    ):
        await _write(file, SECTOR_SIZE, bytes(behind[SECTOR_SIZE:]))
        await _write(file, 0, target[:SECTOR_SIZE])
        await _write(file, SECTOR_SIZE, target[SECTOR_SIZE:])
    else:
        await _write(file, 0, target)


def _behind(part: range) -> tuple[range, int]:
    """A range, and how many of its bytes lie in the first sector."""
    return part, max(0, min(len(part), SECTOR_SIZE - part.start))


async def _write(file: HostFile, offset: int, data: bytes) -> None:
    if data:
        await file.write_from([(offset, data)])
        await file.sync()


def _used_ranges(header: Header, current: bytes) -> list[range]:
    """The bytes of the first cluster that the header uses: itself with its extensions, and the name."""
    area = len(header.pack()) - len(header.backing_name or b"")
    name_at = int.from_bytes(current[8:16], "big") if header.backing_name is not None else 0
    return [range(area), range(name_at, name_at + len(header.backing_name or b""))]


def _placed(new: Header, used: list[range], size: int) -> bytes:
    """The new header's bytes, with its name behind all that is used if there is room for it."""
    packed = new.pack()
    behind = new.pack(name_at=max(r.stop for r in used))
    return behind if len(behind) <= size else packed
