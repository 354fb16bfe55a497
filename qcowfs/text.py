"""Untrusted bytes as text that is safe to print.

Owns the escaping for terminals and logs. Must not know where names come from.
"""

from __future__ import annotations


def printable(name: bytes) -> str:
    r"""The name as text; bad UTF-8 and everything a terminal could obey become \xXX."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def quoted(name: bytes) -> str:
    """The printable name in double quotes."""
    return f'"{printable(name)}"'
