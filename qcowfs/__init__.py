"""qcowfs: a qcow2 disk image as raw files, without a virtual machine.

`qcowfs.open` gives a disk as a Python file, `qcowfs.Image` the asynchronous engine for programs
that use trio. `import qcowfs` is light: the engine is loaded when one of its names is first used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
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
_HOMES = {
    "open": "library",
    "DiskFile": "library",
    "DiskExtent": "disk.extents",
    "Image": "disk.image",
    "Keys": "disk.keys",
    "OpenOptions": "disk.image",
    "QcowError": "errors",
    "Snapshot": "format.snapshot_table",
}


def __getattr__(name: str) -> object:
    """The public names, each loaded from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qcowfs' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"qcowfs.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
