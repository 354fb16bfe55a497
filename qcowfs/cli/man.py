"""`qcowfs man [COMMAND]`: manual pages, in the language of man(1).

Owns that language. Must not know any command.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from qcowfs import __version__
from qcowfs.cli.main import COMMANDS, EPILOG
from qcowfs.cli.words import Command, Word, commands
from qcowfs.errors import UsageError

_SUMMARY = "open a qcow2 disk image as raw files, without a virtual machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "page", nargs="?", metavar="COMMAND", choices=tuple(COMMANDS),
        help="whose page to print, for man -l -; without it the program's own",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="DIR", help="write all pages into that folder, as qcowfs.1 and so on"
    )


def run(args: argparse.Namespace) -> int:
    """Print one page, or write them all."""
    found = {f"qcowfs-{command.name}": _command_page(command) for command in commands()}
    found["qcowfs"] = _program_page()
    if args.output is None:
        print(found["qcowfs" if args.page is None else f"qcowfs-{args.page}"], end="")
        return 0
    if args.page is not None:
        raise UsageError("--output writes all pages; leave the command out")
    for name, text in found.items():
        (Path(args.output) / f"{name}.1").write_text(text)
    return 0


def _program_page() -> str:
    lines = [_head("qcowfs", _SUMMARY), ".SH SYNOPSIS", ".B qcowfs", r"\fICOMMAND\fR [\fIOPTION\fR...]"]
    lines += [".SH COMMANDS"]
    for name, summary in COMMANDS.items():
        lines += [".TP", rf"\fBqcowfs\-{name}\fR(1)", _text(summary)]
    return "\n".join([*lines, *_exit_codes(), *_see_also()]) + "\n"


def _command_page(command: Command) -> str:
    lines = [_head(f"qcowfs-{command.name}", command.summary), ".SH SYNOPSIS", _text(command.usage)]
    for group, words in groupby(command.words, lambda word: word.group):
        title = {"positional arguments": "operands"}.get(group, group)
        lines.append(f".SH {_text(title.upper())}")
        for word in words:
            lines += _entry(word)
    if command.epilog:
        lines += [".SH NOTES", _text(command.epilog)]
    return "\n".join([*lines, *_exit_codes(), *_see_also()]) + "\n"


def _head(name: str, summary: str) -> str:
    title = f'.TH {name.upper()} 1 "" "qcowfs {__version__}" "qcowfs"'
    return f"{title}\n.SH NAME\n{_text(name)} \\- {_text(summary)}"


def _entry(word: Word) -> Iterator[str]:
    """One option or operand."""
    yield ".TP"
    value = rf"\fI{_text(word.value)}\fR" if word.value else ""
    if word.flags:
        yield ", ".join(rf"\fB{_text(flag)}\fR{' ' if value else ''}{value}" for flag in word.flags)
    else:
        yield value
    yield _text(word.help) if word.help else r"\&"


def _exit_codes() -> Iterator[str]:
    yield ".SH EXIT STATUS"
    yield _text(" ".join(EPILOG.removeprefix("exit codes: ").split()) + ".")


def _see_also() -> Iterator[str]:
    yield ".SH SEE ALSO"
    pages = [rf"\fBqcowfs\-{name}\fR(1)" for name in COMMANDS]
    yield ", ".join([r"\fBqcowfs\fR(1)", *pages, r"\fBqemu\-img\fR(1)"])


def _text(text: str) -> str:
    """Text that means itself: backslashes, dashes and a leading dot or quote."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped
