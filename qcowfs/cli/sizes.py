"""How sizes are read and written on the command line. Must not know what they measure."""

from __future__ import annotations

import argparse

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human(count: float) -> str:
    """A size with a binary unit and three significant digits, as qemu-img writes it."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.3g} {_UNITS[unit]}"


def disk_size(text: str) -> int:
    """A size of any magnitude, such as 4096, 1.5G or 2P."""
    from qcowfs.creation import parse_size
    from qcowfs.errors import UsageError

    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
