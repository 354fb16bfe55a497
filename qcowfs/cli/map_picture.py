"""`qcowfs map IMAGE --picture FILE`.

Owns the choice between a file and the terminal, and the words above the picture.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.cli import progress, source_options
from qcowfs.cli.exits import EXIT_OK
from qcowfs.errors import UsageError
from qcowfs.text import human, printable

if TYPE_CHECKING:
    from qcowfs.disk.disks import Disk
    from qcowfs.picture.drawing import Drawing

TERMINAL = "-"
_TEXT_ROWS = 16
_NARROWEST, _WIDEST, _MARGIN = 20, 160, 12


async def draw(args: argparse.Namespace) -> int:
    """Draw the disk into the file, or on the terminal."""
    from qcowfs.disk.disks import open_disk
    from qcowfs.picture import picture
    from qcowfs.picture.survey import survey

    suffix = Path(args.picture).suffix
    if args.picture != TERMINAL and suffix not in (".svg", ".png"):
        raise UsageError(f"--picture {args.picture}: must end in .svg or .png, or be - for the terminal")
    columns = _text_columns() if args.picture == TERMINAL else picture.COLUMNS
    rows = _TEXT_ROWS if args.picture == TERMINAL else picture.ROWS
    options = source_options.open_options(args)
    async with open_disk(Path(args.image), args.format, options, args.snapshot) as disk:
        options.keys.check_use()
        with progress.shown(args.progress, "looking") as report:
            found = await survey(disk, rows * columns, report)
        caption = picture.Caption(_title(args), _details(disk))
    if args.picture == TERMINAL:
        print("\n".join(picture.draw_text(found, caption, columns, coloured=sys.stdout.isatty())))
    else:
        await _save(picture.draw(found, caption), suffix, args)
    return EXIT_OK


def _text_columns() -> int:
    width = shutil.get_terminal_size().columns - _MARGIN
    return max(_NARROWEST, min(width, _WIDEST))


def _title(args: argparse.Namespace) -> str:
    name = printable(os.fsencode(Path(args.image).name))
    return name if args.snapshot is None else f"{name}, snapshot {printable(os.fsencode(args.snapshot))}"


def _details(disk: Disk) -> str:
    """What the disk is, in one line."""
    if disk.image is None:
        return f"raw, {human(disk.size)}"
    taken, cluster = disk.image.file.facts().allocated, disk.image.geometry.cluster_size
    count = len(disk.image.snapshots)
    snapshots = f"{count or 'no'} snapshot{'' if count == 1 else 's'}"
    return (
        f"qcow2, {human(disk.size)}; the file takes {human(taken)}; clusters of {human(cluster)}; {snapshots}"
    )


async def _save(drawing: Drawing, suffix: str, args: argparse.Namespace) -> None:
    from qcowfs.host.newfile import new_file

    data = drawing.svg() if suffix == ".svg" else drawing.png()
    async with new_file(Path(args.picture), force=args.force) as file:
        await file.write_from([(0, data)])
