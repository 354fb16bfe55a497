"""Clusters that may be read or overwritten past the engine, for the length of one step of the event loop.

Owns what is told about them. Must not know who uses it.
"""

from __future__ import annotations

from typing import NamedTuple

from qcowfs.geometry import HostOffset


class InPlace(NamedTuple):
    """Where known clusters lie, as of now; every await may change it.

    `places` is the engine's own dictionary, by the cluster's index on the disk, and forgets a place as
    soon as its entry changes. `size` is the disk's, in bytes.
    """

    places: dict[int, HostOffset]
    cluster_bits: int
    descriptor: int
    size: int
