"""Options of commands that read a disk of any kind: raw, a qcow2 image's live disk, one of its snapshots.

Owns their names. Must not know how a disk is opened.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcowfs.cli import image_options

if TYPE_CHECKING:
    from qcowfs.disk.image import OpenOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command's parser."""
    parser.add_argument(
        "--format", "-f", choices=("qcow2", "raw"),
        help="what IMAGE is; found out by its first bytes, which is unsafe where a guest wrote a raw disk",
    )  # fmt: skip
    parser.add_argument("--snapshot", "-l", metavar="NAME", help="read a snapshot, by its id or name")
    image_options.add_arguments(parser)


def open_options(args: argparse.Namespace) -> OpenOptions:
    """What the options mean for opening."""
    args.read_only = True
    return image_options.open_options(args)
