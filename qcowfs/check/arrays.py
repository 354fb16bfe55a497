"""Tables of the host file as numpy arrays of host-order integers, and refcounts of every width.

Owns bulk reading and byte order. Must not know what entries mean. Implements the layout of tables and
refcount blocks, apart from `format.words` on purpose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qcowfs.host.hostfile import HostFile

U64: TypeAlias = npt.NDArray[np.uint64]
Bytes: TypeAlias = npt.NDArray[np.uint8]
I64: TypeAlias = npt.NDArray[np.int64]
Bool: TypeAlias = npt.NDArray[np.bool_]
Counts: TypeAlias = npt.NDArray[Any]
"""Counts of one of the widths 8, 16, 32 or 64."""

BATCH_BYTES = 1 << 20
"""Tables are read this many bytes at a time, so that a batch stays in the processor's cache."""


async def load_bytes(file: HostFile, offset: int, size: int) -> bytes:
    """Bytes of the host file; zeros beyond its end. Raises `OSError` as the host does."""
    data = bytearray(size)
    await file.read_into([(offset, memoryview(data))])
    return bytes(data)


async def load_words(file: HostFile, offset: int, count: int) -> U64:
    """A table of 64-bit entries. Raises `OSError` as the host does."""
    data = bytearray(count * 8)
    await file.read_into([(offset, memoryview(data))])
    return _native(np.frombuffer(data, np.uint64))


async def load_rows(file: HostFile, offsets: Sequence[int] | I64, size: int) -> Bytes:
    """Tables of `size` bytes, a row each; neighbours in the file are read by one request."""
    data = bytearray(len(offsets) * size)
    view = memoryview(data)
    requests = [
        (start, view[first * size : (first + count) * size])
        for start, first, count in _neighbours([int(offset) for offset in offsets], size)
    ]
    await file.read_into(requests)
    return np.frombuffer(data, np.uint8).reshape(len(offsets), size)


async def load_tables(file: HostFile, offsets: Sequence[int] | I64, size: int) -> U64:
    """Tables of 64-bit entries, a row each. Raises `OSError` as the host does."""
    return _native((await load_rows(file, offsets, size)).view(np.uint64))


def _native(words: U64) -> U64:
    """Big-endian words in the processor's order, in the memory where they are."""
    return words.byteswap(inplace=True) if sys.byteorder == "little" else words


def _neighbours(offsets: list[int], size: int) -> Iterator[tuple[int, int, int]]:
    """(host offset, index of the first table, number of tables) of tables that follow each other."""
    first = 0
    for index in range(1, len(offsets) + 1):
        if index == len(offsets) or offsets[index] != offsets[index - 1] + size:
            yield offsets[first], first, index - first
            first = index


def batches(total: int, size: int) -> Iterator[slice]:
    """Slices of a list of tables of `size` bytes that are read together."""
    step = max(1, BATCH_BYTES // size)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def count_type(bits: int) -> npt.DTypeLike:
    """The type that holds counts of that many bits."""
    return {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[max(8, bits)]


def unpack_counts(blocks: Bytes, bits: int) -> Counts:
    """Refcount blocks, a row each, as counts; widths below a byte start at the lowest bit."""
    if bits >= 8:
        return blocks.view(np.dtype(count_type(bits)).newbyteorder(">")).astype(count_type(bits))
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (blocks[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(len(blocks), -1)


def pack_counts(counts: Counts, bits: int) -> bytes:
    """Counts as the bytes of refcount blocks; each must fit the width."""
    if bits >= 8:
        return counts.astype(np.dtype(count_type(bits)).newbyteorder(">")).tobytes()
    per_byte = 8 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Counts = np.bitwise_or.reduce(counts.reshape(-1, per_byte).astype(np.uint8) << shifts, axis=1)
    return packed.astype(np.uint8).tobytes()


def runs_of(indices: I64, *values: Counts, most: int) -> Iterator[slice]:
    """The first slices, at most `most`, of sorted indices that follow each other with equal values."""
    if not len(indices):
        return
    breaks = np.diff(indices) != 1
    for value in values:
        breaks |= value[1:] != value[:-1]
    inner = (np.flatnonzero(breaks)[:most] + 1).tolist()
    edges = [0, *inner, len(indices)] if len(inner) < most else [0, *inner]
    for start, end in pairwise(edges):
        yield slice(start, end)
