"""`qcowfs resize TARGET [+-]SIZE [--shrink]`, on an image or on a mount of one."""

from __future__ import annotations

import argparse

from qcowfs.cli import key_options
from qcowfs.cli.image_options import absolute
from qcowfs.cli.sizes import disk_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "target", type=absolute, metavar="TARGET", help="an image, mounted or not, or a mount's folder"
    )
    parser.add_argument(
        "size", type=_change_of_size, metavar="[+-]SIZE",
        help="the new size, such as 20G, or by how much to grow (+) or shrink (-); before -SIZE put --",
    )  # fmt: skip
    parser.add_argument(
        "--shrink", action="store_true", help="permit a smaller size; what lies beyond is lost"
    )
    key_options.add_group(parser)


def _change_of_size(text: str) -> tuple[int, bool]:
    """(bytes, whether they are added to the present size)."""
    sign = {"+": 1, "-": -1}.get(text[:1])
    return (disk_size(text), False) if sign is None else (sign * disk_size(text[1:]), True)


def run(args: argparse.Namespace) -> int:
    """Resize, through the mount if the image is mounted."""
    from qcowfs.daemon.mounts import mount_of
    from qcowfs.daemon.orders import send

    amount, relative = args.size
    mount_point = mount_of(args.target)
    if mount_point is not None:
        send(mount_point, {"do": "resize", "size": amount, "relative": relative, "shrink": args.shrink})
    else:
        import trio

        trio.run(_on_image, args)
    return 0


async def _on_image(args: argparse.Namespace) -> None:
    from qcowfs.disk import states
    from qcowfs.disk.image import Image, OpenOptions

    amount, relative = args.size
    keys = key_options.make_keys(args)
    image = await Image.open(args.target, OpenOptions(writable=True, keys=keys))
    try:
        keys.check_use()
        await states.resize(image, image.active.size + amount if relative else amount, shrink=args.shrink)
    finally:
        await image.aclose()
