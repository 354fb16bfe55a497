"""`qcowfs map IMAGE [--json]`.

Owns how extents are shown as a table. Must not know how they are found.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.cli import progress, source_options
from qcowfs.cli.exits import EXIT_CODES, EXIT_OK, complain
from qcowfs.cli.map_picture import draw
from qcowfs.cli.sizes import disk_size
from qcowfs.errors import CorruptImage

if TYPE_CHECKING:
    from qcowfs.disk.extents import DiskExtent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", help="the image or raw disk")
    parser.add_argument("--json", action="store_true", help="as JSON, with the keys of qemu-img map")
    parser.add_argument(
        "--start-offset", "-s", type=disk_size, default=0, metavar="OFFSET", help="where on the disk to begin"
    )
    parser.add_argument(
        "--max-length", type=disk_size, metavar="LENGTH", help="how much of the disk to tell about"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw it into FILE.svg or FILE.png, or with - on the terminal"
    )
    parser.add_argument("--force", action="store_true", help="replace a picture that has the name")
    progress.add_arguments(parser)
    source_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print where the disk's bytes lie."""
    import trio

    from qcowfs.cli.exits import raise_single

    with raise_single():
        return trio.run(_show if args.picture is None else draw, args)


async def _show(args: argparse.Namespace) -> int:
    from qcowfs.disk.disks import open_disk
    from qcowfs.disk.extents import disk_extents

    shown = _as_json if args.json else _as_line
    end = None if args.max_length is None else args.start_offset + args.max_length
    damaged = 0
    options = source_options.open_options(args)
    async with open_disk(Path(args.image), args.format, options, args.snapshot) as disk:
        options.keys.check_use()
        print("[" if args.json else _LINE.format("START", "LENGTH", "DEPTH", "WHAT", "HOST OFFSET"), end="")
        first = True
        with progress.shown(_progress(args), "looking") as report:
            async for extent in disk_extents(disk, args.start_offset, end, report=report):
                print(shown(extent, first=first), end="")
                first = False
                damaged += bool(extent.damage)
        print("]" if args.json else "")
    if damaged:
        complain(f"{disk.label}: {damaged} extents are damaged; qcowfs check tells more")
    return EXIT_CODES[CorruptImage] if damaged else EXIT_OK


def _progress(args: argparse.Namespace) -> str:
    """No bar on the terminal that the lines go to: they tell as much."""
    kind: str = args.progress
    return "none" if kind == "auto" and sys.stdout.isatty() else kind


_LINE = "{:>18} {:>16} {:>5}  {:<12} {}"


def _as_json(extent: DiskExtent, *, first: bool) -> str:
    return ("" if first else ",\n") + json.dumps(extent.record())


def _as_line(extent: DiskExtent, *, first: bool) -> str:
    del first
    where = "-" if extent.offset is None else f"{extent.offset:#x}"
    start, length = f"{extent.start:#x}", f"{extent.length:#x}"
    return "\n" + _LINE.format(start, length, extent.depth, kind_of(extent), where)


def kind_of(extent: DiskExtent) -> str:
    """What an extent is, in one word."""
    if extent.damage:
        return "damaged"
    if not extent.present:
        return "unallocated"
    if extent.compressed:
        return "compressed"
    return "data" if extent.data and not extent.zero else "zero"
