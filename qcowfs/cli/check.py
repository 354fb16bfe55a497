"""`qcowfs check IMAGE`.

Owns the options, how findings are shown, and this command's own exit codes: those of qemu-img check.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowfs import errors
from qcowfs.cli import progress
from qcowfs.text import printable

if TYPE_CHECKING:
    from qcowfs.check import Finding, Report

CLEAN, NOT_COMPLETED, DAMAGED, LEAKING, UNSUPPORTED = 0, 1, 2, 3, 63
MOST_SHOWN = 100
EPILOG = """exit codes, as those of qemu-img check: 0 the image is sound, 1 the check was not completed,
2 errors were found, 3 leaks were found but no errors, 63 no qcow2 image, or it needs an unknown feature"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = EPILOG
    parser.add_argument(
        "image", type=Path, metavar="IMAGE", help="the qcow2 image; what it names is not opened"
    )
    parser.add_argument("--data", action="store_true", help="inflate every compressed cluster as well")
    parser.add_argument("--json", action="store_true", help="as JSON, with the keys of qemu-img check")
    parser.add_argument(
        "--repair", choices=("leaks", "all"),
        help="tell what is lost and what will be done, then give back leaks, or mend all that loses nothing",
    )  # fmt: skip
    parser.add_argument(
        "--drop-lost", action="store_true",
        help="with --repair all: give up what cannot be read any more; it then reads as zeros",
    )  # fmt: skip
    parser.add_argument(
        "--backup", type=Path, metavar="FILE", help="keep in a new file what the repair overwrites"
    )
    parser.add_argument(
        "--restore", type=Path, metavar="FILE", help="undo the repair that made this backup, and nothing else"
    )
    parser.add_argument(
        "--force-share", "-U", action="store_true",
        help="check beside a program that writes the image; what is found may be wrong",
    )  # fmt: skip
    progress.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check the image and tell what was found."""
    from qcowfs.cli.exits import complain

    try:
        return _run(args)
    except (errors.NotQcow2, errors.UnsupportedFeature) as error:
        complain(f"{_name(args)}: {error}")
        return UNSUPPORTED
    except errors.QcowError as error:
        complain(str(error) if str(error).startswith(_name(args)) else f"{_name(args)}: {error}")
        return NOT_COMPLETED
    except MemoryError:
        complain(f"{_name(args)}: there is not enough memory to count its clusters")
        return NOT_COMPLETED


def _name(args: argparse.Namespace) -> str:
    return printable(os.fsencode(args.image))


def _run(args: argparse.Namespace) -> int:
    _refuse_contradictions(args)
    if args.restore:
        return _restore(args)
    return _repair(args) if args.repair else _check(args)


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if (args.repair or args.restore) and args.force_share:
        raise errors.UsageError("--force-share is for checks that write nothing")
    if args.repair != "all" and args.drop_lost:
        raise errors.UsageError("--drop-lost needs --repair all")
    if not args.repair and args.backup:
        raise errors.UsageError("--backup needs --repair")
    if args.repair and args.restore:
        raise errors.UsageError("--repair and --restore exclude each other")


def _check(args: argparse.Namespace) -> int:
    from functools import partial

    import trio

    from qcowfs.check import check
    from qcowfs.check.opening import opened

    with opened(args.image, force_share=args.force_share) as file, _shown(args, "checking") as tell:
        report = trio.run(partial(check, file, data=args.data, tell=tell))
    if args.json:
        print(json.dumps(_record(report, _name(args)), indent=4))
    else:
        print("\n".join(_lines(report)))
    return exit_code(report)


def _shown(args: argparse.Namespace, label: str) -> AbstractContextManager[progress.Report | None]:
    return progress.shown(args.progress, label)


def _repair(args: argparse.Namespace) -> int:
    import trio

    from qcowfs.check.checker import inspect_all
    from qcowfs.check.opening import backed_up, opened
    from qcowfs.check.repair import Wishes, plan, repair

    wishes = Wishes(args.repair == "all", args.drop_lost, args.data)

    async def work() -> tuple[Report, list[str], Report]:
        with opened(args.image, writable=True) as file:
            with _shown(args, "checking") as tell:
                found = await inspect_all(file, data=args.data, tell=tell)
            told = list(plan(found, wishes))
            if not args.json:
                print("\n".join([*_findings(found.subject.report), *told]), flush=True)
            before = found.subject.report
            with backed_up(file, args.backup) as target, _shown(args, "repairing") as tell:
                return before, told, await repair(target, found, wishes, tell)

    before, told, after = trio.run(work)
    if args.json:
        print(json.dumps(_record(after, _name(args)) | _fixed(before, after) | {"plan": told}, indent=4))
    else:
        print("\n".join(["after the repair:", *_lines(after)]))
    return exit_code(after)


def _fixed(before: Report, after: Report) -> dict[str, int]:
    """How much a repair has mended, with the keys of qemu-img check."""
    leaks = [report.totals.total() - report.corruptions for report in (before, after)]
    fixed = {"corruptions-fixed": before.corruptions - after.corruptions, "leaks-fixed": leaks[0] - leaks[1]}
    return {key: max(0, number) for key, number in fixed.items()}


def _restore(args: argparse.Namespace) -> int:
    import trio

    from qcowfs.check.backup import restore
    from qcowfs.check.opening import opened, opened_backup

    with opened(args.image, writable=True) as file, opened_backup(args.restore) as backup:
        size = trio.run(restore, file, backup)
        if file.facts().regular and size < file.facts().size:
            os.truncate(args.image, size)
    print(f"{_name(args)} is as it was before the repair")
    return CLEAN


def exit_code(report: Report) -> int:
    """What a report ends the command with."""
    if report.corruptions:
        return DAMAGED
    return CLEAN if report.is_clean else LEAKING


def _lines(report: Report) -> Iterable[str]:
    """A line for each finding, as far as they are shown, then a summary."""
    yield from _findings(report)
    yield _summary(report)
    allocation = report.allocation
    share = 100 * allocation.allocated / max(1, allocation.total)
    yield (
        f"{allocation.allocated} of {allocation.total} clusters are allocated ({share:.2f}%), "
        f"{allocation.fragmented} fragmented, {allocation.compressed} compressed; "
        f"the image ends at {report.image_end:#x}"
    )


def _findings(report: Report) -> Iterable[str]:
    """A line for each finding, as far as they are shown."""
    for finding in report.findings[:MOST_SHOWN]:
        yield f"{finding.kind.value}: {finding.text}"
    hidden = report.totals.total() - sum(finding.count for finding in report.findings[:MOST_SHOWN])
    if hidden:
        yield f"... and {hidden} more"


def _summary(report: Report) -> str:
    if report.is_clean:
        return "no errors were found"
    names = {"lost": "places of lost data", "error": "other errors", "leak": "leaked clusters"}
    totals = {kind.value: number for kind, number in report.totals.items() if number}
    return "found: " + ", ".join(f"{totals[key]} {name}" for key, name in names.items() if key in totals)


def _record(report: Report, name: str) -> dict[str, Any]:
    """The report with the keys of qemu-img check, and the list of findings."""
    allocation = report.allocation
    return {
        "filename": name,
        "format": "qcow2",
        "check-errors": 0,
        "corruptions": report.corruptions,
        "leaks": report.totals.total() - report.corruptions,
        "image-end-offset": report.image_end,
        "total-clusters": allocation.total,
        "allocated-clusters": allocation.allocated,
        "fragmented-clusters": allocation.fragmented,
        "compressed-clusters": allocation.compressed,
        "findings": [_finding(finding) for finding in report.findings],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    record = {
        "kind": finding.kind.value,
        "rule": finding.rule,
        "owner": finding.owner,
        "guest-offset": finding.guest,
        "host-offset": finding.host,
        "entry-offset": finding.place,
        "entry": finding.entry,
        "count": finding.count,
    }
    return {key: value for key, value in record.items() if value not in (None, "")}
