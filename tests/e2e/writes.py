"""Writing for tests: seeded changes applied to a disk and to a raw twin, and what must hold afterwards."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.mounts import Mount
from tests.e2e.tools import KIB, MIB, Result, as_raw, assert_same, attempt

_LENGTHS = (1, 511, 512, 513, 4 * KIB - 1, 33 * KIB + 7, 64 * KIB, 300_001)
LONGEST = 2 * MIB
Change = tuple[int, bytes]


def changes(size: int, seed: object, count: int = 24) -> Iterator[Change]:
    """Offsets and bytes to write there, of odd places and lengths; the same for the same seed."""
    source = random.Random(f"{seed} changes")
    for _ in range(count):
        length = source.choice((*_LENGTHS, source.randrange(1, LONGEST)))
        offset = source.randrange(size)
        offset -= offset % source.choice((1, 1, 512, 64 * KIB))
        length = min(length, size - offset)
        yield offset, bytes(length) if source.random() < 0.1 else source.randbytes(length)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor of the file."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def put(fd: int, offset: int, data: bytes) -> None:
    """Write all of the bytes at that place; what fails after a first part is tried again, to raise."""
    done = 0
    while done < len(data):
        written = os.pwrite(fd, data[done:], offset + done)
        assert written, f"nothing was written at {offset + done}"
        done += written


def write_to_both(disk: Path, twin: Path, seed: object, count: int = 24) -> None:
    """Make the same changes to a mounted disk and to its twin."""
    with opened(disk) as one, opened(twin) as other:
        for offset, data in changes(twin.stat().st_size, seed, count):
            put(one, offset, data)
            put(other, offset, data)


def checked(image: Path, *words: str) -> Result:
    return attempt("qemu-img", "check", *words, image)


def assert_sound(image: Path) -> None:
    """Fail unless QEMU finds neither an error nor a leak in the image, which is not mounted."""
    result = checked(image)
    assert result.returncode == 0, result.stdout + result.stderr


def assert_leaks_at_most(image: Path, *words: str) -> None:
    """Fail if QEMU finds anything but leaked clusters in the image."""
    result = checked(image, *words)
    assert result.returncode in (0, 3), result.stdout + result.stderr


def assert_holds(image: Path, raw: Path) -> None:
    """Fail unless the live disk of the image, which is not mounted, is what the raw file is."""
    result = attempt("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw)
    assert (result.returncode, result.stdout) == (0, "Images are identical.\n"), result.stdout


def assert_on_disk(mount: Mount, twin: Path) -> None:
    """Fail unless the image file, as it is beneath the mount, is consistent and holds what the twin does."""
    assert_leaks_at_most(mount.image, "-U")
    assert_same(as_raw(mount.image, twin.with_suffix(".seen")), twin)
