"""`qcowfs check` beside `qemu-img check`, on sound and on damaged images."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.damages import COPIED, DAMAGES, INCOMPATIBLE_AT, block_at, make_sound
from tests.e2e.kinds import Form, Made, kinds_for
from tests.e2e.tools import (
    KIB,
    MIB,
    attempt,
    create,
    edits,
    l1_entry_at,
    l2_entry_at,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_io,
    word,
)

FORMS = [Form("v3", 64 * KIB), Form("v2", 512), Form("v3", 16 * KIB)]
EACH_KIND = [(form, kind) for form in FORMS for kind in kinds_for(form)]
NUMBERS = (
    "check-errors", "corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters",
    "compressed-clusters", "image-end-offset",
)  # fmt: skip


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
    return make_sound(tmp_path_factory.mktemp("sound"))


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
