"""`qcowfs bitmap list IMAGE`.

Owns how bitmaps are shown. Must not know how they are read.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from qcowfs.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("action", choices=("list",), help="what to do")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the qcow2 image")
    parser.add_argument("--json", action="store_true", help="as JSON, with the keys of qemu-img info")


def run(args: argparse.Namespace) -> int:
    """List the bitmaps."""
    import trio

    from qcowfs.cli.exits import complain
    from qcowfs.disk.info import read_bitmaps

    found = trio.run(read_bitmaps, args.image, printable(os.fsencode(args.image)), complain)
    if args.json:
        shown = [one | {"name": printable(os.fsencode(one["name"]))} for one in found]
        print(json.dumps(shown, indent=4))
        return 0
    for one in found:
        dirty = one["dirty-bytes"]
        told = "cannot be trusted" if dirty is None else f"{dirty} bytes are dirty"
        flags = ",".join(one["flags"]) or "disabled"
        name = printable(os.fsencode(one["name"]))
        print(f"{name}: granularity {one['granularity']}, {flags}, {told}")
    return 0
