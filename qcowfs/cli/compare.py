"""`qcowfs compare FIRST SECOND`.

Owns what is said about the verdict, and the exit codes, which are those of `qemu-img compare`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowfs.cli import progress, source_options
from qcowfs.cli.exits import EXIT_OK, EXIT_USAGE, complain

if TYPE_CHECKING:
    from qcowfs.copying.compare import Verdict

EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "exit codes: 0 identical, 1 different; of all others, 2 also where the host failed"
    parser.add_argument("first", metavar="FIRST", help="an image or raw disk")
    parser.add_argument("second", metavar="SECOND", help="another one")
    parser.add_argument(
        "--second-format", "-F", choices=("qcow2", "raw"), help="what SECOND is; as --format for FIRST"
    )
    parser.add_argument(
        "--second-snapshot", metavar="NAME", help="read a snapshot of SECOND; as --snapshot for FIRST"
    )
    parser.add_argument(
        "--strict", "-s", action="store_true", help="sizes must be equal too, and what is stored"
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="say nothing, but by the exit code")
    parser.add_argument("--json", action="store_true", help="as JSON")
    progress.add_arguments(parser)
    source_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compare the disks."""
    import trio

    from qcowfs.cli.exits import raise_single

    try:
        with raise_single():
            verdict = trio.run(_compare, args)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        return EXIT_USAGE  # 1 would say that the disks differ
    unequal = args.strict and verdict.sizes[0] != verdict.sizes[1]
    same = verdict.identical and not unequal
    if args.json:
        print(json.dumps(_record(verdict, same=same), indent=4))
    elif not args.quiet:
        print("\n".join(_lines(verdict, strict=args.strict)))
    return EXIT_OK if same else EXIT_DIFFERENT


async def _compare(args: argparse.Namespace) -> Verdict:
    from qcowfs.copying.compare import compare
    from qcowfs.disk.disks import open_disk

    options = source_options.open_options(args)
    async with (
        open_disk(Path(args.first), args.format, options, args.snapshot) as first,
        open_disk(Path(args.second), args.second_format, options, args.second_snapshot) as second,
    ):
        options.keys.check_use()
        with progress.shown(args.progress, "comparing") as report:
            return await compare(first, second, strict=args.strict, report=report)


def _record(verdict: Verdict, *, same: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"identical": same, "sizes": list(verdict.sizes)}
    if verdict.offset is not None:
        record["offset"] = verdict.offset
    if verdict.status_offset is not None:
        record["status-offset"] = verdict.status_offset
    return record


def _lines(verdict: Verdict, *, strict: bool) -> list[str]:
    """The words of qemu-img, which scripts may look for."""
    lines = []
    if verdict.sizes[0] != verdict.sizes[1]:
        if strict:
            return ["Strict mode: Image size mismatch!"]
        lines.append("Warning: Image size mismatch!")
    if verdict.status_offset is not None:
        return [*lines, f"Strict mode: Offset {verdict.status_offset} block status mismatch!"]
    if verdict.offset is not None:
        return [*lines, f"Content mismatch at offset {verdict.offset}!"]
    return [*lines, "Images are identical."]
