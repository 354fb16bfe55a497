"""Options as mount(8), fstab and mount.fuse3 write them: `ro,allow_other,uid=1000`.

Owns their translation to the long options of `qcowfs mount`, and which ones are the mount program's own
affair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_OF_THE_MOUNT_PROGRAM = """
    rw defaults auto noauto user nouser users owner group nofail _netdev dev nodev suid nosuid exec noexec
    atime noatime relatime norelatime strictatime nostrictatime diratime nodiratime sync async dirsync
    lazytime nolazytime iversion noiversion mand nomand silent loud default_permissions
"""
IGNORED = frozenset(_OF_THE_MOUNT_PROGRAM.split())
_IGNORED_PREFIXES = ("x-", "comment=", "fsname=", "subtype=")
_JOINED = re.compile(r"-([frU]*)o(.*)", re.DOTALL)
_NAMES = {"ro": "read-only"}


def expand(argv: Sequence[str]) -> list[str]:
    """The command line with every `-o WORDS` before `--` replaced by the long options it stands for."""
    arguments: list[str] = []
    rest = list(argv)
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        match = _JOINED.fullmatch(argument)
        if match is None or not (match[2] or rest):
            arguments.append(argument)
            continue
        if match[1]:
            arguments.append(f"-{match[1]}")
        arguments += as_arguments(match[2] or rest.pop(0))
    return arguments + rest


def as_arguments(words: str) -> list[str]:
    """Command-line arguments for a list of options; a backslash escapes a comma in a value."""
    arguments = []
    for word in _split(words):
        if not word or word in IGNORED or word.startswith(_IGNORED_PREFIXES):
            continue
        name, equals, value = word.partition("=")
        long = _NAMES.get(name, name.replace("_", "-"))
        arguments.append(f"--{long}{equals}{value}")
    return arguments


def _split(words: str) -> list[str]:
    parts = [""]
    escaped = False
    for char in words:
        if char == "," and not escaped:
            parts.append("")
        elif char == "\\" and not escaped:
            escaped = True
            continue
        else:
            parts[-1] += char
        escaped = False
    return parts
