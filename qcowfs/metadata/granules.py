"""Which granules of a disk were written to: bits that are only ever set.

Owns that set, in memory bounded by what was touched. Must not know where it is stored. Bit 0 of a byte stands
for the granule with the lowest offset, as in a stored bitmap.
"""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 512
"""No more than the smallest cluster, so that a chunk of stored bits lies in one."""
_CHUNK_BITS = CHUNK_BYTES * 8


class Granules:
    """Granules of `size` guest bytes each."""

    def __init__(self, size: int) -> None:
        """Start with none; `size` is a power of two."""
        self._shift = size.bit_length() - 1
        self._chunks: dict[int, bytearray] = {}

    def add(self, guest: int, length: int) -> None:
        """Add every granule that the range touches."""
        if length <= 0:
            return
        first, last = guest >> self._shift, (guest + length - 1) >> self._shift
        while first <= last:
            chunk, start = divmod(first, _CHUNK_BITS)
            end = min(last - first + start + 1, _CHUNK_BITS)
            bits = self._chunks.get(chunk)
            if bits is None:
                bits = self._chunks[chunk] = bytearray(CHUNK_BYTES)
            _set(bits, start, end)
            first += end - start

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(byte offset, bytes) of every touched part of the bitmap, `CHUNK_BYTES` each, in order."""
        for chunk in sorted(self._chunks):
            yield chunk * CHUNK_BYTES, bytes(self._chunks[chunk])


def _set(bits: bytearray, start: int, end: int) -> None:
    """Set the bits from `start` to before `end`, at least one."""
    first, last = start >> 3, (end - 1) >> 3
    head, tail = 0xFF << (start & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
    if first == last:
        bits[first] |= head & tail
        return
    bits[first] |= head
    bits[first + 1 : last] = b"\xff" * (last - first - 1)
    bits[last] |= tail
