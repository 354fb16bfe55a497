"""The FUSE side: inode tree, request handlers, session and mount life cycle.

Must not know the qcow2 format: everything below goes through `Image` and its views. Importing the package
loads no FUSE; `operations` and `session` do, and `shim` has to come before them.
"""

from qcowfs.daemon import shim as _shim  # noqa: F401 - before anything can load pyfuse3
