"""`qcowfs completion SHELL`: what completes the program's words in bash, zsh or fish.

Owns the three shells' languages. Must not know any command.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator

from qcowfs.cli.words import Command, Word, commands

ALWAYS = ("--help", "--version")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("shell", choices=tuple(SHELLS), metavar="SHELL", help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    """Print the script for the shell."""
    print("\n".join(SHELLS[args.shell](commands())))
    return 0


def _bash(found: list[Command]) -> Iterator[str]:
    """Values that are known are offered; anything else is completed as a file, which is bash's default."""
    yield "# bash completion for qcowfs"
    yield "_qcowfs() {"
    yield "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command='' word"
    yield '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield "        [[ $word == -* ]] || { command=$word; break; }"
    yield "    done"
    yield "    COMPREPLY=()"
    yield "    if [[ -z $command ]]; then"
    names = " ".join((*(command.name for command in found), *ALWAYS))
    yield f'        COMPREPLY=($(compgen -W {shlex.quote(names)} -- "$cur"))'
    yield "        return"
    yield "    fi"
    yield "    case $command,$prev in"
    for command in found:
        yield from _bash_values(command)
    yield "    esac"
    yield "    case $command,$cur in"
    for command in found:
        flags = " ".join(flag for option in command.options for flag in option.flags)
        yield f'    {command.name},-*) COMPREPLY=($(compgen -W {shlex.quote(flags)} -- "$cur"));;'
        choices = " ".join(choice for operand in command.operands for choice in operand.choices)
        if choices:
            yield f'    {command.name},*) COMPREPLY=($(compgen -W {shlex.quote(choices)} -- "$cur"));;'
    yield "    esac"
    yield "}"
    yield "complete -o bashdefault -o default -F _qcowfs qcowfs"


def _bash_values(command: Command) -> Iterator[str]:
    """What may follow each option that takes a value."""
    for option in (option for option in command.options if option.value):
        pattern = "|".join(f"{command.name},{flag}" for flag in option.flags)
        reply = ""
        if option.choices:
            words = shlex.quote(" ".join(option.choices))
            reply = f'COMPREPLY=($(compgen -W {words} -- "$cur")); '
        elif option.takes_folder:
            reply = 'COMPREPLY=($(compgen -d -- "$cur")); '
        yield f"    {pattern}) {reply}return;;"


def _zsh(found: list[Command]) -> Iterator[str]:
    yield "#compdef qcowfs"
    yield "local line state"
    always = "'(- *)--help[show help]' '(- *)--version[show the version]'"
    yield f"_arguments -C {always} '1: :->command' '*:: :->words'"
    yield "case $state in"
    yield "command)"
    pairs = " ".join(shlex.quote(f"{c.name}:{c.summary}") for c in found)
    yield f"    local -a names=({pairs})"
    yield "    _describe command names;;"
    yield "words)"
    yield "    case $line[1] in"
    for command in found:
        specs = [spec for word in command.words for spec in _zsh_specs(word)]
        yield f"    {command.name}) _arguments -s {' '.join(map(shlex.quote, specs))};;"
    yield "    esac;;"
    yield "esac"


def _zsh_specs(word: Word) -> Iterator[str]:
    """How `_arguments` wants a word."""
    action = f"({' '.join(word.choices)})" if word.choices else ""
    action = action or ("_files -/" if word.takes_folder else "_files" if word.takes_file else "")
    name = _escaped(word.value)
    if not word.flags:
        yield f":{name}:{action}"
        return
    for flag in word.flags:
        value = f":{name}:{action}" if word.value else ""
        yield f"{flag}[{_escaped(word.help)}]{value}"


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "[]:\\" else char for char in text)


def _fish(found: list[Command]) -> Iterator[str]:
    names = " ".join(command.name for command in found)
    yield "# fish completion for qcowfs"
    first = f"-n 'not __fish_seen_subcommand_from {names}'"
    yield f"complete -c qcowfs {first} -f -l help -d 'show help'"
    yield f"complete -c qcowfs {first} -f -l version -d 'show the version'"
    for command in found:
        yield f"complete -c qcowfs {first} -f -a {command.name} -d {_fish_quoted(command.summary)}"
    for command in found:
        seen = f"-n '__fish_seen_subcommand_from {command.name}'"
        for word in command.words:
            line = _fish_word(word)
            if line:
                yield f"complete -c qcowfs {seen} {line}"


def _fish_word(word: Word) -> str:
    """The arguments of `complete` for a word; none for an operand that may be anything."""
    parts = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in word.flags]
    if word.choices:
        parts.append(f"-x -a {_fish_quoted(' '.join(word.choices))}")
    elif word.flags and word.value:
        parts.append("-r" if word.takes_file or word.takes_folder else "-x")
    if not parts:
        return ""
    return " ".join((*parts, f"-d {_fish_quoted(word.help)}"))


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SHELLS: dict[str, Callable[[list[Command]], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
