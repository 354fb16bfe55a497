"""`qcowfs convert SOURCE TARGET`.

Owns the arguments of the command and the choice of format by the target's name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.cli import creation_options, key_options, progress, source_options
from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.disk.image import OpenOptions

_SUFFIXES = {".qcow2": "qcow2", ".qcow": "qcow2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("source", metavar="SOURCE", help="an image, raw disk or block device")
    parser.add_argument("target", metavar="TARGET", help="the file to be made, or to be written with -n")
    parser.add_argument(
        "--target-format",
        "-O",
        choices=("raw", "qcow2"),
        help="of TARGET; qcow2 for *.qcow2, else raw",
    )
    parser.add_argument("--compress", "-c", action="store_true", help="compress, as compression_type says")
    parser.add_argument(
        "--level",
        type=int,
        metavar="N",
        help="effort of compressing: zlib 1 to 9, zstd 1 to 19",
    )
    parser.add_argument("--threads", "-m", type=int, metavar="N", help="how many work; one a processor")
    parser.add_argument("--force", action="store_true", help="replace a file that has the name")
    parser.add_argument(
        "--no-create",
        "-n",
        action="store_true",
        help="write into TARGET as it is: a block device, or a file of at least the disk's size; "
        "what it holds is lost",
    )
    parser.add_argument(
        "--backing",
        "-B",
        metavar="FILE",
        help="make an overlay on FILE, which holds only what differs from it",
    )
    parser.add_argument(
        "--backing-format", "-F", metavar="FORMAT", help="of FILE: qcow2 or raw; never guessed"
    )
    parser.add_argument("--bitmaps", action="store_true", help="take the image's persistent bitmaps along")
    parser.add_argument(
        "--skip-broken-bitmaps", action="store_true", help="with --bitmaps: leave out those in no order"
    )
    creation_options.add_fields(parser)
    creation_options.add_encryption(parser)
    progress.add_arguments(parser)
    source_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Copy the disk."""
    from qcowfs.host.waiting import run_blocking

    run_blocking(_convert, args, source_options.open_options(args))
    return 0


async def _convert(args: argparse.Namespace, options: OpenOptions) -> None:
    from contextlib import AsyncExitStack

    from qcowfs.copying.convert import Copying, convert
    from qcowfs.disk.disks import open_backing_of, open_disk

    target = Path(args.target)
    form = args.target_format or _SUFFIXES.get(target.suffix, "raw")
    asked = creation_options.encryption_words(args) | creation_options.backing_words(args)
    if form == "raw" and (args.fields or asked):
        named = "-o" if args.fields else "-B" if args.backing else "--encrypt"
        raise UsageError(f"{named}: raw files have no options; add -O qcow2")
    image = creation_options.from_fields(args.fields, **asked) if form == "qcow2" else None
    encrypted = image is not None and image.encryption is not None
    copying = Copying(
        image=image,
        compress=args.compress,
        level=args.level,
        threads=args.threads,
        force=args.force,
        into=args.no_create,
        bitmaps=args.bitmaps,
        skip_broken_bitmaps=args.skip_broken_bitmaps,
        passphrase=key_options.new_passphrase(options.keys, args.target) if encrypted else None,
    )
    if not encrypted:
        options.keys.note(args.target, encrypted=False)
    async with AsyncExitStack() as stack:
        opened = open_disk(Path(args.source), args.format, options, args.snapshot)
        disk, backing = await stack.enter_async_context(opened), None
        if image is not None and image.backing_file is not None:
            name, kind = image.backing_file, image.backing_format or ""
            backing = await stack.enter_async_context(open_backing_of(target, name, kind, options))
        options.keys.check_use()
        with progress.shown(args.progress, "copying") as report:
            await convert(disk, target, copying, report, backing)
