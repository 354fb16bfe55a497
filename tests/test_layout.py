"""A new image's layout: every cluster is counted, and nothing more is taken than that needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.creation.layout import Layout, plan_refcounts
from qcowfs.errors import UsageError
from qcowfs.geometry import Geometry

geometries = st.builds(Geometry, st.integers(9, 21), refcount_order=st.integers(0, 6))


@given(geometries, st.integers(1, 3_000_000))
def test_blocks_count_every_cluster_and_the_table_holds_every_block(geometry: Geometry, others: int) -> None:
    try:
        plan = plan_refcounts(geometry, others)
    except UsageError:
        most = max(8 << 20, geometry.cluster_size) // 8 * geometry.refcounts_per_block
        assert others * 1.1 > most
        return
    total = others + plan.clusters
    assert plan.blocks * geometry.refcounts_per_block >= total
    assert (plan.blocks - 2) * geometry.refcounts_per_block < total
    assert plan.table_clusters * geometry.cluster_size >= plan.blocks * 8
    assert (plan.table_clusters - 2) * geometry.cluster_size < plan.blocks * 8


@given(geometries, st.integers(0, 1 << 32), st.booleans(), st.booleans())
def test_the_parts_follow_each_other(geometry: Geometry, size: int, tables: bool, data: bool) -> None:
    try:
        layout = Layout.plan(geometry, size, tables=tables, data=data)
    except UsageError:
        return
    places = (layout.refcount_table, layout.refcount_blocks, layout.l1_table, layout.l2_table, layout.data)
    assert list(places) == sorted(places)
    assert all(geometry.is_cluster_aligned(place) for place in (*places, layout.end))
    assert layout.l2_table - layout.l1_table >= geometry.l1_entries_for(size) * 8
    assert layout.end - layout.data == (geometry.cluster_round_up(size) if data else 0)


def test_a_refcount_table_beyond_its_limit_is_refused() -> None:
    with pytest.raises(UsageError, match="refcount table over 8 MiB"):
        plan_refcounts(Geometry(9, refcount_order=6), 1 << 26)
