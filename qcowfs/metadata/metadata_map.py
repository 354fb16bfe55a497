"""Which host clusters hold metadata, so that no write lands on them.

Owns that set. Must not know how tables are read. One bit for each cluster of the host file.
"""

from __future__ import annotations


class MetadataMap:
    """The clusters that guest data must never be written to."""

    def __init__(self, cluster_bits: int) -> None:
        """Start empty."""
        self._bits = cluster_bits
        self._map = bytearray()

    def add(self, offset: int, size: int) -> None:
        """Protect every cluster that the range touches."""
        first, last = offset >> self._bits, (offset + size - 1) >> self._bits
        missing = (last >> 3) + 1 - len(self._map)
        if missing > 0:
            self._map += bytes(missing)
        for cluster in range(first, last + 1):
            self._map[cluster >> 3] |= 1 << (cluster & 7)

    def remove(self, offset: int) -> None:
        """Give up one cluster that no longer holds metadata."""
        cluster = offset >> self._bits
        if cluster >> 3 < len(self._map):
            self._map[cluster >> 3] &= ~(1 << (cluster & 7))

    def overlaps(self, offset: int, size: int) -> bool:
        """Whether the range touches a protected cluster."""
        for cluster in range(offset >> self._bits, ((offset + size - 1) >> self._bits) + 1):
            place = cluster >> 3
            if place < len(self._map) and self._map[place] >> (cluster & 7) & 1:
                return True
        return False
