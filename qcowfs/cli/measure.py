"""`qcowfs measure [IMAGE]`.

Owns the arguments of the command and how its figures are shown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.cli import creation_options, source_options
from qcowfs.cli.sizes import disk_size
from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.copying.measure import Measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="the disk that would be converted")
    parser.add_argument("--size", type=disk_size, help="an empty disk of that size, instead of IMAGE")
    parser.add_argument(
        "--target-format", "-O", choices=("raw", "qcow2"), default="raw", help="of the file to be made; raw"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, with the keys of qemu-img measure")
    creation_options.add_fields(parser)
    source_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print how much space the file would take."""
    import trio

    from qcowfs.cli.exits import raise_single

    if (args.image is None) == (args.size is None):
        raise UsageError("give either an IMAGE or a --size")
    if args.target_format == "raw" and args.fields:
        raise UsageError("-o: raw files have no options; add -O qcow2")
    with raise_single():
        measure = trio.run(_measure, args)
    record = measure.record()
    if args.json:
        print(json.dumps(record, indent=4))
    else:
        print(f"required size: {measure.required}\nfully allocated size: {measure.fully_allocated}")
        if measure.bitmaps is not None:
            print(f"bitmaps size: {measure.bitmaps}")
    return 0


async def _measure(args: argparse.Namespace) -> Measure:
    from qcowfs.copying.measure import measure_copy, measure_empty, measure_raw
    from qcowfs.creation.create import round_up_to_sectors
    from qcowfs.disk.disks import open_disk

    form = creation_options.from_fields(args.fields)
    if args.image is None:
        size = round_up_to_sectors(args.size)
        return measure_raw(size) if args.target_format == "raw" else measure_empty(form, size)
    options = source_options.open_options(args)
    async with open_disk(Path(args.image), args.format, options, args.snapshot) as disk:
        options.keys.check_use()
        if args.target_format == "raw":
            return measure_raw(round_up_to_sectors(disk.size))
        return await measure_copy(form, disk)
