"""The check of an image from beginning to end.

Owns the order: the header, counts, areas and L1 tables are known before L2 entries are held against them.
Must not know how any of it is judged.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcowfs.check import areas, counts
from qcowfs.check.findings import Report
from qcowfs.check.packed import inflate_all
from qcowfs.check.passes import Passes, Tell
from qcowfs.check.subject import HEADER, Subject, open_subject
from qcowfs.check.trees import Tree, Trees
from qcowfs.check.walk import walk
from qcowfs.host.hostfile import HostFile


async def check(file: HostFile, *, data: bool = False, tell: Tell | None = None) -> Report:
    """Check an image; with `data`, inflate every compressed cluster as well. `tell` hears how far it is.

    Raises `NotQcow2` and `UnsupportedFeature` where nothing can be checked, `CorruptImage` where the
    header cannot be read, `OSError` as the host does.
    """
    return (await inspect_all(file, data=data, tell=tell)).subject.report


@dataclass(frozen=True)
class Inspection:
    """What a check knows in the end: all that was counted, and the trees."""

    subject: Subject
    trees: Trees


async def inspect_all(file: HostFile, *, data: bool = False, tell: Tell | None = None) -> Inspection:
    """As `check`, with all that was counted, for repairs."""
    passes = Passes(tell, 1 + data)
    found = await inspect(file, data=data, passes=passes)
    passes.end()
    return found


async def inspect(file: HostFile, *, data: bool = False, passes: Passes | None = None) -> Inspection:
    """As `inspect_all`, as one of the passes, with `data` as two."""
    subject = await open_subject(file)
    subject.passes = passes or subject.passes
    subject.claim(0, subject.geometry.cluster_size, HEADER, "header")
    await counts.load_counts(subject)
    trees = await find_trees(subject)
    await trees.claim()
    await walk(subject, trees)
    if data:
        await inflate_all(subject, trees)
    counts.compare(subject)
    subject.report.allocation.total = subject.header.virtual_size // subject.geometry.cluster_size
    subject.report.allocation.total += bool(subject.header.virtual_size % subject.geometry.cluster_size)
    return Inspection(subject, trees)


async def find_trees(subject: Subject) -> Trees:
    """The active tree and those of the snapshots, once everything else is claimed."""
    header = subject.header
    await areas.claim_luks(subject)
    await areas.claim_bitmaps(subject)
    trees = [Tree("live disk", header.l1_table_offset, header.l1_size, active=True)]
    trees += [
        Tree(areas.name_of(snapshot), snapshot.l1_table_offset, snapshot.l1_size, record=index)
        for index, snapshot in (await areas.load_snapshots(subject)).items()
    ]
    return Trees(subject, trees)
