"""The image under check: its header read leniently, and what is known of each host cluster.

Owns counting references and noting which cluster holds which metadata. Memory is bounded by the size of the
file: what points beyond is a finding, never an index. Must not know how tables are walked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from qcowfs.check.arrays import I64, Counts, load_bytes
from qcowfs.check.findings import Finding, Kind, Report
from qcowfs.check.passes import Passes
from qcowfs.check.tally import Tally
from qcowfs.errors import CorruptImage
from qcowfs.format.features import refuse_unknown
from qcowfs.format.header import Header
from qcowfs.geometry import MAX_CLUSTER_BITS
from qcowfs.host.hostfile import HostFile

UNCLAIMED = 0
AREAS = (
    "nothing", "the header", "the refcount table", "a refcount block", "an L1 table", "an L2 table",
    "the snapshot table", "the LUKS header", "the bitmap directory", "a bitmap's table", "a bitmap",
)  # fmt: skip
HEADER, REFCOUNT_TABLE, REFCOUNT_BLOCK, L1_TABLE, L2_TABLE, SNAPSHOT_TABLE, LUKS, DIRECTORY, TABLE, BITMAP = (
    range(1, len(AREAS))
)
"""What a claimed host cluster holds, as an index of `AREAS`."""

NOBODY = 1 << 64
ALL_SNAPSHOTS = "all snapshots"
_TABLE_FIELD, _TABLE_FIELD_END = 48, 60
_SNAPSHOT_FIELD, _SNAPSHOT_FIELD_END = 60, 72


@dataclass
class Subject:
    """One image: `clusters` host clusters lie in the file, the last perhaps not wholly.

    `references` counts who refers to each of them, `owners` tells which metadata it holds, `stored` holds the
    image's own counts; one more cluster is there, since compressed data may be counted into it.
    `block_offsets` has the place of each refcount block that can be believed, else 0, and `far_counts` the
    blocks, by index, that count clusters beyond `stored`. `is_table_sound` and `broken_blocks` tell
    whether the refcount table and its entries can be believed, `broken_snapshots` which records of the
    snapshot table, by index, name no L1 table of their own. `first_gone` is the lowest cluster past the end
    of the file whose bytes somebody misses, if anybody does. `passes` is told how far the walks are.
    """

    file: HostFile
    header: Header
    report: Report
    clusters: int
    owners: npt.NDArray[np.uint8] = field(init=False)
    block_offsets: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    far_counts: list[int] = field(default_factory=list)
    is_table_sound: bool = True
    broken_blocks: int = 0
    are_bitmaps_broken: bool = False
    broken_snapshots: set[int] = field(default_factory=set)
    is_snapshot_table_broken: bool = False
    first_gone: int = NOBODY
    who_is_gone: str = ""
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        """Make the arrays; memory is taken only where something is noted."""
        self.geometry = self.header.geometry
        self.bits = self.geometry.cluster_bits
        self.refcount_bits = 1 << self.header.refcount_order
        self.block_entries = self.geometry.cluster_size * 8 // self.refcount_bits
        whole_blocks = -(-(self.clusters + 1) // self.block_entries)
        self._references = Tally(self.clusters + 1)
        self.owners = np.zeros(self.clusters + 1, np.uint8)
        self._stored = Tally(whole_blocks * self.block_entries)

    @property
    def references(self) -> Counts:
        """How many references to each cluster were found so far."""
        return self._references.values

    @property
    def stored(self) -> Counts:
        """The image's own counts."""
        return self._stored.values

    def is_past_end(self, offset: int, size: int) -> bool:
        """Whether some of the range lies in clusters wholly beyond the end of the file."""
        return -(-(offset + size) // self.geometry.cluster_size) > self.clusters

    def error(self, rule: str, owner: str = "", whole: str = "", **places: int) -> None:
        """Note an error."""
        self.report.add(Finding(Kind.ERROR, rule, owner, whole=whole, **places))

    def hide(
        self, rule: str, owner: str = "", kind: Kind = Kind.LOST, whole: str = "", **places: int
    ) -> None:
        """Note that a table cannot be read, so that what it refers to is not known."""
        self.report.hidden = True
        self.report.add(Finding(kind, rule, owner, whole=whole, **places))

    def note_gone(self, cluster: int, who: str) -> None:
        """Note who misses a cluster past the end of the file; the lowest of them counts."""
        if cluster < self.first_gone:
            self.first_gone, self.who_is_gone = cluster, f"{who}, host offset {cluster << self.bits:#x}"

    def claim(
        self, offset: int, size: int, area: int, owner: str, kind: Kind = Kind.LOST, *, whole: str = ""
    ) -> bool:
        """Count a reference to a range of metadata; whether the range is sound.

        It is not if it lies past the end of the file or is not aligned; where it overlaps other metadata,
        that is an error, and it is counted all the same.
        """
        if not size:
            return True
        if not self.geometry.is_cluster_aligned(offset):
            self.hide("the offset is not cluster aligned", owner, kind, whole, host=offset)
            return False
        if self.is_past_end(offset, size):
            self.hide("lies past the end of the file", owner, kind, whole, host=offset)
            if area != REFCOUNT_TABLE:  # a new one takes its place
                self.note_gone(max(self.clusters, offset >> self.bits), owner)
            return False
        first, last = offset >> self.bits, (offset + size - 1) >> self.bits
        part = self.owners[first : last + 1]
        taken = np.flatnonzero(part)
        if len(taken):
            where = (first + int(taken[0])) << self.bits
            self.report.hidden = True  # one of both was overwritten, and what it named with it
            self.error(f"overlaps {AREAS[part[taken[0]]]}", owner, whole, host=where)
        part[part == UNCLAIMED] = area
        self._references.add_run(first, last + 1)
        return not len(taken)

    def refer(self, clusters: I64, weight: int = 1) -> None:
        """Count references to clusters that lie in the file."""
        self._references.add(clusters, weight)

    def refer_to_run(self, first: int, end: int, weight: int = 1) -> None:
        """Count references to clusters in a row that lie in the file."""
        self._references.add_run(first, end, weight)

    def store_counts(self, block: int, counts: Counts) -> None:
        """Note the image's own counts of the clusters that a refcount block is for."""
        self._stored.put(block, counts)


async def open_subject(file: HostFile) -> Subject:
    """Read the header; a refcount or snapshot table that it describes wrongly is a finding.

    Raises `NotQcow2`, `UnsupportedFeature`, `CorruptImage` where nothing can be checked.
    """
    size = file.facts().size
    start = await load_bytes(file, 0, min(size, 1 << MAX_CLUSTER_BITS))
    report = Report()
    header, table_is_sound = _lenient(start, report)
    refuse_unknown(header.incompatible, header.feature_names)
    clusters = -(-size // header.geometry.cluster_size)
    subject = Subject(file, header, report, clusters)
    subject.is_table_sound = table_is_sound
    subject.is_snapshot_table_broken = report.hidden
    return subject


def _lenient(start: bytes, report: Report) -> tuple[Header, bool]:
    """The header, without the tables whose fields break a rule; whether the refcount table is there."""
    try:
        return Header.unpack(start), True
    except CorruptImage as error:
        first_error = error
    for without_table, without_snapshots in ((True, False), (False, True), (True, True)):
        patched = bytearray(start)
        if without_table:
            patched[_TABLE_FIELD:_TABLE_FIELD_END] = bytes(8) + (1).to_bytes(4, "big")
        if without_snapshots:
            patched[_SNAPSHOT_FIELD:_SNAPSHOT_FIELD_END] = bytes(12)
        header = _try(lambda data=bytes(patched): Header.unpack(data))  # type: ignore[misc]  # its own bytes
        if header is not None:
            report.hidden |= without_snapshots
            kind = Kind.LOST if without_snapshots else Kind.ERROR
            whole = ALL_SNAPSHOTS if without_snapshots else ""
            report.add(Finding(kind, str(first_error), whole=whole))
            if without_table:
                header = replace(header, refcount_table_clusters=0)
            return header, not without_table
    raise first_error


def _try(unpack: Callable[[], Header]) -> Header | None:
    try:
        return unpack()
    except CorruptImage:
        return None
