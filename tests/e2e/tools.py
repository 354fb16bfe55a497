"""What every end-to-end test needs: QEMU's tools, pseudo-random content, comparing and poking files."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Word = str | Path
Result = subprocess.CompletedProcess[str]

QCOWFS = (sys.executable, "-m", "qcowfs")
_MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
MEASURED = (sys.executable, "-c", _MEASURED)
"""Runs a command and prints its peak memory in KiB; that of a child of this process may be this process's."""
TIMEOUT = 120
SECTOR = 512
KIB, MIB = 1 << 10, 1 << 20
_CHUNK = 1 << 20
_CLUSTER_BITS_AT, _L1_SIZE_AT, _L1_OFFSET_AT, _SNAPSHOTS_AT = 20, 36, 40, 64
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00


def run(*command: Word, **options: Any) -> Result:  # noqa: ANN401 - passed on to subprocess
    """The command's result, with its output as text; fails where the command does."""
    result = attempt(*command, **options)
    assert result.returncode == 0, f"{command}: exit code {result.returncode}: {result.stderr}"
    return result


def attempt(*command: Word, **options: Any) -> Result:  # noqa: ANN401 - passed on to subprocess
    """The command's result whatever its exit code."""
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, errors="surrogateescape", check=False, timeout=TIMEOUT, **options,
    )  # fmt: skip


def qcowfs(*words: Word, **options: Any) -> Result:  # noqa: ANN401 - passed on to subprocess
    """The result of the command under test, whatever its exit code."""
    return attempt(*QCOWFS, *words, **options)


def qemu_img(*words: Word) -> str:
    return run("qemu-img", *words).stdout


def qemu_info(image: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(qemu_img("info", "-U", "--output=json", image))
    return record


def qemu_io(image: Path, *commands: str) -> None:
    """Run qemu-io commands on a qcow2 image; each must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    result = run("qemu-io", "-f", "qcow2", *words, image)
    assert "failed" not in result.stdout, result.stdout


def create(image: Path, size: int, *words: Word, **fields: object) -> Path:
    """A new image without content; `fields` are creation options such as cluster_size."""
    qemu_img("create", "-q", "-f", "qcow2", *_creation(fields), *words, image, str(size))
    return image


def convert(raw: Path, image: Path, *words: Word, **fields: object) -> Path:
    """A new image with the content of a raw file."""
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *_creation(fields), *words, raw, image)
    return image


def _creation(fields: Mapping[str, object]) -> list[str]:
    return ["-o", ",".join(f"{name}={value}" for name, value in fields.items())] if fields else []


def as_raw(image: Path, raw: Path, snapshot: str | None = None) -> Path:
    """What QEMU reads from the live disk, or from the snapshot of that name, as a raw file."""
    words = [] if snapshot is None else ["-l", f"snapshot.name={snapshot}"]
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", *words, image, raw)
    return raw


def content(size: int, seed: object) -> bytes:
    """Random, compressible and zero stretches of odd lengths; the same for the same seed."""
    source = random.Random(f"{seed}")
    data = bytearray()
    while len(data) < size:
        length = source.randrange(1, 96 * KIB)
        kind = source.choice(("random", "text", "zeros"))
        if kind == "random":
            data += source.randbytes(length)
        elif kind == "text":
            data += (source.randbytes(23).hex().encode() * (length // 46 + 1))[:length]
        else:
            data += bytes(length)
    return bytes(data[:size])


def raw_file(path: Path, size: int, seed: object) -> Path:
    """A raw file full of such content."""
    path.write_bytes(content(size, seed))
    return path


def edits(size: int, seed: object, count: int = 12) -> Iterator[str]:
    """qemu-io commands that write, zero and discard at odd places; the same for the same seed."""
    source = random.Random(f"{seed} edits")
    verbs = ("write -q -P {byte}", "write -q -P {byte}", "write -q -z", "write -q -z -u", "discard -q")
    for _ in range(count):
        start = source.randrange(size - SECTOR)
        length = min(source.choice((1, 511, 4097, 70_001, 300_000)), size - start)
        verb = source.choice(verbs)
        if verb.startswith("discard"):
            start, length = start // SECTOR * SECTOR, length // SECTOR * SECTOR + SECTOR
            length = min(length, size - start)
        yield f"{verb} {start} {length}".format(byte=source.randrange(1, 256))


def first_difference(first: Path, second: Path) -> int | None:
    """Where two files differ first, None if they are equal."""
    offset = 0
    with first.open("rb") as one, second.open("rb") as other:
        while True:
            left, right = one.read(_CHUNK), other.read(_CHUNK)
            if left != right:
                same = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
                return offset + next(same, min(len(left), len(right)))
            if not left:
                return None
            offset += len(left)


def assert_same(shown: Path, expected: Path) -> None:
    """Fail, telling where, unless both files hold the same bytes."""
    where = first_difference(shown, expected)
    assert where is None, f"{shown} differs from {expected} at offset {where:#x}"
    assert shown.stat().st_size == expected.stat().st_size


def peek(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def word(path: Path, offset: int) -> int:
    """The 64-bit word at a host offset."""
    value: int = struct.unpack(">Q", peek(path, offset, 8))[0]
    return value


def poke_word(path: Path, offset: int, value: int) -> None:
    poke(path, offset, struct.pack(">Q", value))


def cluster_size(image: Path) -> int:
    return 1 << int.from_bytes(peek(image, _CLUSTER_BITS_AT, 4), "big")


def l1_entry_at(image: Path, index: int = 0) -> int:
    """Host offset of an entry of the live disk's L1 table."""
    return word(image, _L1_OFFSET_AT) + 8 * index


def l2_entry_at(image: Path, guest: int) -> int:
    """Host offset of the live disk's 8-byte L2 entry for a guest offset."""
    size = cluster_size(image)
    index = guest // size
    table = word(image, l1_entry_at(image, index // (size // 8))) & OFFSET_MASK
    return table + index % (size // 8) * 8


def host_offset(image: Path, guest: int) -> int:
    """Where the cluster of a guest offset lies in the file."""
    return word(image, l2_entry_at(image, guest)) & OFFSET_MASK


def snapshot_table_at(image: Path) -> int:
    return word(image, _SNAPSHOTS_AT)


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again until the condition holds; fails when it has not for a long time."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it never came true"
