"""Guest clusters whose entries are about to change.

Owns who waits for whom. Must not know what is changed. Clusters of one request are held together, so nobody
waits in a circle.
"""

from __future__ import annotations

import trio


class ClusterLocks:
    """Guest clusters whose entries are about to change; a second writer waits for the first."""

    def __init__(self) -> None:
        """Start with none."""
        self._held: dict[int, trio.Event] = {}

    def is_free(self, cluster: int) -> bool:
        """Whether nobody holds the cluster."""
        return cluster not in self._held

    async def hold(self, clusters: range) -> None:
        """Hold all of the clusters, waiting until none is held by anybody else."""
        while (busy := next((c for c in clusters if c in self._held), None)) is not None:
            await self._held[busy].wait()
        self._held.update(dict.fromkeys(clusters, trio.Event()))

    def release(self, clusters: range) -> None:
        """Let go of clusters that were held together."""
        for cluster in clusters:
            event = self._held.pop(cluster)
        event.set()
