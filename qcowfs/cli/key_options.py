"""Options that tell the passphrases of encrypted images.

Owns where a passphrase may come from: a file, a descriptor, a systemd credential, the terminal. Never from an
argument, which every user of the host could read.
"""

from __future__ import annotations

import argparse
import getpass
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.errors import UsageError
from qcowfs.host.interrupts import interrupts_raised

if TYPE_CHECKING:
    from qcowfs.disk.keys import Keys


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options to a command's parser."""
    group.add_argument(
        "--key-file", action="append", default=[], metavar="[NAME=]FILE",
        help="the whole content of FILE is the passphrase of an encrypted image; with NAME= only of the "
        "image of that file name or path; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--key-fd", type=_open_descriptor, metavar="N",
        help="the passphrase is what can be read from file descriptor N up to its end",
    )  # fmt: skip


def _open_descriptor(word: str) -> int:
    """A descriptor that is open when the program starts: later the number may be one of its own."""
    number = int(word)
    try:
        os.fstat(number)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no such number"
        raise argparse.ArgumentTypeError(f"file descriptor {number}: {reason}") from None
    return number


def add_group(parser: argparse.ArgumentParser) -> None:
    """Add the options in a group of their own."""
    add_arguments(parser.add_argument_group("passphrases of encrypted images"))


def make_keys(args: argparse.Namespace) -> Keys:
    """The passphrases that the options give, and where to look for others.

    Raises `UsageError` where they contradict each other, `OSError` where one cannot be read.
    """
    from qcowfs.disk.keys import Keys, read_key

    by_name: dict[str, bytes] = {}
    defaults = [] if args.key_fd is None else [_read_descriptor(args.key_fd)]
    for word in args.key_file:
        name, file = _split(word)
        if name:
            by_name[name] = read_key(Path(file))
        else:
            defaults.append(read_key(Path(file)))
    if len(defaults) > 1:
        raise UsageError("more than one passphrase is given for all images; tell them apart by NAME=FILE")
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return Keys(by_name, defaults[0] if defaults else None, Path(folder) if folder else None, ask)


def _split(word: str) -> tuple[str, str]:
    """The name and the file of `[NAME=]FILE`; for a file with `=` in its name the NAME may be empty."""
    before, equals, after = word.partition("=")
    return (before, after) if equals else ("", word)


def _read_descriptor(number: int) -> bytes:
    from qcowfs.disk.keys import MAX_KEY_SIZE, checked_key

    source = f"file descriptor {number}"
    try:
        with os.fdopen(number, "rb", closefd=number > 2) as file:
            return checked_key(file.read(MAX_KEY_SIZE + 1), source)
    except OSError as error:
        raise UsageError(f"--key-fd: {source}: {error.strerror}") from None


def new_passphrase(keys: Keys, image: str) -> bytes:
    """The passphrase for an image that is to be made; at the terminal it is typed twice."""
    return keys.get(image, image, "LUKS", ask_twice)


def ask_twice(label: str) -> bytes | None:
    """A new passphrase from the terminal, None without one; raises `UsageError` if the two differ."""
    typed = ask(label)
    if typed is not None and typed != ask(f"{label}, once more"):
        raise UsageError("the two passphrases differ; nothing is changed")
    return typed


def ask(label: str) -> bytes | None:
    """The passphrase that somebody types at the terminal without seeing it; None without a terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return None
    try:
        with interrupts_raised():
            return os.fsencode(getpass.getpass(f"Passphrase of {label}: "))
    except EOFError:
        return None
