"""Which parts of a buffer are zeros, and where two buffers differ.

Owns the fast ways to look. Must not know where the bytes come from.
"""

from __future__ import annotations

import numpy as np

from qcowfs.geometry import SECTOR_SIZE

_SAMPLES = 4
"""Words of a unit that are looked at first: data rarely has zeros in all of them."""
Buffer = bytes | bytearray | memoryview


def is_zero(buffer: Buffer) -> bool:
    """Whether every byte is zero."""
    whole = len(buffer) // 8 * 8
    words = np.frombuffer(buffer, np.uint64, whole // 8)
    return not words.any() and not any(buffer[whole:])


def data_runs(buffer: Buffer, unit: int) -> list[tuple[int, int]]:
    """Where the units of the buffer that are not all zeros start and end; neighbours are one run.

    `unit` is a multiple of 8; a last unit may be shorter.
    """
    count = len(buffer) // unit
    words = np.frombuffer(buffer, np.uint64, count * unit // 8).reshape(count, unit // 8)
    samples = words[:, :: max(1, words.shape[1] // _SAMPLES)]
    has_data = np.bitwise_or.reduce(samples, axis=1) != 0
    unsure = np.flatnonzero(~has_data)  # few, or mostly zeros: only these are looked at whole
    if len(unsure) > count // 2:
        has_data = np.bitwise_or.reduce(words, axis=1) != 0
    elif len(unsure):
        has_data[unsure] = np.bitwise_or.reduce(words[unsure], axis=1) != 0
    if len(buffer) > count * unit:
        has_data = np.append(has_data, not is_zero(buffer[count * unit :]))
    edges = np.flatnonzero(np.diff(has_data, prepend=False, append=False))
    ends = np.minimum(edges * unit, len(buffer)).tolist()
    return list(zip(ends[0::2], ends[1::2], strict=True))


def first_difference(first: Buffer, second: Buffer) -> int | None:
    """Where the first sector starts in which two buffers of one length differ, None if they are equal."""
    one, other = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    if np.array_equal(one, other):
        return None
    return int(np.argmax(one != other)) // SECTOR_SIZE * SECTOR_SIZE


def first_data(buffer: Buffer) -> int | None:
    """Where the first sector starts that is not all zeros, None if there is none."""
    if is_zero(buffer):
        return None
    return int(np.argmax(np.frombuffer(buffer, np.uint8) != 0)) // SECTOR_SIZE * SECTOR_SIZE
