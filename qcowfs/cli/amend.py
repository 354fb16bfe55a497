"""`qcowfs amend IMAGE -o OPTION=VALUE[,...]`.

Owns the options' names, which are those of qemu-img amend. Must not know what a change takes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qcowfs.cli import progress
from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.disk.amend import Amendments

OPTIONS = ("compat", "lazy_refcounts", "refcount_bits", "backing_file", "backing_fmt")
_VERSIONS = {"v2": 2, "0.10": 2, "v3": 3, "1.1": 3}
T = TypeVar("T")
_SWITCHES = {"on": True, "off": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the qcow2 image, which must be sound")
    parser.add_argument(
        "-o", action="append", required=True, metavar="OPTION=VALUE[,...]", dest="options",
        help=f"what to change: {', '.join(OPTIONS)}, as for qemu-img amend; a comma in a value is doubled",
    )  # fmt: skip
    progress.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Change the image."""
    import trio

    from qcowfs.disk.amend import amend

    wanted = amendments(parse_options(args.options))
    with progress.shown(args.progress, "amending") as report:
        trio.run(amend, args.image, wanted, report)
    return 0


def parse_options(texts: list[str]) -> dict[str, str]:
    """The values by their names; raises `UsageError` for a name that is unknown or has no value."""
    values: dict[str, str] = {}
    for word in ",".join(texts).replace(",,", "\0").split(","):
        name, equals, value = word.replace("\0", ",").partition("=")
        if name not in OPTIONS or not equals:
            raise UsageError(f"-o {word}: give {', '.join(f'{known}=VALUE' for known in OPTIONS)}")
        values[name] = value
    return values


def amendments(values: dict[str, str]) -> Amendments:
    """What the values ask for; raises `UsageError` for those that make no sense."""
    from qcowfs.disk.amend import Amendments

    name = values.get("backing_file")
    return Amendments(
        version=_pick("compat", values, _VERSIONS),
        lazy_refcounts=_pick("lazy_refcounts", values, _SWITCHES),
        refcount_bits=_pick("refcount_bits", values, {str(1 << order): 1 << order for order in range(7)}),
        backing_name=None if name is None else os.fsencode(name),
        backing_format=values.get("backing_fmt"),
    )


def _pick(name: str, values: dict[str, str], known: dict[str, T]) -> T | None:
    """The value's meaning, None if it is not given."""
    if name not in values:
        return None
    if values[name] not in known:
        raise UsageError(f"-o {name}={values[name]}: give one of {', '.join(known)}")
    return known[values[name]]
