"""Names and sizes as text.

Owns the escaping of untrusted bytes for terminals and logs, and how sizes are written. Must not know where
either comes from.
"""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(name: bytes) -> str:
    r"""The name as text; bad UTF-8 and everything a terminal could obey become \xXX."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def quoted(name: bytes) -> str:
    """The printable name in double quotes."""
    return f'"{printable(name)}"'


def human(count: float) -> str:
    """A size with a binary unit and three significant digits, as qemu-img writes it."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.3g} {_UNITS[unit]}"
