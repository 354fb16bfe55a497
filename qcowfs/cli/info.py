"""`qcowfs info IMAGE [--json]`.

Owns how the record of an image is shown to people. Must not know how it is read.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcowfs.text import human, printable, quoted

Record = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", help="the qcow2 image; what it names is not opened")
    parser.add_argument("--json", action="store_true", help="as JSON, with the keys of qemu-img info")


def run(args: argparse.Namespace) -> int:
    """Print what the image is and holds."""
    import trio

    from qcowfs.cli.exits import complain
    from qcowfs.disk.info import read_info

    record = trio.run(read_info, Path(args.image), args.image, complain)
    if args.json:
        print(json.dumps(encodable(record), indent=4))
    else:
        print("\n".join(_lines(record)))
    return 0


def encodable(value: Any) -> Any:  # noqa: ANN401 - JSON values
    """The value with bytes that are not UTF-8 shown as escapes, since JSON is text."""
    if isinstance(value, str):
        return os.fsencode(value).decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {key: encodable(item) for key, item in value.items()}
    return [encodable(item) for item in value] if isinstance(value, list) else value


def _lines(record: Record) -> Iterator[str]:
    """The record as qemu-img's readers know it."""
    yield f"image: {printable(os.fsencode(record['filename']))}"
    yield f"file format: {record['format']}"
    yield f"virtual size: {human(record['virtual-size'])} ({record['virtual-size']} bytes)"
    yield f"disk size: {human(record['actual-size'])}"
    if record.get("encrypted"):
        yield "encrypted: yes"
    yield f"cluster_size: {record['cluster-size']}"
    if record["dirty-flag"]:
        yield "cleanly shut down: no"
    if "backing-filename" in record:
        actual = f" (actual path: {printable(os.fsencode(record['full-backing-filename']))})"
        relative = record["backing-filename"] != record["full-backing-filename"]
        name = printable(os.fsencode(record["backing-filename"]))
        yield f"backing file: {name}{actual if relative else ''}"
        if "backing-filename-format" in record:
            yield f"backing file format: {record['backing-filename-format']}"
    if record.get("snapshots"):
        yield from snapshot_lines(record["snapshots"])
    yield "Format specific information:"
    yield from _tree(record["format-specific"]["data"], "    ")


def snapshot_lines(snapshots: list[Record]) -> Iterator[str]:
    """A table that gives each snapshot's true name and its file below snapshots/."""
    yield "Snapshot list:"
    rows = [("ID", "NAME", "VM SIZE", "DISK SIZE", "DATE", "FILE")]
    for record in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["date-sec"]))
        disk = human(record["disk-size"]) if "disk-size" in record else "-"
        vm_state = human(record["vm-state-size"])
        names = printable(os.fsencode(record["id"])), quoted(os.fsencode(record["name"]))
        rows.append((*names, vm_state, disk, date, f"snapshots/{record['file-name']}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _tree(value: Record, indent: str) -> Iterator[str]:
    for key, item in value.items():
        label = key.replace("-", " ")
        if isinstance(item, dict):
            yield f"{indent}{label}:"
            yield from _tree(item, indent + "    ")
        elif isinstance(item, list):
            yield f"{indent}{label}:"
            yield from _list(item, indent + "    ")
        else:
            yield f"{indent}{label}: {_scalar(item)}"


def _list(items: list[Any], indent: str) -> Iterator[str]:
    for position, item in enumerate(items):
        if isinstance(item, dict):
            yield f"{indent}[{position}]:"
            yield from _tree(item, indent + "    ")
        else:
            yield f"{indent}{_scalar(item)}"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return printable(os.fsencode(value)) if isinstance(value, str) else str(value)
