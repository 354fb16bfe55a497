"""The verifier and repairer: counts every reference to every host cluster, compares, and mends.

Owns the verdict on an image and what is changed to mend it. Must not know the allocator, the caches, the
mapping or anyone who writes images otherwise, so that a fault of theirs cannot hide in it: tables are read
straight from the host file, as numpy arrays, by `format` alone.
"""

from __future__ import annotations

from qcowfs.check.checker import check
from qcowfs.check.findings import Finding, Kind, Report

__all__ = ["Finding", "Kind", "Report", "check"]
