"""What a writable live disk is made of, and how it shall treat zeros.

Only names: opening an image to read it takes none of what writes, which it need not even load.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcowfs.data.guest_data import DataPort
    from qcowfs.data.views import ImageView
    from qcowfs.format.header import Header
    from qcowfs.format.snapshot_table import Snapshot
    from qcowfs.host.hostfile import HostFile
    from qcowfs.metadata.cache import SliceStore, TableCache
    from qcowfs.metadata.epochs import ReadEpochs


class DetectZeroes(Enum):
    """What becomes of a write of zeros: data like any other, zero clusters, or clusters given back."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@dataclass(frozen=True)
class Parts:
    """What writing needs of an open image."""

    label: str
    header: Header
    file: HostFile
    data_file: HostFile
    data: DataPort
    snapshots: list[Snapshot]
    view: ImageView
    l1_tables: TableCache
    l2_tables: TableCache
    slices: SliceStore
    epochs: ReadEpochs
    has_backing: bool
    detect_zeroes: DetectZeroes
