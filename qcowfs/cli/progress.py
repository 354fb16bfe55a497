"""Progress of what takes long: a bar on a terminal, lines of JSON for programs, nothing otherwise.

Owns when and how it is shown. Must not know what is done. All of it goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Report = Callable[[int, int], None]
"""Called with the bytes done and all bytes there are to do; from any thread, in any order."""
_PAUSE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option to a command's parser."""
    parser.add_argument(
        "--progress", choices=("auto", "none", "json"), default="auto",
        help="a bar where standard error is a terminal (auto), nothing, or a line of JSON ten times a second",
    )  # fmt: skip


@contextmanager
def shown(kind: str, label: str) -> Iterator[Report | None]:
    """What to call while something goes on; None where nobody looks."""
    if kind == "json":
        yield _Latest(_print_json).report
    elif kind == "auto" and sys.stderr.isatty():
        with _bar(label) as update:
            yield _Latest(update).report
    else:
        yield None


class _Latest:
    """Passes on the furthest report, not too often, and the last one always."""

    def __init__(self, update: Report) -> None:
        self._update = update
        self._lock = threading.Lock()
        self._furthest = -1
        self._next = 0.0

    def report(self, done: int, total: int) -> None:
        with self._lock:
            now = time.monotonic()
            if done <= self._furthest:
                return
            self._furthest = done
            if now >= self._next or done >= total:
                self._next = now + _PAUSE
                with suppress(BrokenPipeError):  # nobody looks any more, which is no reason to stop
                    self._update(done, total)


def _print_json(done: int, total: int) -> None:
    import json

    record = {"done": done, "total": total, "percent": round(100 * done / total, 1) if total else 100.0}
    print(json.dumps({"progress": record}), file=sys.stderr, flush=True)


@contextmanager
def _bar(label: str) -> Iterator[Report]:
    """A bar that vanishes at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
        DownloadColumn(binary_units=True), Speed(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    # what the command prints meanwhile goes to standard output, as ever
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
