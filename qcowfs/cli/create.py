"""`qcowfs create IMAGE [SIZE]`.

Owns the arguments of the command and what it says when it is done.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.cli import creation_options, key_options, progress
from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.creation.form import Creation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", help="the qcow2 image to be made")
    parser.add_argument(
        "size", nargs="?", metavar="SIZE", help="of the disk, such as 20G; that of the backing file"
    )
    creation_options.add_arguments(parser)
    creation_options.add_encryption(parser)
    key_options.add_group(parser)
    progress.add_arguments(parser)
    parser.add_argument(
        "--unsafe", "-u", action="store_true", help="do not look whether the backing file can be opened"
    )
    parser.add_argument("--force", action="store_true", help="replace an image that has the name")
    parser.add_argument("--quiet", "-q", action="store_true", help="say nothing when it is done")


def run(args: argparse.Namespace) -> int:
    """Make the image."""
    import trio

    from qcowfs.cli.exits import raise_single

    form = creation_options.creation(args)
    with raise_single():
        size = trio.run(_create, Path(args.image), form, _size(args.size, form), args)
    if not args.quiet:
        print(f"{args.image}: made a disk of {size} bytes, in clusters of {form.cluster_size}")
    return 0


def _size(text: str | None, form: Creation) -> int | None:
    from qcowfs.creation.form import parse_size

    size = form.size if text is None else parse_size(text)
    if form.size not in (None, size):
        raise UsageError(f"the size is given twice, as {size} and as {form.size} bytes")
    return size


async def _create(path: Path, form: Creation, size: int | None, args: argparse.Namespace) -> int:
    """Make the image while its backing file is open; returns the size of the disk."""
    from contextlib import AsyncExitStack

    from qcowfs.creation.create import create_image, round_up_to_sectors
    from qcowfs.disk.disks import open_backing_of
    from qcowfs.disk.image import OpenOptions

    keys = key_options.make_keys(args)

    async with AsyncExitStack() as stack:
        if form.backing_file is not None and not args.unsafe:
            name, kind = form.backing_file, form.backing_format or ""
            backing = await stack.enter_async_context(
                open_backing_of(path, name, kind, OpenOptions(keys=keys))
            )
            size = backing.size if size is None else size
        if size is None:
            raise UsageError("which size shall the disk have? Give one, such as 20G")
        size = round_up_to_sectors(size)
        passphrase = None
        if form.encryption is not None:
            passphrase = key_options.new_passphrase(keys, args.image)
        else:
            keys.note(args.image, encrypted=False)
        keys.check_use()
        with progress.shown(args.progress, "writing zeros") as report:
            await create_image(path, form, size, force=args.force, report=report, passphrase=passphrase)
    return size
