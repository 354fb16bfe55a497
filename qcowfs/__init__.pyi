from qcowfs.disk.extents import DiskExtent as DiskExtent
from qcowfs.disk.image import Image as Image
from qcowfs.disk.image import OpenOptions as OpenOptions
from qcowfs.disk.keys import Keys as Keys
from qcowfs.errors import QcowError as QcowError
from qcowfs.format.snapshot_table import Snapshot as Snapshot
from qcowfs.library import DiskFile as DiskFile
from qcowfs.library import open as open  # noqa: A004 - called as `qcowfs.open`

__version__: str
__all__ = [
    "DiskExtent",
    "DiskFile",
    "Image",
    "Keys",
    "OpenOptions",
    "QcowError",
    "Snapshot",
    "__version__",
    "open",
]
