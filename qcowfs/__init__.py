"""qcowfs: a qcow2 disk image as raw files, without a virtual machine.

`import qcowfs` is light: neither FUSE nor numpy is loaded.
"""

__version__ = "0.1.0"
