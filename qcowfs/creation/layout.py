"""Where the clusters of a new image lie when it is laid out in one piece.

Owns the order of its parts and how many refcount blocks count them all. Must not know files or what the
tables hold. The order is header, LUKS area, refcount table, refcount blocks, L1 table, L2 tables, guest
clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcowfs.errors import UsageError
from qcowfs.format.header import MAX_REFCOUNT_TABLE_BYTES
from qcowfs.geometry import TABLE_ENTRY_SIZE, Geometry, HostOffset


@dataclass(frozen=True)
class RefcountPlan:
    """How many clusters of refcount table and refcount blocks count an image, themselves included."""

    table_clusters: int
    blocks: int

    @property
    def clusters(self) -> int:
        """Clusters that table and blocks take together."""
        return self.table_clusters + self.blocks


def plan_refcounts(geometry: Geometry, clusters: int) -> RefcountPlan:
    """What counts an image of `clusters` other clusters; raises `UsageError` past the table's limit."""
    plan = RefcountPlan(1, 1)
    while True:
        blocks = -(-(clusters + plan.clusters) // geometry.refcounts_per_block)
        needed = RefcountPlan(geometry.clusters_for(blocks * TABLE_ENTRY_SIZE), blocks)
        if needed.table_clusters * geometry.cluster_size > max(
            MAX_REFCOUNT_TABLE_BYTES, geometry.cluster_size
        ):
            raise UsageError(
                f"an image of {clusters} clusters needs a refcount table over "
                f"{MAX_REFCOUNT_TABLE_BYTES >> 20} MiB; larger clusters or narrower refcounts need less"
            )
        if needed.blocks <= plan.blocks and needed.table_clusters <= plan.table_clusters:
            return plan
        plan = RefcountPlan(max(needed.table_clusters, plan.table_clusters), max(needed.blocks, plan.blocks))


@dataclass(frozen=True)
class Layout:
    """The parts of a new image: clusters of LUKS area, L1 table, L2 tables and guest clusters."""

    geometry: Geometry
    luks_clusters: int
    l1_clusters: int
    l2_tables: int
    data_clusters: int
    refcounts: RefcountPlan

    @classmethod
    def plan(
        cls, geometry: Geometry, size: int, *, tables: bool, data: bool, luks_clusters: int = 0
    ) -> Layout:
        """For a disk of `size` bytes with all its L2 tables or none, all its guest clusters or none."""
        entries = geometry.l1_entries_for(size)
        l1_clusters = geometry.clusters_for(entries * TABLE_ENTRY_SIZE)
        l2_tables = entries if tables else 0
        data_clusters = geometry.clusters_for(size) if data else 0
        refcounts = plan_refcounts(geometry, 1 + luks_clusters + l1_clusters + l2_tables + data_clusters)
        return cls(geometry, luks_clusters, l1_clusters, l2_tables, data_clusters, refcounts)

    @property
    def refcount_table(self) -> HostOffset:
        """Where the refcount table starts."""
        return (1 + self.luks_clusters) * self.geometry.cluster_size

    @property
    def refcount_blocks(self) -> HostOffset:
        """Where the first of the refcount blocks starts, which follow each other."""
        return self.refcount_table + self.refcounts.table_clusters * self.geometry.cluster_size

    @property
    def l1_table(self) -> HostOffset:
        """Where the L1 table starts."""
        return self.refcount_blocks + self.refcounts.blocks * self.geometry.cluster_size

    @property
    def l2_table(self) -> HostOffset:
        """Where the first of the L2 tables starts, which follow each other."""
        return self.l1_table + self.l1_clusters * self.geometry.cluster_size

    @property
    def data(self) -> HostOffset:
        """Where the first guest cluster starts; they follow each other."""
        return self.l2_table + self.l2_tables * self.geometry.cluster_size

    @property
    def end(self) -> HostOffset:
        """Bytes of the whole image."""
        return self.data + self.data_clusters * self.geometry.cluster_size
