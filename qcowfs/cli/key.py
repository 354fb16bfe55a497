"""`qcowfs key list|add|remove IMAGE`.

Owns the words of the command. Must not know how key slots are changed.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.cli import key_options
from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.format.luks import KeySlot

ACTIONS = ("list", "add", "remove")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("action", choices=ACTIONS, help="list key slots, add a key, or remove one")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image encrypted by LUKS")
    key_options.add_arguments(parser.add_argument_group("the present passphrase"))
    parser.add_argument("--new-key-file", type=Path, metavar="FILE", help="the passphrase to add")
    parser.add_argument("--slot", type=int, metavar="N", help="the key slot to fill or to empty (0 to 7)")
    parser.add_argument(
        "--iter-time", type=int, default=2000, metavar="MS",
        help="how long opening the new key slot takes, in milliseconds (default 2000)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="list as JSON")


def run(args: argparse.Namespace) -> int:
    """List or change the key slots."""
    import trio

    from qcowfs.disk import key_slots

    if args.action == "list":
        _show(trio.run(key_slots.read_slots, args.image), as_json=args.json)
        return 0
    keys = key_options.make_keys(args)
    if args.action == "remove":
        number = trio.run(key_slots.remove_key, args.image, keys, args.slot)
        print(f"key slot {number} is empty")
        return 0
    seconds = args.iter_time / 1000
    add = partial(key_slots.add_key, iter_time=seconds, slot=args.slot)
    number = trio.run(add, args.image, keys, _new_passphrase(args))
    print(f"key slot {number} has the new key")
    return 0


def _new_passphrase(args: argparse.Namespace) -> bytes:
    from qcowfs.disk.keys import read_key

    if args.new_key_file is not None:
        return read_key(args.new_key_file)
    typed = key_options.ask_twice("the new key slot")
    if typed is None:
        raise UsageError("give the passphrase to add by --new-key-file FILE")
    return typed


def _show(slots: tuple[KeySlot, ...], *, as_json: bool) -> None:
    if as_json:
        record = [
            {"slot": n, "active": slot.active, **({"iters": slot.iterations} if slot.active else {})}
            for n, slot in enumerate(slots)
        ]
        print(json.dumps(record, indent=4))
        return
    for number, slot in enumerate(slots):
        print(f"{number}: {_state(slot)}")


def _state(slot: KeySlot) -> str:
    if slot.active and not slot.opens:
        return "its removal was cut short; remove it again"
    return f"in use, {slot.iterations} iterations" if slot.active else "empty"
