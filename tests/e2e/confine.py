"""Run a command under a unit file's MemoryDenyWriteExecute and SystemCallFilter, as systemd would apply them.

Usage: python -m tests.e2e.confine UNIT COMMAND [ARGUMENT...]; the caller has set no_new_privs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_SET_SECCOMP, _FILTER_MODE, _SET_MDWE, _REFUSE_EXEC_GAIN = 22, 2, 65, 1
_ALLOW, _FAIL_WITH_EPERM = 0x7FFF0000, 0x00050000 | errno.EPERM
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_INSTRUCTION = struct.Struct("HBBI")
_MACRO = re.compile(r"^#define __NR_(\w+) (\d+)$", re.MULTILINE)


def settings(unit: Path) -> dict[str, list[str]]:
    """Every setting of a unit file with its values, in their order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not name.startswith(("#", ";", "[")):
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def allowed_calls(filters: Iterable[str]) -> set[str]:
    """Names of the system calls that SystemCallFilter lines leave; a line of ~ takes away."""
    allowed = _members("@default")
    for line in filters:
        named = {name for word in line.removeprefix("~").split() for name in _members(word)}
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


def _members(word: str) -> set[str]:
    """The system calls of a group such as @mount, or the one of that name."""
    if not word.startswith("@"):
        return {word}
    text = _output("systemd-analyze", "syscall-filter", word)
    lines = [line.strip() for line in text.splitlines()[1:]]
    return {name for line in lines if line and not line.startswith("#") for name in _members(line)}


def _output(*command: str) -> str:
    """What a tool prints; it must not take the service's notifications for its own."""
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _numbers() -> dict[str, int]:
    """System call numbers of this machine, as its C compiler knows them."""
    macros = _output("gcc", "-E", "-dM", "-include", "asm/unistd.h", "-x", "c", os.devnull)
    return {name: int(number) for name, number in _MACRO.findall(macros)}


def filter_program(names: Iterable[str]) -> bytes:
    """A kernel filter program that lets the named calls through and fails all others with EPERM."""
    numbers = _numbers()
    program = [_INSTRUCTION.pack(_LOAD, 0, 0, 0)]
    for number in sorted(numbers[name] for name in names if name in numbers):
        program += [_INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, 1, number), _INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW)]
    program.append(_INSTRUCTION.pack(_RETURN, 0, 0, _FAIL_WITH_EPERM))
    return b"".join(program)


def _control(option: int, *arguments: int, tolerate: int | None = None) -> None:
    """Call prctl; an error other than the tolerated one is raised."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(option, *[*arguments, 0, 0, 0][:4]):
        number = ctypes.get_errno()
        if number != tolerate:
            raise OSError(number, os.strerror(number))


def apply(unit: Path) -> None:
    """Put the restrictions on this process; they outlive an exec."""
    stated = settings(unit)
    if stated.get("MemoryDenyWriteExecute") == ["yes"]:
        _control(_SET_MDWE, _REFUSE_EXEC_GAIN, tolerate=errno.EINVAL)  # kernels before 6.3 lack it
    program = filter_program(allowed_calls(stated["SystemCallFilter"]))
    code = ctypes.create_string_buffer(program, len(program))
    length = len(program) // _INSTRUCTION.size
    described = ctypes.create_string_buffer(struct.pack("HP", length, ctypes.addressof(code)))
    _control(_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(described))


if __name__ == "__main__":
    apply(Path(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - a fixed list of words
