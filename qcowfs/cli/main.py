"""The command `qcowfs`: picks the command, and turns errors into one line and an exit code.

Owns the list of commands. Must not know what a command does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from qcowfs import __version__
from qcowfs.cli import logs
from qcowfs.cli.exits import EXIT_HOST, EXIT_USAGE, guarded
from qcowfs.cli.mount_helper import mount_command
from qcowfs.cli.mount_words import expand

COMMANDS = {
    "mount": "show an image's live disk and snapshots as raw files",
    "umount": "end a mount and free its image",
    "info": "tell what an image is and holds",
    "snapshot": "list, take, drop, rename or go back to snapshots",
    "resize": "change the size of the live disk",
    "check": "find what is wrong with an image, and mend it",
    "bitmap": "list an image's persistent bitmaps",
    "commit": "write an overlay's content to its backing file",
    "rebase": "put an overlay on another backing file",
    "amend": "change an image's version, refcounts or backing file's name",
    "create": "make a new, empty image",
    "convert": "copy a disk into a new raw file or image",
    "compare": "tell whether two disks read the same",
    "measure": "tell how much space an image would take",
    "map": "tell where the bytes of a disk lie",
    "completion": "print what completes these words in a shell",
    "man": "print a manual page",
    "key": "list, add or remove the passphrases that open an image encrypted by LUKS",
}

EPILOG = """exit codes: 0 done, 1 the host failed (file, disk), 2 wrong usage or not a qcow2 image,
3 the image needs a feature that is not supported, 4 the image is damaged, 5 the image is in use,
6 a backing or data file is missing or refused, 7 mounting or unmounting failed, 8 a passphrase is wrong,
130 interrupted"""


_FEW_OBJECTS = 50_000
"""New objects before the collector looks: loading the modules of a command makes most of them, for good."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if argv is not None:
        return guarded(lambda: _run(list(argv)))
    _start_quickly()
    try:
        return guarded(lambda: _run(sys.argv[1:]))
    finally:
        gc.freeze()  # what is left goes with the process; looking through it took as long as a small copy


def _start_quickly() -> None:
    """Spare what a short command would mostly wait for."""
    if sys.argv[1:2] != ["mount"]:  # a daemon lives long, and its memory is bounded
        gc.set_threshold(_FEW_OBJECTS, *gc.get_threshold()[1:])
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start threads that nothing here uses


def _run(words: list[str]) -> int:
    if len(words) >= 2 and words[0] not in COMMANDS and not words[0].startswith("-"):
        words = mount_command(words)  # mount.fuse3 calls `qcowfs IMAGE DIR -o OPTIONS`
    if words[:1] == ["mount"]:
        words = expand(words)
    parser, chosen = _parser(words)
    args = _parse(parser, words, chosen)
    if chosen is None:
        parser.print_help()
        return EXIT_USAGE
    if chosen != "mount":
        logs.configure_short()
    code: int = importlib.import_module(f"qcowfs.cli.{chosen}").run(args)
    return code


def _parse(parser: argparse.ArgumentParser, words: list[str], chosen: str | None) -> argparse.Namespace:
    """The arguments; wrong ones end `check` with the code of qemu-img check, where 2 means damage."""
    try:
        return parser.parse_args(words)
    except SystemExit as end:
        if chosen == "check" and end.code == EXIT_USAGE:
            raise SystemExit(EXIT_HOST) from None
        raise


def mount_main() -> int:
    """The command `mount.qcowfs`, which mount(8) calls."""
    return main(mount_command(sys.argv[1:]))


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, str | None]:
    """The parser, with arguments only for the command that is asked for, and that command."""
    parser = argparse.ArgumentParser(
        prog="qcowfs",
        description="Open a qcow2 disk image as raw files, without a virtual machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qcowfs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", prog=parser.prog)
    chosen = next((w for w in words if not w.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == chosen:
            importlib.import_module(f"qcowfs.cli.{name}").add_arguments(command)
    return parser, chosen if chosen in COMMANDS else None
