"""The one place for shifts, masks and rounding: how a qcow2 image divides guest and host offsets.

Owns `GuestOffset`, `HostOffset` and the frozen `Geometry`. Must not know I/O, entries' flag bits or
which tables exist. Implements the address translation of the qcow2 specification.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

GuestOffset: TypeAlias = int
"""A byte of the virtual disk. An alias, since a distinct type would cost a call for each entry scanned."""
HostOffset: TypeAlias = int
"""A byte of the host file."""

SECTOR_SIZE = 512
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_L2_CLUSTER_BITS = 14
SUBCLUSTERS = 32
TABLE_ENTRY_SIZE = 8
MAX_SLICE_SIZE = 4096
COMPRESSED_OFFSET_BITS = 62
MAX_HOST_OFFSET_BITS = 56


@dataclass(frozen=True)
class Geometry:
    """Sizes and divisions that follow from an image's header; every offset is in bytes.

    A *slice* is the part of a metadata table that is cached as one piece: `slice_size` bytes, which
    divides a cluster.
    """

    cluster_bits: int
    extended_l2: bool = False
    refcount_order: int = 4
    cluster_size: int = field(init=False)
    l2_entry_size: int = field(init=False)
    l2_entries: int = field(init=False)
    l2_coverage: int = field(init=False)
    slice_size: int = field(init=False)
    slice_words: int = field(init=False)
    slice_coverage: int = field(init=False)
    subcluster_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive every size once, since look-ups use them for each request."""
        entry_size = 2 * TABLE_ENTRY_SIZE if self.extended_l2 else TABLE_ENTRY_SIZE
        cluster_size = 1 << self.cluster_bits
        slice_size = min(cluster_size, MAX_SLICE_SIZE)
        derived = {
            "cluster_size": cluster_size,
            "l2_entry_size": entry_size,
            "l2_entries": cluster_size // entry_size,
            "l2_coverage": cluster_size // entry_size * cluster_size,
            "slice_size": slice_size,
            "slice_words": slice_size // TABLE_ENTRY_SIZE,
            "slice_coverage": slice_size // entry_size * cluster_size,
            "subcluster_size": cluster_size // SUBCLUSTERS if self.extended_l2 else cluster_size,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def in_cluster(self, offset: int) -> int:
        """Bytes from the start of the cluster that holds `offset`."""
        return offset & (self.cluster_size - 1)

    def cluster_start(self, offset: int) -> int:
        """The first byte of the cluster that holds `offset`."""
        return offset & -self.cluster_size

    def cluster_round_up(self, size: int) -> int:
        """`size` rounded up to whole clusters."""
        return (size + self.cluster_size - 1) & -self.cluster_size

    def is_cluster_aligned(self, offset: int) -> bool:
        """Whether a cluster starts at `offset`."""
        return not offset & (self.cluster_size - 1)

    def cluster_index(self, offset: int) -> int:
        """The number of the cluster that holds `offset`."""
        return offset >> self.cluster_bits

    def l1_index(self, guest: int) -> int:
        """Which L1 entry covers the guest offset."""
        return guest // self.l2_coverage

    def l1_entries_for(self, size: int) -> int:
        """L1 entries that a virtual disk of `size` bytes needs."""
        return -(-size // self.l2_coverage)

    def l1_slice(self, guest: int) -> tuple[int, int]:
        """Byte offset of the slice within the L1 table, and the entry's index within that slice."""
        index = guest // self.l2_coverage
        return index // self.slice_words * self.slice_size, index % self.slice_words

    def l2_slice(self, guest: int) -> tuple[int, int]:
        """Byte offset of the slice within the L2 table, and the entry's index within that slice."""
        within_table = guest % self.l2_coverage
        within_slice = within_table % self.slice_coverage
        return (
            within_table // self.slice_coverage * self.slice_size,
            within_slice >> self.cluster_bits,
        )

    def l2_coverage_end(self, guest: int) -> int:
        """The guest offset where the next L2 table takes over."""
        return (guest // self.l2_coverage + 1) * self.l2_coverage

    def slice_end(self, guest: int) -> int:
        """The guest offset where the next slice of L2 entries takes over."""
        return (guest // self.slice_coverage + 1) * self.slice_coverage

    def compressed_location(self, descriptor: int) -> tuple[HostOffset, int]:
        """Host offset and stored length at most, of a compressed cluster's descriptor (section L2)."""
        offset_bits = COMPRESSED_OFFSET_BITS - (self.cluster_bits - 8)
        offset = descriptor & ((1 << offset_bits) - 1)
        sectors = (descriptor & ((1 << COMPRESSED_OFFSET_BITS) - 1)) >> offset_bits
        return offset, (sectors + 1) * SECTOR_SIZE - offset % SECTOR_SIZE

    def compressed_descriptor(self, offset: HostOffset, length: int) -> int:
        """What `compressed_location` reads, for `length` stored bytes at a host offset."""
        more_sectors = (offset + length - 1) // SECTOR_SIZE - offset // SECTOR_SIZE
        return offset | more_sectors << (COMPRESSED_OFFSET_BITS - (self.cluster_bits - 8))

    @property
    def refcounts_per_block(self) -> int:
        """How many clusters one refcount block counts."""
        return (self.cluster_size * 8) >> self.refcount_order

    def clusters_for(self, size: int) -> int:
        """Clusters that hold `size` bytes."""
        return -(-size // self.cluster_size)

    def subcluster_index(self, guest: int) -> int:
        """Which subcluster of its cluster holds the guest offset (extended L2)."""
        return (guest & (self.cluster_size - 1)) // self.subcluster_size


def sector_index(offset: int) -> int:
    """The number of the sector that holds `offset`."""
    return offset // SECTOR_SIZE


def sector_start(offset: int) -> int:
    """The first byte of the sector that holds `offset`."""
    return offset & -SECTOR_SIZE


def is_whole_sectors(offset: int, length: int) -> bool:
    """Whether a range begins and ends where sectors do."""
    return not (offset | length) & (SECTOR_SIZE - 1)


def whole_sectors(offset: int, length: int) -> tuple[int, int]:
    """The start and length of a range rounded out to whole sectors."""
    start = sector_start(offset)
    return start, -(-(offset + length) // SECTOR_SIZE) * SECTOR_SIZE - start
