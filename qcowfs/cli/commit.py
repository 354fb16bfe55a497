"""`qcowfs commit IMAGE`.

Owns the options. Must not know what is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qcowfs.cli import key_options, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the overlay")
    parser.add_argument(
        "--base", "-b", type=Path, metavar="BASE",
        help="the image of the backing chain to commit to, with all that lies between; what lies between may "
        "read wrongly afterwards, and the overlay keeps its content",
    )  # fmt: skip
    parser.add_argument("--data-file", type=Path, metavar="PATH", help="the overlay's external data file")
    parser.add_argument("--keep", "-d", action="store_true", help="do not empty the overlay afterwards")
    parser.add_argument(
        "--unsafe", action="store_true",
        help="commit although the overlay has snapshots, which change where they read through the base",
    )  # fmt: skip
    progress.add_arguments(parser)
    key_options.add_group(parser)


def run(args: argparse.Namespace) -> int:
    """Write the overlay's content to its backing file."""
    import trio

    from qcowfs.disk.image import OpenOptions
    from qcowfs.overlay.commit import Committing, commit

    options = OpenOptions(keys=key_options.make_keys(args), data_file=args.data_file)
    wanted = Committing(args.base, args.keep, args.unsafe)
    with progress.shown(args.progress, "committing") as report:
        written = trio.run(commit, args.image, options, wanted, report)
    print(f"{written} bytes were committed")
    return 0
