"""How sizes are read on the command line. Must not know what they measure."""

from __future__ import annotations

import argparse


def disk_size(text: str) -> int:
    """A size of any magnitude, such as 4096, 1.5G or 2P."""
    from qcowfs.creation.form import parse_size
    from qcowfs.errors import UsageError

    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
