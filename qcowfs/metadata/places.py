"""Where clusters lie, remembered: what is asked for again, and what lies beside what is asked for.

Owns how much is remembered, and when a whole neighbourhood is worth it. Must not know what an entry means.
"""

from __future__ import annotations

from collections.abc import Callable

from qcowfs.geometry import HostOffset

MOST_KNOWN = 1 << 15
"""Clusters that are remembered: some 5 MiB of memory at most."""
_AREA_BITS = 6
_MANY = 4
"""So many lookups in an area of 64 clusters, and its others are looked up as well, in one go."""


class Places:
    """Host offsets of clusters, by index; who changes a cluster's entry has to `forget` it."""

    def __init__(self, look_up: Callable[[int], HostOffset | None]) -> None:
        """Ask `look_up` for what is not known yet; it must not wait, and may answer None."""
        self.known: dict[int, HostOffset] = {}
        self._look_up = look_up
        self._lookups: dict[int, int] = {}

    def find(self, cluster: int) -> HostOffset | None:
        """Where the cluster lies, if that is known or can be looked up."""
        found = self.known.get(cluster)
        return self._learn(cluster) if found is None else found

    def forget(self, cluster: int) -> None:
        """Look the cluster up anew when it is asked for."""
        self.known.pop(cluster, None)

    def note(self, cluster: int, place: HostOffset) -> None:
        """Remember what needs no lookup, since the entry has just been made."""
        if len(self.known) >= MOST_KNOWN:
            self.known.clear()
            self._lookups.clear()
        self.known[cluster] = place

    def _learn(self, cluster: int) -> HostOffset | None:
        found = self._look_up(cluster)
        if found is None:
            return None
        self.note(cluster, found)
        if len(self._lookups) >= MOST_KNOWN:
            self._lookups.clear()
        area = cluster >> _AREA_BITS
        lookups = self._lookups[area] = self._lookups.get(area, 0) + 1
        if lookups == _MANY:
            self._learn_area(area)
        return found

    def _learn_area(self, area: int) -> None:
        for cluster in range(area << _AREA_BITS, (area + 1) << _AREA_BITS):
            if cluster not in self.known and (found := self._look_up(cluster)) is not None:
                self.known[cluster] = found
