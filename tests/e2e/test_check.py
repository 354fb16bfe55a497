"""`qcowfs check` beside `qemu-img check`, on sound and on damaged images."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.kinds import Form, Made, kinds_for
from tests.e2e.tools import (
    KIB,
    MIB,
    attempt,
    create,
    edits,
    host_offset,
    l1_entry_at,
    l2_entry_at,
    poke,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_io,
    snapshot_table_at,
    word,
)

FORMS = [Form("v3", 64 * KIB), Form("v2", 512), Form("v3", 16 * KIB)]
EACH_KIND = [(form, kind) for form in FORMS for kind in kinds_for(form)]
NUMBERS = (
    "check-errors", "corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters",
    "compressed-clusters", "image-end-offset",
)  # fmt: skip
REFCOUNT_TABLE_AT, CLUSTERS_AT, INCOMPATIBLE_AT, AUTOCLEAR_AT = 48, 56, 72, 88
COPIED = 1 << 63


def judged(image: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """What `qcowfs check` says of an image, and its exit code."""
    result = qcowfs("check", "--json", *words, image)
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)


def judged_by_qemu(image: Path) -> tuple[int, dict[str, Any]]:
    """What `qemu-img check` says; counters that it leaves out are 0."""
    result = attempt("qemu-img", "check", "-f", "qcow2", "--output=json", image)
    record = json.loads(result.stdout) if result.stdout else {}
    return result.returncode, dict.fromkeys(NUMBERS, 0) | record


@pytest.mark.parametrize(
    ("form", "kind"), EACH_KIND, ids=lambda value: getattr(value, "__name__", f"{value}")
)
def test_a_sound_image_is_measured_as_qemu_does(
    form: Form, kind: Callable[[Path, Form], Made], tmp_path: Path
) -> None:
    image = kind(tmp_path, form).image
    if "data_file" not in kind.__name__:
        qemu_img("snapshot", "-c", "one", image)
        qemu_io(image, *edits(form.size, kind.__name__, 4))
    code, ours = judged(image, "--data")
    qemus_code, theirs = judged_by_qemu(image)
    assert (code, ours["findings"]) == (qemus_code, []) == (0, [])
    assert {key: ours[key] for key in NUMBERS} == {key: theirs[key] for key in NUMBERS}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a snapshot, a bitmap and compressed clusters."""
    image = create(tmp_path_factory.mktemp("sound") / "sound.qcow2", 4 * MIB)
    qemu_io(image, "write -q -P 1 0 1M", "write -q -c -P 2 1M 64k", "write -q -z 2M 128k")
    qemu_img("snapshot", "-c", "one", image)
    qemu_img("bitmap", "--add", image, "bits")
    qemu_io(image, "write -q -P 3 256k 128k", "write -q -P 4 3M 64k")
    return image


def block_at(image: Path) -> int:
    """Where the first refcount block lies."""
    return word(image, word(image, REFCOUNT_TABLE_AT))


Damage = Callable[[Path], None]
DAMAGES: dict[str, Damage] = {
    "L2 table in the L1 table": lambda i: poke_word(i, l1_entry_at(i), word(i, 40) | COPIED),
    "data on a refcount block": lambda i: poke_word(i, l2_entry_at(i, 0), block_at(i) | COPIED),
    "data on the header": lambda i: poke_word(i, l2_entry_at(i, 0), 1 << 62),
    "a reserved bit in an L2 entry": lambda i: poke_word(
        i, l2_entry_at(i, 0), word(i, l2_entry_at(i, 0)) | 2
    ),
    "a reserved bit in an L1 entry": lambda i: poke_word(i, l1_entry_at(i), word(i, l1_entry_at(i)) | 2),
    "data not aligned": lambda i: poke_word(i, l2_entry_at(i, 0), word(i, l2_entry_at(i, 0)) | 0x200),
    "L2 table not aligned": lambda i: poke_word(i, l1_entry_at(i), word(i, l1_entry_at(i)) | 0x200),
    "data at 32 PiB": lambda i: poke_word(i, l2_entry_at(i, 0), 1 << 55 | COPIED),
    "L2 table past the end": lambda i: poke_word(i, l1_entry_at(i), 1 << 40 | COPIED),
    "compressed length too long": lambda i: poke_word(
        i, l2_entry_at(i, MIB), word(i, l2_entry_at(i, MIB)) | 0xFF << 54
    ),
    "compressed past the end": lambda i: poke_word(i, l2_entry_at(i, MIB), 1 << 62 | 1 << 50),
    "compressed with COPIED": lambda i: poke_word(
        i, l2_entry_at(i, MIB), word(i, l2_entry_at(i, MIB)) | COPIED
    ),
    "refcounts wiped": lambda i: poke(i, block_at(i), bytes(64 * KIB)),
    "refcounts raised": lambda i: poke(i, block_at(i), b"\0\7" * 64),
    "refcount block past the end": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT), 1 << 40),
    "refcount block at 2^62": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT), 1 << 62),
    "refcount block not aligned": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT), block_at(i) | 0x200),
    "no refcount table": lambda i: poke(i, REFCOUNT_TABLE_AT, bytes(12)),
    "refcount table not aligned": lambda i: poke_word(i, REFCOUNT_TABLE_AT, 0x123),
    "two blocks in one place": lambda i: poke_word(i, word(i, REFCOUNT_TABLE_AT) + 8, block_at(i)),
    "snapshot's L1 table not aligned": lambda i: poke_word(i, snapshot_table_at(i), 0x123),
    "snapshot's L1 table past the end": lambda i: poke_word(i, snapshot_table_at(i), 1 << 40),
    "snapshot without disk size": lambda i: poke(i, snapshot_table_at(i) + 36, bytes(4)),
    "snapshot table cut short": lambda i: poke(i, 60, (9999).to_bytes(4, "big")),
    "truncated": lambda i: os.truncate(i, 5 * 64 * KIB),
    "COPIED missing": lambda i: poke_word(i, l2_entry_at(i, 3 * MIB), host_offset(i, 3 * MIB)),
    "COPIED on shared data": lambda i: poke_word(i, l2_entry_at(i, 0), host_offset(i, 0) | COPIED),
    "no bitmaps extension": lambda i: poke(i, i.read_bytes().index(b"\x23\x85\x28\x75"), b"\x01"),
    "bitmaps given up": lambda i: poke_word(i, AUTOCLEAR_AT, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_qemu_calls_damaged_is_damaged_here_too(sound: Path, damage: str, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path))
    DAMAGES[damage](image)
    qemus_code, theirs = judged_by_qemu(image)
    code, ours = judged(image)
    assert qemus_code, "the damage is none"
    assert code == (3 if qemus_code == 3 and damage not in MORE_THAN_LEAKS else 2)
    assert ours["corruptions"] + ours["leaks"] >= bool(theirs["corruptions"] + theirs["leaks"])
    for finding in ours["findings"]:
        assert finding.keys() & {"host-offset", "owner"} or "header" in finding["rule"], finding


MORE_THAN_LEAKS = {"no bitmaps extension"}


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_that_qemu_finds_is_found(sound: Path, seed: int, tmp_path: Path) -> None:
    source = random.Random(seed)
    image = Path(shutil.copy(sound, tmp_path))
    tables = [l1_entry_at(image) & ~0xFFFF, l2_entry_at(image, 0) & ~0xFFFF, block_at(image)]
    for _ in range(3):
        at = source.choice(tables) + source.randrange(48) * 8
        poke_word(image, at, word(image, at) ^ (1 << source.randrange(64)))
    qemus_code, _ = judged_by_qemu(image)
    code, ours = judged(image)
    print("seed", seed, qemus_code, ours["findings"])
    assert code == qemus_code or code == 2 or qemus_code == 0


def test_what_is_no_image_or_too_new_has_a_code_of_its_own(sound: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    result = qcowfs("check", raw)
    assert (result.returncode, result.stdout) == (63, "")
    assert "is not a qcow2 image" in result.stderr
    image = Path(shutil.copy(sound, tmp_path))
    poke_word(image, INCOMPATIBLE_AT, 1 << 40)
    result = qcowfs("check", image)
    assert result.returncode == 63
    assert "incompatible feature bit 40" in result.stderr


def test_a_check_that_cannot_be_done_ends_with_1(sound: Path, tmp_path: Path) -> None:
    assert qcowfs("check", tmp_path / "nothing").returncode == 1
    assert qcowfs("check", "--no-such-option", sound).returncode == 1
    cut = tmp_path / "cut"
    cut.write_bytes(sound.read_bytes()[:50])
    result = qcowfs("check", cut)
    assert (result.returncode, result.stderr) == (
        1, f"qcowfs: {cut}: header is cut short: 50 bytes of at least 72\n"
    )  # fmt: skip


def test_findings_are_lines_that_name_the_place(sound: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path))
    at = l2_entry_at(image, 3 * MIB)
    poke_word(image, at, COPIED | 1 << 40)
    result = qcowfs("check", image)
    lines = result.stdout.splitlines()
    assert lines[0] == (
        f"lost: live disk, guest offset 0x300000, host offset 0x10000000000, entry at {at:#x} "
        "(0x8000010000000000): the cluster lies past the end of the file"
    )
    assert lines[1].startswith("leak: host offset ")
    assert lines[2] == "found: 1 places of lost data, 1 leaked clusters"
    assert len(lines) == 4


def test_many_findings_are_bounded_and_counted(tmp_path: Path) -> None:
    image = create(tmp_path / "image", 4 * MIB, cluster_size=512)
    qemu_io(image, "write -q 0 4M")
    for index in range(64):
        poke_word(image, l2_entry_at(image, index * 32 * KIB), COPIED | 1 << 50)
        poke_word(image, l2_entry_at(image, index * 32 * KIB + 1024), COPIED | 1 << 50)
    lines = qcowfs("check", image).stdout.splitlines()
    assert len(lines) == 103
    assert lines[100] == "... and 156 more"
    assert lines[101] == "found: 128 places of lost data, 128 leaked clusters"
