"""What `qcowfs map` prints, and its ranges and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.tools import (
    KIB,
    MIB,
    SECTOR,
    create,
    l2_entry_at,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_io,
    word,
)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An overlay with data, zeros and a compressed cluster over a raw file with a hole."""
    with (tmp_path / "base.raw").open("wb") as base:
        base.write(b"base" * 16 * KIB)
        base.truncate(MIB + 1)
    image = create(tmp_path / "x.qcow2", 2 * MIB, "-b", "base.raw", "-F", "raw", cluster_size="4k")
    qemu_io(image, "write -q 8k 4k", "write -q -z 16k 8k", "write -q -c 200k 4k")
    return image


@pytest.mark.parametrize("bounds", [(), ("--start-offset", "100", "--max-length", "70000"), ("-s", "3M")])
def test_a_range_is_what_qemu_shows_of_it(overlay: Path, bounds: tuple[str, ...]) -> None:
    result = qcowfs("map", "--json", *bounds, overlay)
    ours = json.loads(result.stdout)
    compressed = [extent.pop("compressed") for extent in ours]
    past_the_end = "3M" in bounds
    expected = [] if past_the_end else json.loads(qemu_img("map", "--output=json", *bounds, overlay))
    assert (result.returncode, ours) == (0, expected)
    assert compressed.count(True) == (0 if bounds else 1)


def test_people_get_a_table(overlay: Path) -> None:
    lines = [line.split() for line in qcowfs("map", overlay).stdout.splitlines()]
    assert lines[0] == ["START", "LENGTH", "DEPTH", "WHAT", "HOST", "OFFSET"]
    assert lines[1] == ["0x0", "0x2000", "1", "data", "0x0"]
    assert {line[3] for line in lines[1:]} == {"data", "zero", "compressed", "unallocated"}


def test_a_raw_disk_has_a_map_too(overlay: Path) -> None:
    base = overlay.parent / "base.raw"
    ours = json.loads(qcowfs("map", "--json", "-f", "raw", base).stdout)
    assert [extent.pop("compressed") for extent in ours] == [False] * len(ours)
    assert ours == json.loads(qemu_img("map", "-f", "raw", "--output=json", base))


def test_a_snapshot_has_its_own_map(tmp_path: Path) -> None:
    image = create(tmp_path / "x.qcow2", MIB)
    qemu_io(image, "write -q 0 64k")
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write -q 128k 64k")
    for words, data in (((), [0, 128 * KIB]), (("--snapshot", "then"), [0])):
        extents = json.loads(qcowfs("map", "--json", *words, image).stdout)
        assert [extent["start"] for extent in extents if extent["data"]] == data


def test_damage_is_shown_and_told(tmp_path: Path) -> None:
    image = create(tmp_path / "x.qcow2", MIB)
    qemu_io(image, "write -q 0 64k")
    poke_word(image, l2_entry_at(image, 0), 3 * SECTOR)
    result = qcowfs("map", "--json", image)
    assert result.returncode == 4
    assert "1 extents are damaged" in result.stderr
    assert json.loads(result.stdout)[0]["damage"] == "L2 entry: cluster offset 0x600 is not cluster aligned"
    assert "damaged" in qcowfs("map", image).stdout


def test_a_refcount_block_beyond_all_files_is_nothing_to_a_map(tmp_path: Path) -> None:
    """Counts tell only whether the file may have holes in its data."""
    image = create(tmp_path / "x.qcow2", MIB)
    qemu_io(image, "write -q 0 64k")
    expected = json.loads(qemu_img("map", "--output=json", image))
    poke_word(image, word(image, 48), 1 << 63 | 1 << 20)
    result = qcowfs("map", "--json", image)
    ours = json.loads(result.stdout)
    assert [extent.pop("compressed") for extent in ours] == [False] * len(ours)
    assert (result.returncode, ours, result.stderr) == (0, expected, "")
