"""Buffers in batches that the host writes with one call.

Owns how large a batch is. Must not know files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_MOST_PARTS = 1000
"""Buffers that one call may write; the host's limit is 1024."""
_MOST_AT_ONCE = 2 << 20
"""Bytes of one such call: a huge page of the page cache, which takes the longer the smaller its pages are."""


def batches(parts: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The parts in lists that one call writes."""
    some: list[memoryview] = []
    room = _MOST_AT_ONCE
    for part in parts:
        for start in range(0, len(part), _MOST_AT_ONCE):
            some.append(part[start : start + _MOST_AT_ONCE])
            room -= len(some[-1])
            if room <= 0 or len(some) == _MOST_PARTS:
                yield some
                some, room = [], _MOST_AT_ONCE
    if some:
        yield some
