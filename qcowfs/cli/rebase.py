"""`qcowfs rebase IMAGE -b FILE`.

Owns the options. Must not know what is copied.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from qcowfs.cli import key_options, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the overlay")
    parser.add_argument(
        "--backing", "-b", required=True, metavar="FILE",
        help="the new backing file, relative to the overlay's folder; empty for none",
    )  # fmt: skip
    parser.add_argument("--format", "-F", choices=("qcow2", "raw"), help="the new backing file's format")
    parser.add_argument(
        "--unsafe", "-u", action="store_true",
        help="only change the name: right if the new file has the same content, as after moving it",
    )  # fmt: skip
    progress.add_arguments(parser)
    key_options.add_group(parser)


def run(args: argparse.Namespace) -> int:
    """Put the overlay on the new backing file."""
    import trio

    from qcowfs.disk.image import OpenOptions
    from qcowfs.errors import UsageError
    from qcowfs.overlay.rebase import NewBacking, rebase, rebase_unsafely

    if args.backing and args.format is None:
        raise UsageError("declare the new backing file's format: --format qcow2 or --format raw")
    new = NewBacking(os.fsencode(args.backing), args.format)
    if args.unsafe:
        trio.run(rebase_unsafely, args.image, new)
        return 0
    options = OpenOptions(writable=True, keys=key_options.make_keys(args))
    with progress.shown(args.progress, "comparing") as report:
        copied = trio.run(rebase, args.image, new, options, report)
    print(f"{copied} bytes came from the old backing file")
    return 0
