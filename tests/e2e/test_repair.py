"""`qcowfs check --repair`: sound by QEMU's judgement too, and nothing that could be read is lost."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import trio

from qcowfs.check.opening import opened
from qcowfs.cli.main import main
from qcowfs.data.views import ImageView
from qcowfs.disk.image import Image
from qcowfs.errors import CorruptImage
from tests.e2e.damages import COPIED, DAMAGES, INCOMPATIBLE_AT, block_at, make_sound
from tests.e2e.tools import (
    KIB,
    MIB,
    attempt,
    create,
    l2_entry_at,
    peek,
    poke,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_io,
    snapshot_table_at,
    word,
)

CLUSTER = 64 * KIB
Content = dict[tuple[str, int], bytes]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a snapshot, a bitmap and compressed clusters."""
    return make_sound(tmp_path_factory.mktemp("sound"))


def readable(image: Path) -> Content:
    """Every cluster of the live disk and of the snapshots that can be read."""
    return trio.run(_readable, image)


async def _readable(path: Path) -> Content:
    try:
        image = await Image.open(path)
    except CorruptImage:
        return {}
    content: Content = {}
    try:
        await _collect("live", image.active, content)
        for snapshot in image.snapshots:
            await _collect(f"{snapshot.id!r}", image.snapshot_view(snapshot), content)
    except CorruptImage:
        pass  # a snapshot that cannot be looked at
    finally:
        image.close()
    return content


async def _collect(name: str, view: ImageView, content: Content) -> None:
    for guest in range(0, view.size, CLUSTER):
        buffer = bytearray(min(CLUSTER, view.size - guest))
        try:
            await view.read_into(guest, memoryview(buffer))
        except CorruptImage:
            continue
        content[name, guest] = bytes(buffer)


def qemus_code(image: Path) -> int:
    return attempt("qemu-img", "check", "-f", "qcow2", image).returncode


READS_METADATA = {
    "data on a refcount block": ("live", 0), "data on the header": ("live", 0),
    "L2 table in the L1 table": ("live", 0), "snapshot's L2 table in the L1 table": ("b'1'", 0),
}  # fmt: skip
"""What can be read there are tables, which a repair changes; it never was the guest's."""
LOST = [
    "L2 table in the L1 table", "data on the header", "data not aligned", "L2 table not aligned",
    "data at 32 PiB", "compressed past the end", "truncated", "snapshot's L1 table past the end",
    "snapshot's L1 table not aligned", "snapshot table cut short", "snapshot's L1 table on the header",
    "snapshot's L2 table past the end", "snapshot's L2 table not aligned",
    "snapshot's L2 table in the L1 table", "snapshot table not aligned", "snapshot table past the end",
]  # fmt: skip


def assert_kept(before: Content, after: Content, damage: str) -> None:
    """Fail unless all that could be read still can, and reads the same."""
    ignored = READS_METADATA.get(damage)
    changed = [key for key, data in before.items() if after.get(key) != data and key != ignored]
    assert changed == []


def repaired(*words: str | Path) -> tuple[int, dict[str, Any]]:
    """What `qcowfs check --json` says, run in this process, since there are many."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = main(["check", "--json", *map(str, words)])
    return code, json.loads(said.getvalue())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_repair_makes_sound_what_it_can_and_can_be_undone(sound: Path, damage: str, tmp_path: Path) -> None:
    image, backup = Path(shutil.copy(sound, tmp_path / "image")), tmp_path / "backup"
    DAMAGES[damage](image)
    damaged, before = image.read_bytes(), readable(image)
    code, record = repaired("--repair", "all", "--backup", backup, image)
    assert_kept(before, readable(image), damage)
    if any(finding["kind"] == "lost" for finding in record["findings"]):
        assert code == 2
        assert any(line.startswith("stays as it is, so that reads go on failing") for line in record["plan"])
    else:
        assert (code, qemus_code(image), record["findings"]) == (0, 0, [])
        assert not peek(image, INCOMPATIBLE_AT, 8)[7] & 3
    assert main(["check", "--restore", str(backup), str(image)]) == 0
    assert image.read_bytes() == damaged


@pytest.mark.parametrize("damage", LOST)
def test_giving_up_what_is_lost_makes_everything_else_sound(sound: Path, damage: str, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path / "image"))
    DAMAGES[damage](image)
    before = readable(image)
    code, record = repaired("--repair", "all", "--drop-lost", image)
    assert_kept(before, readable(image), damage)
    assert (code, qemus_code(image), record["findings"]) == (0, 0, [])
    assert any(line.startswith("will lose for good") for line in record["plan"])


def live(content: Content) -> Content:
    return {key: data for key, data in content.items() if key[0] == "live"}


@pytest.mark.parametrize("rule", ["overlaps an L1 table", "is short of its size"])
def test_a_snapshot_without_a_table_of_its_own_is_given_up_as_a_whole(
    rule: str, sound: Path, tmp_path: Path
) -> None:
    image, backup = Path(shutil.copy(sound, tmp_path / "image")), tmp_path / "backup"
    qemu_img("snapshot", "-c", "two", image)
    qemu_io(image, "write -q -P 5 512k 64k")
    before = readable(image)
    if rule == "overlaps an L1 table":
        poke_word(image, snapshot_table_at(image), word(image, 40))  # the live one
    else:
        poke(image, snapshot_table_at(image) + 8, bytes(4))
    damaged = image.read_bytes()
    assert repaired("--repair", "all", image)[0] == 2
    assert live(readable(image)).items() <= before.items()
    image.write_bytes(damaged)
    code, record = repaired("--repair", "all", "--drop-lost", "--backup", backup, image)
    assert (code, qemus_code(image), record["findings"]) == (0, 0, [])
    [line] = [line for line in record["plan"] if line.startswith("will lose for good")]
    assert line.startswith('will lose for good the whole snapshot: snapshot "1"')
    assert rule in line
    assert readable(image) == {key: data for key, data in before.items() if key[0] != "b'1'"}
    assert main(["check", "--restore", str(backup), str(image)]) == 0
    assert image.read_bytes() == damaged


def test_leaks_are_given_back_and_nothing_else_is_touched(sound: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path))
    poke_word(image, l2_entry_at(image, 3 * MIB), 0)
    poke_word(image, l2_entry_at(image, 0), word(image, l2_entry_at(image, 0)) | COPIED)
    code, record = repaired("--repair", "leaks", image)
    assert (code, record["leaks-fixed"], record["corruptions-fixed"]) == (2, 1, 0)
    assert record["plan"] == ["will give back 1 leaked clusters"]
    assert [finding["kind"] for finding in record["findings"]] == ["error"]
    code, record = repaired("--repair", "all", image)
    assert (code, record["corruptions-fixed"], qemus_code(image)) == (0, 1, 0)


def test_leaks_stay_while_something_is_lost_that_they_may_hold(sound: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path))
    entry = word(image, l2_entry_at(image, 3 * MIB))
    poke_word(image, l2_entry_at(image, 3 * MIB), entry ^ 1 << 45)
    for mode in ("leaks", "all"):
        code, record = repaired("--repair", mode, image)
        assert (code, record["leaks"], record["leaks-fixed"]) == (2, 1, 0)
        assert record["plan"][1] == "keeps 1 clusters that nothing names: they may hold what is lost"
    poke_word(image, l2_entry_at(image, 3 * MIB), entry)  # somebody finds out what it was
    assert repaired(image)[0] == qemus_code(image) == 0


def test_the_plan_is_told_before_and_the_result_after(sound: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path))
    at = l2_entry_at(image, 3 * MIB)
    poke_word(image, at, COPIED | 1 << 40)
    result = qcowfs("check", "--repair", "all", "--drop-lost", image)
    named = (
        f"live disk, guest offset 0x300000, host offset 0x10000000000, entry at {at:#x} "
        "(0x8000010000000000): the cluster lies past the end of the file"
    )
    lines = result.stdout.splitlines()
    assert lines[0] == f"lost: {named}"
    assert lines[2:6] == [
        f"will lose for good, and read as zeros or from the backing file: {named}",
        "will give back what nothing names then, unless something stays lost",
        "after the repair:",
        "no errors were found",
    ]
    assert (result.returncode, result.stderr, qemus_code(image)) == (0, "", 0)


def test_an_image_that_was_not_closed_can_be_repaired_and_mounted(tmp_path: Path) -> None:
    image = create(tmp_path / "image", 4 * MIB, lazy_refcounts="on")
    killed = attempt(
        "qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M", "-c", "flush", "-c", "sigraise 9", image
    )
    assert killed.returncode == -9
    result = qcowfs("mount", "--dry-run", image, tmp_path)
    assert (result.returncode, "repair it with qcowfs check --repair all" in result.stderr) == (4, True)
    before = readable(image)
    assert repaired("--repair", "all", image)[0] == 0
    assert (qemus_code(image), readable(image)) == (0, before)
    assert qcowfs("mount", "--dry-run", image, tmp_path).returncode == 0


def test_a_cluster_that_does_not_inflate_is_given_up_only_by_name(sound: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path))
    host = word(image, l2_entry_at(image, MIB)) & (1 << 54) - 1
    poke(image, host, b"\xff" * 16)
    before = readable(image)
    code, record = repaired("--data", "--repair", "all", image)
    assert (code, record["corruptions"]) == (2, 2)  # the live disk and the snapshot
    assert readable(image) == before
    code, record = repaired("--data", "--repair", "all", "--drop-lost", image)
    assert (code, qemus_code(image)) == (0, 0)
    assert_kept(before, readable(image), "")


def test_a_backup_fits_its_own_image_only(sound: Path, tmp_path: Path) -> None:
    image, other = Path(shutil.copy(sound, tmp_path / "image")), Path(shutil.copy(sound, tmp_path / "other"))
    backup = tmp_path / "backup"
    poke(image, block_at(image), b"\0\7" * 64)
    poke(other, block_at(other), b"\0\5" * 64)
    assert repaired("--repair", "all", "--backup", backup, image)[0] == 0
    contents = other.read_bytes()
    result = qcowfs("check", "--restore", backup, other)
    assert (result.returncode, other.read_bytes()) == (1, contents)
    assert "it is another image, or was written since; nothing was restored" in result.stderr
    qemu_io(image, "write -q 2M 1M")
    contents = image.read_bytes()
    result = qcowfs("check", "--restore", backup, image)
    assert (result.returncode, image.read_bytes()) == (1, contents)
    result = qcowfs("check", "--restore", image, image)
    assert (result.returncode, "in use" in result.stderr or "is no backup" in result.stderr) == (1, True)


def test_a_backup_never_overwrites_a_file_and_is_not_left_empty(sound: Path, tmp_path: Path) -> None:
    image, backup = Path(shutil.copy(sound, tmp_path)), tmp_path / "backup"
    backup.write_bytes(b"dear")
    result = qcowfs("check", "--repair", "all", "--backup", backup, image)
    assert (result.returncode, result.stderr, backup.read_bytes()) == (
        1, f"qcowfs: {backup}: File exists\n", b"dear",
    )  # fmt: skip
    backup.unlink()
    assert repaired("--repair", "all", "--backup", backup, image)[0] == 0
    assert not backup.exists()


@pytest.mark.parametrize(
    "words",
    [("--drop-lost",), ("--repair", "leaks", "--drop-lost"), ("--backup", "x"), ("--repair", "all", "-U"),
     ("--repair", "all", "--restore", "x")],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(sound: Path, words: tuple[str, ...]) -> None:
    before = sound.read_bytes()
    result = qcowfs("check", *words, sound)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert sound.read_bytes() == before


def test_a_repair_wants_the_image_for_itself(sound: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(sound, tmp_path))
    before = image.read_bytes()
    with opened(image):
        assert qcowfs("check", image).returncode == 0
        result = qcowfs("check", "--repair", "all", image)
    assert (result.returncode, "in use" in result.stderr) == (1, True)
    with opened(image, writable=True):
        result = qcowfs("check", image)
        assert (result.returncode, "in use" in result.stderr) == (1, True)
        assert qcowfs("check", "--force-share", image).returncode == 0
    assert image.read_bytes() == before
