"""The calling convention of mount helpers: `IMAGE DIR [-sfnv] [-t TYPE] [-o OPTIONS]`.

Owns what mount(8), mount.fuse3 and fstab hand over. Must not know what the options mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def mount_command(argv: Sequence[str]) -> list[str]:
    """The words of `qcowfs mount` that do what a mount helper was asked."""
    parser = argparse.ArgumentParser(prog="mount.qcowfs", allow_abbrev=False)
    parser.add_argument("image")
    parser.add_argument("mount_point")
    parser.add_argument("-o", dest="words", action="append", default=[])
    parser.add_argument("-t", dest="type", help=argparse.SUPPRESS)
    for flag in ("-s", "-n", "-v", "-f"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    options = [word for words in args.words for word in ("-o", words)]
    dry = ["--dry-run"] if args.f else []
    return ["mount", *options, *dry, "--", args.image, args.mount_point]
