"""Which parts of a buffer are zeros, and where two buffers differ.

Owns the fast ways to look. Must not know where the bytes come from. All of it rests on comparing bytearrays,
for which Python calls the C library; that loads nothing and is as quick as memory.
"""

from __future__ import annotations

from qcowfs.geometry import SECTOR_SIZE

Buffer = bytes | bytearray | memoryview
_ZEROS = bytearray(1 << 16)


def is_zero(buffer: Buffer) -> bool:
    """Whether every byte is zero."""
    view = memoryview(buffer)
    whole = len(view) // len(_ZEROS) * len(_ZEROS)
    for start in range(0, whole, len(_ZEROS)):
        if not _equal(_ZEROS, view[start : start + len(_ZEROS)]):
            return False
    rest = view[whole:]
    return _equal(_ZEROS[: len(rest)], rest)


def _equal(one: bytearray, other: memoryview) -> bool:
    """Whether they are; the other way round a view would look at each byte by itself."""
    return one == other


def data_runs(buffer: Buffer, unit: int) -> list[tuple[int, int]]:
    """Where the units of the buffer that are not all zeros start and end; neighbours are one run.

    A last unit may be shorter.
    """
    view = memoryview(buffer)
    if is_zero(view):
        return []
    runs, start = [], 0
    first_bytes = bytes(view[::unit])
    index = first_bytes.find(0)
    while index >= 0:  # only units that begin with a zero are looked at whole
        place = index * unit
        if is_zero(view[place : place + unit]):
            if start < place:
                runs.append((start, place))
            start = min(place + unit, len(view))
        index = first_bytes.find(0, index + 1)
    if start < len(view):
        runs.append((start, len(view)))
    return runs


def first_difference(first: Buffer, second: Buffer) -> int | None:
    """Where the first sector starts in which two buffers of one length differ, None if they are equal.

    Quickest where `first` is a bytearray.
    """
    one = first if isinstance(first, bytearray) else bytearray(first)
    other = memoryview(second)
    if one == other:
        return None
    low, high = 0, len(other)
    while high - low > SECTOR_SIZE:  # the first difference lies between them, `low` at a sector
        middle = low + max(SECTOR_SIZE, (high - low) // 2 // SECTOR_SIZE * SECTOR_SIZE)
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def first_data(buffer: Buffer) -> int | None:
    """Where the first sector starts that is not all zeros, None if there is none."""
    runs = data_runs(buffer, SECTOR_SIZE)
    return runs[0][0] if runs else None
