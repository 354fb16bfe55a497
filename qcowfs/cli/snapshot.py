"""`qcowfs snapshot list|create|delete|rename|revert TARGET ...`, on an image or on a mount of one.

Owns the words and what is printed. Must not know how a snapshot is made.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from qcowfs.cli import key_options
from qcowfs.cli.image_options import absolute

if TYPE_CHECKING:
    from pathlib import Path

    from qcowfs.disk.image import Image

ACTIONS = {
    "list": "show the snapshots",
    "create": "take a snapshot of the live disk",
    "delete": "drop a snapshot and free what only it held",
    "rename": "give a snapshot another name",
    "revert": "set the live disk to a snapshot; what was written since is lost",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    for name, summary in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.add_argument(
            "target",
            type=absolute,
            metavar="TARGET",
            help="an image, mounted or not, or the folder of a mount",
        )
        if name == "create":
            action.add_argument("name", metavar="NAME", help="any name, also one that is taken")
        elif name != "list":
            action.add_argument("snapshot", metavar="SNAPSHOT", help="its id, else its name")
        if name == "rename":
            action.add_argument("name", metavar="NAME", help="the new name")
        if name == "revert":
            action.add_argument(
                "--force", action="store_true", help="even while the disk is open for writing"
            )
        if name == "list":
            action.add_argument("--json", action="store_true", help="as JSON, with the keys of qemu-img info")
        else:
            key_options.add_group(action)


def run(args: argparse.Namespace) -> int:
    """Do one action, through the mount if the image is mounted."""
    from qcowfs.daemon.mounts import mount_of
    from qcowfs.daemon.orders import send

    mount_point = mount_of(args.target)
    if args.action == "list":
        _print(_listed(args, mount_point), as_json=args.json)
    elif mount_point is not None:
        send(mount_point, _order(args))
    else:
        import trio

        trio.run(_on_image, args)
    return 0


def _listed(args: argparse.Namespace, mount_point: Path | None) -> list[dict[str, Any]]:
    """What the mount lists; a read-only one takes no orders, and its image tells as much."""
    import trio

    from qcowfs.daemon.mounts import image_of
    from qcowfs.daemon.orders import send
    from qcowfs.errors import ReadOnlyError

    if mount_point is None:
        return trio.run(_list_image, args)
    try:
        found: list[dict[str, Any]] = send(mount_point, _order(args))
    except ReadOnlyError:
        args.target = image_of(mount_point)
        return trio.run(_list_image, args)
    return found


def _order(args: argparse.Namespace) -> dict[str, Any]:
    words = {key: getattr(args, key) for key in ("snapshot", "name", "force") if hasattr(args, key)}
    return {"do": args.action, **words}


async def _list_image(args: argparse.Namespace) -> list[dict[str, Any]]:
    from qcowfs.cli.exits import complain
    from qcowfs.disk.info import read_info

    found: list[dict[str, Any]] = (await read_info(args.target, str(args.target), complain)).get(
        "snapshots", []
    )
    return found


async def _on_image(args: argparse.Namespace) -> None:
    from qcowfs.disk.image import Image, OpenOptions

    keys = key_options.make_keys(args)
    image = await Image.open(args.target, OpenOptions(writable=True, keys=keys))
    try:
        keys.check_use()
        await _change(image, args)
    finally:
        await image.aclose()


async def _change(image: Image, args: argparse.Namespace) -> None:
    from qcowfs.disk import states
    from qcowfs.metadata.snapshots import find_snapshot

    if args.action == "create":
        await states.create_snapshot(image, os.fsencode(args.name))
        return
    snapshot = find_snapshot(image.snapshots, args.snapshot)
    if args.action == "rename":
        await states.rename_snapshot(image, snapshot, os.fsencode(args.name))
    elif args.action == "delete":
        await states.delete_snapshot(image, snapshot)
    else:
        await states.revert(image, snapshot)


def _print(records: list[dict[str, Any]], *, as_json: bool) -> None:
    from qcowfs.cli import info

    if as_json:
        print(json.dumps(info.encodable(records), indent=4))
    elif records:
        print("\n".join(info.snapshot_lines(records)))
