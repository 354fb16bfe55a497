"""`qcowfs mount IMAGE DIR`.

Owns the options of a mount and the choice between foreground and background.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from qcowfs.cli import image_options
from qcowfs.cli.image_options import absolute
from qcowfs.cli.sizes import disk_size
from qcowfs.errors import MountError
from qcowfs.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", type=absolute, metavar="IMAGE", help="the qcow2 image")
    parser.add_argument("mount_point", type=absolute, metavar="DIR", help="an existing folder")
    parser.add_argument(
        "--foreground", "-f", action="store_true", help="stay in the foreground, log to standard error"
    )
    parser.add_argument("--dry-run", action="store_true", help="do everything but mount")
    parser.add_argument("--read-only", "-r", action="store_true", help="never write to the image")
    parser.add_argument(
        "-o", metavar="OPTION[,OPTION...]",
        help="options as mount(8) gives them; any long option of this command also works here",
    )  # fmt: skip
    parser.add_argument(
        "--detect-zeroes", choices=("off", "on", "unmap"), default="off",
        help="what becomes of writes of zeros: data (the default), zero clusters, or clusters given back",
    )  # fmt: skip
    image_options.add_arguments(parser)
    _add_showing(parser.add_argument_group("showing the files"))
    log = parser.add_argument_group("logging")
    log.add_argument("--log-file", type=absolute, metavar="FILE", help="append the log to a file")
    log.add_argument("--debug", action="store_true", help="log more than anyone wants to read")


def _number_of_owner(word: str) -> int:
    """A user or group as a number; the largest means none."""
    number = int(word)
    if not 0 <= number < (1 << 32) - 1:
        raise argparse.ArgumentTypeError(f"{number} is outside 0..{(1 << 32) - 2}")
    return number


def _add_showing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--allow-other", action="store_true", help="let other users in, as --mode says")
    for name, own, whose in (("--uid", os.getuid(), "owner"), ("--gid", os.getgid(), "group")):
        words = f"{whose} of the files (default: {'you' if whose == 'owner' else 'yours'})"
        group.add_argument(name, type=_number_of_owner, default=own, help=words)
    group.add_argument(
        "--mode", type=_mode, default=0o600, help="permission bits of the files in octal (default 600)"
    )
    group.add_argument(
        "--read-ahead", type=disk_size, default=4 << 20, metavar="SIZE",
        help="how far the kernel reads ahead (default 4M; only root may raise it over 128K)",
    )  # fmt: skip


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is no octal mode between 000 and 777")
    return mode & 0o666


def run(args: argparse.Namespace) -> int:
    """Mount; in the foreground until the mount ends, else until it is live."""
    if args.foreground or args.dry_run:
        return _serve(args, lambda text: print(text, flush=True))
    from qcowfs.daemon.background import run_in_background

    return run_in_background(lambda ready: _serve_guarded(args, ready))


def _serve_guarded(args: argparse.Namespace, ready: Callable[[str], None]) -> int:
    from qcowfs.cli.exits import guarded

    return guarded(lambda: _serve(args, ready))


def _serve(args: argparse.Namespace, ready: Callable[[str], None]) -> int:
    from dataclasses import replace
    from functools import partial

    import trio

    from qcowfs.cli import logs
    from qcowfs.cli.exits import raise_single
    from qcowfs.disk.parts import DetectZeroes

    try:
        from qcowfs.daemon.operations import Ownership
        from qcowfs.daemon.session import MountOptions, rehearse, serve
    except ModuleNotFoundError as error:
        raise MountError(
            f"mounting needs {error.name}, which is missing; install it with pip install 'qcowfs[mount]'"
        ) from None
    logs.configure(debug=args.debug, log_file=args.log_file, background=not args.foreground)
    options = MountOptions(
        ownership=Ownership(args.uid, args.gid, args.mode),
        allow_other=args.allow_other,
        read_ahead=args.read_ahead,
        open=replace(image_options.open_options(args), detect_zeroes=DetectZeroes(args.detect_zeroes)),
    )
    image, mount_point = args.image, Path(args.mount_point)
    if args.dry_run:
        with raise_single():
            trio.run(rehearse, image, mount_point, options)
        return 0
    names = (printable(os.fsencode(path)) for path in (image, mount_point))
    text = f"{' is mounted on '.join(names)} (pid {os.getpid()})"
    with raise_single():
        trio.run(partial(serve, image, mount_point, options, lambda: ready(text)))
    return 0
