"""`qcowfs compare` says what `qemu-img compare` says, with its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.tools import (
    KIB,
    MIB,
    attempt,
    convert,
    create,
    l2_entry_at,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_io,
    raw_file,
)

SIZE = MIB + 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Disks that are the same, or differ in one byte, in size, or in how zeros are kept."""
    folder = tmp_path_factory.mktemp("disks")
    raw = raw_file(folder / "a.raw", SIZE, "compare")
    content = bytearray(raw.read_bytes())
    (folder / "longer.raw").write_bytes(content + bytes(70_000))
    (folder / "longer-data.raw").write_bytes(content + bytes(70_000) + b"x" * 524)
    content[777_777] ^= 1
    (folder / "other.raw").write_bytes(content)
    (folder / "empty.raw").touch()
    convert(raw, folder / "a.qcow2", "-c", cluster_size="4k")
    convert(folder / "other.raw", folder / "other.qcow2")
    qemu_io(create(folder / "zero.qcow2", SIZE), "write -q -z 0 512k")
    create(folder / "none.qcow2", SIZE)
    return folder


PAIRS = [
    ("a.raw", "a.qcow2"), ("a.qcow2", "a.qcow2"), ("a.qcow2", "other.qcow2"), ("other.raw", "a.qcow2"),
    ("a.raw", "longer.raw"), ("longer-data.raw", "a.qcow2"), ("zero.qcow2", "none.qcow2"),
    ("none.qcow2", "a.raw"), ("empty.raw", "none.qcow2"), ("empty.raw", "a.qcow2"),
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_each_pair_gets_qemus_verdict(pair: tuple[str, str], folder: Path) -> None:
    words = [folder / name for name in pair]
    ours, theirs = qcowfs("compare", *words), attempt("qemu-img", "compare", *words)
    assert (ours.stdout, ours.returncode) == (theirs.stdout, theirs.returncode)
    quiet = qcowfs("compare", "-q", *words)
    assert (quiet.stdout, quiet.returncode) == ("", theirs.returncode)


@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[4], PAIRS[6]], ids=" ".join)
def test_a_strict_comparison_looks_at_sizes_and_at_what_is_stored(
    pair: tuple[str, str], folder: Path
) -> None:
    words: list[str | Path] = ["-s", *(folder / name for name in pair)]
    ours, theirs = qcowfs("compare", *words), attempt("qemu-img", "compare", *words)
    assert (ours.stdout, ours.returncode) == (theirs.stdout, theirs.returncode)


def test_programs_get_the_place_as_json(folder: Path) -> None:
    result = qcowfs("compare", "--json", folder / "a.raw", folder / "other.qcow2")
    expected = {"identical": False, "sizes": [SIZE, SIZE], "offset": 777_777 // 512 * 512}
    assert (result.returncode, json.loads(result.stdout)) == (1, expected)


def test_snapshots_compare_with_the_live_disk(tmp_path: Path) -> None:
    image = create(tmp_path / "x.qcow2", MIB)
    qemu_io(image, "write -q -P 1 0 512k")
    qemu_img("snapshot", "-c", "then", image)
    words = ("compare", "--second-snapshot", "then", image, image)
    assert qcowfs(*words).returncode == 0
    qemu_io(image, "write -q -P 2 300k 1k")
    result = qcowfs(*words)
    assert (result.stdout, result.returncode) == (f"Content mismatch at offset {300 * KIB}!\n", 1)


@pytest.mark.parametrize(
    ("second", "code", "text"),
    [
        ("missing", 2, "No such file"),
        ("damaged.qcow2", 4, "guest offset 0x0"),
        (".", 2, "Is a directory|directory"),
    ],
)
def test_what_cannot_be_compared_is_neither_same_nor_different(
    second: str, code: int, text: str, folder: Path
) -> None:
    damaged = create(folder / "damaged.qcow2", SIZE)
    qemu_io(damaged, "write -q 0 64k")
    poke_word(damaged, l2_entry_at(damaged, 0), 3 * 512)
    result = qcowfs("compare", folder / "a.raw", folder / second)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert re.search(text, result.stderr)
