"""Flag bits and masks of L1, L2 and refcount table entries, and what an L2 entry says.

Owns the bit layout of single entries. Must not know tables, caches or I/O. Implements the sections
"L1 table", "Standard Cluster Descriptor", "Compressed Clusters Descriptor" and "Extended L2 Entries".
"""

from __future__ import annotations

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00

_ALL_SUBCLUSTERS = 0xFFFF_FFFF


def subcluster_bitmaps(bitmap: int) -> tuple[int, int]:
    """The (allocated, reads-as-zero) halves of an extended L2 entry's second word, 32 bits each."""
    return bitmap & _ALL_SUBCLUSTERS, bitmap >> 32


def run_length(bits: int, start: int, limit: int) -> int:
    """How many bits from `start` on, below `limit`, equal the bit at `start`."""
    wanted = bits >> start
    if wanted & 1:
        wanted = ~wanted
    run = (wanted & -wanted).bit_length() - 1 if wanted else limit - start
    return min(run, limit - start)
