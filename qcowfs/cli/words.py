"""Every command with its words, as the parsers know them: the one source of manual and completion.

Owns looking into parsers. Must not know what is made of it.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from qcowfs.cli.main import COMMANDS

_FILES = {"IMAGE", "FILE", "PATH", "SOURCE", "TARGET", "FIRST", "SECOND", "BACKUP"}
_FOLDERS = {"DIR"}


@dataclass(frozen=True)
class Word:
    """An option, with all its spellings in `flags`, or an operand, which has none.

    `value` names what follows an option or stands for the operand; it is empty for a plain switch.
    """

    flags: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    help: str
    group: str

    @property
    def takes_file(self) -> bool:
        """Whether the value is the name of a file."""
        return self.value.rstrip(".") in _FILES

    @property
    def takes_folder(self) -> bool:
        """Whether the value is the name of a folder."""
        return self.value in _FOLDERS


@dataclass(frozen=True)
class Command:
    """A command: its words in the order of its help, its usage, and what is said at the end."""

    name: str
    summary: str
    usage: str
    words: tuple[Word, ...]
    epilog: str

    @property
    def options(self) -> list[Word]:
        """The words that start with a dash."""
        return [word for word in self.words if word.flags]

    @property
    def operands(self) -> list[Word]:
        """The words that do not."""
        return [word for word in self.words if not word.flags]


def commands() -> list[Command]:
    """All commands of the program."""
    return [_command(name, summary) for name, summary in COMMANDS.items()]


def _command(name: str, summary: str) -> Command:
    parser = argparse.ArgumentParser(prog=f"qcowfs {name}", allow_abbrev=False)
    importlib.import_module(f"qcowfs.cli.{name}").add_arguments(parser)
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    words = tuple(dict.fromkeys(_words(parser)))
    return Command(name, summary, usage, words, parser.epilog or "")


def _words(parser: argparse.ArgumentParser) -> Iterator[Word]:
    """The words of a parser, and of the parsers below it."""
    for group in parser._action_groups:  # noqa: SLF001 - argparse tells this in no other way
        for action in group._group_actions:  # noqa: SLF001 - the same
            if action.help == argparse.SUPPRESS:
                continue
            yield _word(action, group.title or "")
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - the same
                for below in action.choices.values():
                    yield from _words(below)


def _word(action: argparse.Action, group: str) -> Word:
    value = ""
    if action.nargs != 0:
        shown = action.metavar if isinstance(action.metavar, str) else None
        value = shown or (action.dest.upper() if action.choices is None else "")
    choices = () if action.choices is None else tuple(map(str, action.choices))
    text = (action.help or "").replace("%%", "%")
    return Word(tuple(action.option_strings), value or "|".join(choices), choices, text, group)
