"""`qcowfs umount DIR`."""

from __future__ import annotations

import argparse

from qcowfs.cli.image_options import absolute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("mount_point", type=absolute, metavar="DIR", help="where the image is mounted")
    parser.add_argument(
        "--lazy", "-z", action="store_true", help="hide the mount now, end it when nobody uses it any more"
    )


def run(args: argparse.Namespace) -> int:
    """Unmount, and wait until the image is free."""
    from qcowfs.daemon.mountpoint import unmount

    unmount(args.mount_point, lazy=args.lazy)
    return 0
