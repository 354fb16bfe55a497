"""Numbered records, each written to its own place on a disk; those that a sync covered are told on a pipe.

Usage: python -m tests.e2e.records DISK FIRST writes records from the number FIRST on until it fails.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from tests.e2e.tools import KIB

SIZE = 4 * KIB
PLACES = 4096
"""The disk has room for so many records; later ones replace earlier ones."""
STRIDE = 1663
MOST_AT_ONCE = 5


def place(number: int) -> int:
    """Where a record goes: as good as random, each place once in `PLACES` records."""
    return number * STRIDE % PLACES


def record(number: int) -> bytes:
    return number.to_bytes(8, "little") * (SIZE // 8)


def number_in(data: bytes) -> int:
    """The number of a record, 0 for a place that was never written."""
    number = int.from_bytes(data[:8], "little")
    assert data == record(number), f"record {number} is torn"
    return number


def write_on(disk: Path, first: int) -> None:
    """Write a few records, sync, tell the last one's number, and so on."""
    source, number = random.Random(first), first
    fd = os.open(disk, os.O_RDWR)
    while True:
        for number in range(number, number + source.randint(1, MOST_AT_ONCE)):  # noqa: B020 - goes on from it
            os.pwrite(fd, record(number), place(number) * SIZE)
        os.fsync(fd)
        print(number, flush=True)
        number += 1


if __name__ == "__main__":
    write_on(Path(sys.argv[1]), int(sys.argv[2]))
