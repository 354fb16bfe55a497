"""Options that every command which opens an image shares.

Owns their names, units and texts. Must not know how an image is opened. Words only; heavy imports wait.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.cli import key_options
from qcowfs.cli.sizes import disk_size
from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.disk.image import OpenOptions


def absolute(text: str) -> Path:
    """A path that stays right when the daemon leaves the folder it was started in."""
    return Path(text).absolute()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command's parser."""
    group = parser.add_argument_group("opening the image")
    group.add_argument(
        "--data-file", type=absolute, metavar="PATH",
        help="the external data file, if the image has one; the name in the image is never followed",
    )  # fmt: skip
    group.add_argument("--no-backing", action="store_true", help="refuse images that have a backing file")
    group.add_argument(
        "--probe-backing", action="store_true",
        help="find out the format of a backing file that the image does not declare; "
        "unsafe where a guest wrote that file",
    )  # fmt: skip
    group.add_argument(
        "--force-share", "-U", action="store_true",
        help="read beside a program that writes the image; what is read may be inconsistent",
    )  # fmt: skip
    group.add_argument(
        "--lost-data", choices=("error", "zeros"), default="error",
        help="how lost data reads: as an error (the default), or for rescue work as zeros",
    )  # fmt: skip
    key_options.add_arguments(group)
    group.add_argument(
        "--table-cache", type=disk_size, metavar="SIZE",
        help="memory for metadata tables, over all images of the chain (default 32M)",
    )  # fmt: skip


def open_options(args: argparse.Namespace) -> OpenOptions:
    """What the options mean for opening."""
    from qcowfs.data.backing import BackingPolicy
    from qcowfs.disk.image import OpenOptions
    from qcowfs.metadata.cache import DEFAULT_CACHE_BYTES

    return OpenOptions(
        backing=BackingPolicy(refuse_all=args.no_backing, probe=args.probe_backing),
        data_file=args.data_file,
        lost_data_as_zeros=args.lost_data == "zeros",
        force_share=args.force_share,
        writable=_writable(args),
        table_cache=args.table_cache or DEFAULT_CACHE_BYTES,
        keys=key_options.make_keys(args),
    )


def _writable(args: argparse.Namespace) -> bool:
    if args.read_only or args.force_share:
        return False
    if args.lost_data == "zeros":
        raise UsageError("--lost-data=zeros would write zeros over lost data; add --read-only")
    return True
