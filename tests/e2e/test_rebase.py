"""`qcowfs rebase` and `qcowfs commit` beside QEMU's: the same content afterwards, wherever it lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs.check.opening import opened
from qcowfs.cli.main import main
from tests.e2e.kinds import (
    Form,
    Made,
    extended_l2_overlay,
    over_long,
    over_qcow2,
    over_raw,
    over_short,
    over_three,
)
from tests.e2e.tools import (
    KIB,
    MIB,
    as_raw,
    assert_same,
    convert,
    create,
    edits,
    l2_entry_at,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_info,
    qemu_io,
    raw_file,
)

Kind = Callable[[Path, Form], Made]
FORMS = [Form("v3", 64 * KIB), Form("v2", 512)]
KINDS: list[tuple[Kind, Form]] = [
    (over_qcow2, FORMS[0]), (over_raw, FORMS[1]), (over_short, FORMS[0]), (over_three, FORMS[0]),
    (extended_l2_overlay, FORMS[0]),
]  # fmt: skip
each = pytest.mark.parametrize(
    ("kind", "form"), KINDS, ids=lambda value: getattr(value, "__name__", str(value))
)


def overlay(kind: Kind, form: Form, folder: Path) -> Path:
    """An overlay with some content of its own."""
    image = kind(folder, form).image
    qemu_io(image, *edits(form.size, kind.__name__, 6))
    return image


def new_backing(folder: Path, form: Form, where: str) -> list[str]:
    """A backing file unlike the old one; the words that name it."""
    if where == "nothing":
        return [""]
    raw = raw_file(folder / "new.raw", form.size - 100 * KIB, where)
    data = bytearray(raw.read_bytes())
    old = folder / "base.raw"
    if old.exists():
        data[: MIB // 2] = old.read_bytes()[: MIB // 2]  # the same at first
        raw.write_bytes(data)
    if where == "raw":
        return ["new.raw", "-F", "raw"]
    convert(raw, folder / "new.qcow2", "-c")
    return ["new.qcow2", "-F", "qcow2"]


@each
@pytest.mark.parametrize("where", ["nothing", "raw", "qcow2"])
def test_a_rebased_overlay_reads_the_same(kind: Kind, form: Form, where: str, tmp_path: Path) -> None:
    image = overlay(kind, form, tmp_path)
    before = as_raw(image, tmp_path / "before")
    words = new_backing(tmp_path, form, where)
    other = Path(shutil.copy(image, tmp_path / "other.qcow2"))
    assert main(["rebase", "-b", *words, str(image)]) == 0
    qemu_img("check", image)
    assert_same(as_raw(image, tmp_path / "after"), before)
    qemu_img("rebase", "-b", *words, other)
    ours, theirs = qemu_info(image), qemu_info(other)
    for key in ("backing-filename", "backing-filename-format"):
        assert ours.get(key) == theirs.get(key)
    allocated = [allocated_clusters(path) for path in (image, other)]
    assert allocated[0] <= allocated[1]


def allocated_clusters(image: Path) -> int:
    record = json.loads(qemu_img("check", "--output=json", image))
    number: int = record.get("allocated-clusters", 0)
    return number


def test_an_unsafe_rebase_changes_the_name_alone(tmp_path: Path) -> None:
    image = over_raw(tmp_path, FORMS[0]).image
    before = as_raw(image, tmp_path / "before")
    (tmp_path / "base.raw").rename(tmp_path / "moved.raw")
    clusters = image.read_bytes()[64 * KIB :]
    assert main(["rebase", "-u", "-b", "moved.raw", "-F", "raw", str(image)]) == 0
    assert image.read_bytes()[64 * KIB :] == clusters
    assert_same(as_raw(image, tmp_path / "after"), before)


def test_snapshots_follow_an_unsafe_rebase_and_forbid_a_safe_one(tmp_path: Path) -> None:
    image = over_raw(tmp_path, FORMS[0]).image
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, *edits(FORMS[0].size, "live", 4))
    before, saved = as_raw(image, tmp_path / "before"), as_raw(image, tmp_path / "saved", "one")
    (tmp_path / "base.raw").rename(tmp_path / "moved.raw")
    words = ("-b", "moved.raw", "-F", "raw")
    assert main(["rebase", "-u", *words, str(image)]) == 0
    qemu_img("check", image)
    assert_same(as_raw(image, tmp_path / "after"), before)
    assert_same(as_raw(image, tmp_path / "kept", "one"), saved)
    result = qcowfs("rebase", *words, image)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "only change the name with --unsafe where both files have the same content" in result.stderr


def test_a_rebase_that_cannot_be_is_refused(tmp_path: Path) -> None:
    image = over_raw(tmp_path, FORMS[0]).image
    new = raw_file(tmp_path / "new.raw", MIB, 1)
    cases = [
        (("-b", new.name), 2, "declare the new backing file's format"),
        (("-b", image.name, "-F", "qcow2"), 6, "cannot be its own backing file"),
        (("-b", "missing", "-F", "raw"), 6, "No such file"),
        (("-b", "nbd:host", "-F", "raw"), 6, "only names of files are followed"),
    ]
    before = image.read_bytes()
    for words, code, text in cases:
        result = qcowfs("rebase", *words, image)
        assert (result.returncode, text in result.stderr) == (code, True), result.stderr
        assert image.read_bytes() == before
    qemu_img("snapshot", "-c", "one", image)
    result = qcowfs("rebase", "-b", new.name, "-F", "raw", image)
    assert (result.returncode, "has snapshots, whose content would change" in result.stderr) == (2, True)


@pytest.mark.parametrize("bits", [1, 2], ids=["dirty", "corrupt"])
def test_an_image_that_must_not_be_written_is_refused_by_one_line(bits: int, tmp_path: Path) -> None:
    image = over_raw(tmp_path, FORMS[0]).image
    poke_word(image, 72, bits)
    before = image.read_bytes()
    for words in (("rebase", "-b", "", image), ("resize", image, "1G"), ("commit", image)):
        result = qcowfs(*words)
        assert (result.returncode, len(result.stderr.splitlines())) == (4, 1), result.stderr
        assert "qcowfs check --repair all" in result.stderr
    assert image.read_bytes() == before


# -- commit


@each
def test_a_commit_moves_everything_down(kind: Kind, form: Form, tmp_path: Path) -> None:
    image = overlay(kind, form, tmp_path)
    before = as_raw(image, tmp_path / "before")
    base = tmp_path / qemu_info(image)["backing-filename"]
    base_form = qemu_info(image)["backing-filename-format"]
    assert main(["commit", str(image)]) == 0
    assert_same(as_raw(image, tmp_path / "after"), before)
    qemu_img("check", image)
    assert allocated_clusters(image) == 0
    if base_form == "qcow2":
        qemu_img("check", base)
        assert_same(as_raw(base, tmp_path / "below"), before)
    else:
        assert base.read_bytes().ljust(form.size, b"\0") == before.read_bytes()


def chain(folder: Path) -> Path:
    """An overlay over three files, which are shorter or of another kind; all in the folder."""
    folder.mkdir()
    raw_file(folder / "base.raw", 3 * MIB, "base")
    create(folder / "lower.qcow2", MIB, "-b", "base.raw", "-F", "raw", cluster_size=4096)
    create(folder / "middle.qcow2", 4 * MIB, "-b", "lower.qcow2", "-F", "qcow2", extended_l2="on")
    image = create(folder / "image.qcow2", 4 * MIB, "-b", "middle.qcow2", "-F", "qcow2")
    qemu_io(folder / "lower.qcow2", *edits(MIB, "lower"))
    qemu_io(folder / "middle.qcow2", *edits(4 * MIB, "middle", 8))
    qemu_io(image, *edits(4 * MIB, "top", 4), "write -q -z 2M 300k", "write -q -c -P 4 3M 64k")
    return image


@pytest.mark.parametrize("base", ["base.raw", "lower.qcow2", "middle.qcow2"])
def test_a_commit_to_a_lower_image_takes_all_that_lies_between(base: str, tmp_path: Path) -> None:
    image = chain(tmp_path / "ours")
    before = as_raw(image, tmp_path / "before")
    theirs = Path(shutil.copytree(image.parent, tmp_path / "theirs"))
    overlay_before = image.read_bytes()
    result = qcowfs("commit", "-b", image.with_name(base), image)
    assert (result.returncode, result.stderr) == (0, "")
    qemu_img("commit", "-b", theirs / base, theirs / image.name)
    assert image.read_bytes() == overlay_before
    assert_same(as_raw(image, tmp_path / "after"), before)
    if base.endswith(".raw"):
        assert (theirs / base).read_bytes() == image.with_name(base).read_bytes() == before.read_bytes()
        return
    for folder in (image.parent, theirs):
        qemu_img("check", folder / base)
        assert_same(as_raw(folder / base, tmp_path / folder.name[:1]), before)


def test_a_base_is_known_by_its_path_or_as_the_chain_names_it(tmp_path: Path) -> None:
    image = chain(tmp_path / "chain")
    before = as_raw(image, tmp_path / "before")
    (tmp_path / "other.raw").write_bytes(b"")
    for name in ("elsewhere", str(tmp_path / "other.raw"), str(image)):
        result = qcowfs("commit", "--base", name, image)
        assert (result.returncode, "is not in its backing chain" in result.stderr) == (2, True)
    assert main(["commit", "--base", "lower.qcow2", str(image)]) == 0
    assert_same(as_raw(image.with_name("lower.qcow2"), tmp_path / "after"), before)


def test_a_layer_between_must_be_sound_and_free(tmp_path: Path) -> None:
    image = chain(tmp_path / "chain")
    middle, base = image.with_name("middle.qcow2"), image.with_name("base.raw")
    before = base.read_bytes()
    with opened(middle, writable=True):
        result = qcowfs("commit", "-b", base, image)
    assert (result.returncode, "in use" in result.stderr) == (5, True)
    poke_word(middle, l2_entry_at(middle, 0), 1 << 55 | 1 << 63)
    result = qcowfs("commit", "-b", base, image)
    assert (result.returncode, "middle.qcow2: is damaged" in result.stderr) == (4, True)
    assert base.read_bytes() == before


def test_an_overlay_with_a_data_file_is_committed(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.raw", 4 * MIB, "base")
    data = tmp_path / "image.data"
    image = create(tmp_path / "image.qcow2", 4 * MIB, "-b", base.name, "-F", "raw", data_file=data)
    qemu_io(image, *edits(4 * MIB, "data", 6))
    before = as_raw(image, tmp_path / "before")
    result = qcowfs("commit", image)
    assert (result.returncode, "--data-file PATH" in result.stderr) == (3, True)
    assert main(["commit", "--data-file", str(data), str(image)]) == 0
    qemu_img("check", image)
    assert base.read_bytes() == before.read_bytes()
    assert_same(as_raw(image, tmp_path / "after"), before)
    assert data.stat().st_blocks == 0
    qemu_io(image, "write -q -P 9 1M 3k")
    assert (
        as_raw(image, tmp_path / "later").read_bytes()[MIB + 3 * KIB :]
        == before.read_bytes()[MIB + 3 * KIB :]
    )


def test_a_commit_leaves_snapshots_and_what_lies_beyond_a_short_overlay(tmp_path: Path) -> None:
    form = FORMS[0]
    image = over_long(tmp_path, form).image
    tail = (tmp_path / "base.raw").read_bytes()[form.size :]
    qemu_io(image, *edits(form.size, "first", 4))
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -q -P 7 0 1M")
    assert main(["commit", "--unsafe", "--keep", str(image)]) == 0
    assert allocated_clusters(image) > 0
    assert main(["commit", "--unsafe", str(image)]) == 0
    qemu_img("check", image)
    assert (tmp_path / "base.raw").read_bytes()[:MIB] == b"\7" * MIB
    assert (tmp_path / "base.raw").read_bytes()[form.size :] == tail
    assert allocated_clusters(image) == 0
    assert as_raw(image, tmp_path / "one.raw", "one").stat().st_size == form.size


def test_a_commit_that_would_change_snapshots_needs_consent(tmp_path: Path) -> None:
    """`qemu-img` changes them without a word."""
    image = overlay(over_qcow2, FORMS[0], tmp_path)
    base = tmp_path / "base.qcow2"
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -q -P 7 0 1M")
    qemu_img("snapshot", "-c", "below", base)
    before = image.read_bytes(), base.read_bytes()
    result = qcowfs("commit", image)
    assert (result.returncode, "image.qcow2: has snapshots, which read through" in result.stderr) == (2, True)
    assert (image.read_bytes(), base.read_bytes()) == before
    below = as_raw(base, tmp_path / "below.raw", "below")
    live = as_raw(image, tmp_path / "live.raw")
    assert main(["commit", "--unsafe", str(image)]) == 0
    assert_same(as_raw(base, tmp_path / "below-after.raw", "below"), below)
    assert_same(as_raw(image, tmp_path / "live-after.raw"), live)
    assert_same(as_raw(base, tmp_path / "base.raw"), live)


def test_snapshots_of_an_image_between_need_consent_too(tmp_path: Path) -> None:
    image = over_three(tmp_path, FORMS[0]).image
    qemu_img("snapshot", "-c", "one", tmp_path / "middle.qcow2")
    assert main(["commit", "--keep", str(image)]) == 0
    result = qcowfs("commit", "-b", tmp_path / "lower.qcow2", image)
    assert result.returncode == 2
    assert "middle.qcow2 (backing file of " in result.stderr
    assert "): has snapshots, which read through" in result.stderr


def test_a_data_file_below_an_overlay_is_not_asked_for(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB, data_file=tmp_path / "base.data")
    image = create(tmp_path / "image.qcow2", MIB, "-b", base.name, "-F", "qcow2")
    other = create(tmp_path / "other.qcow2", MIB)
    for words in (("commit", image), ("rebase", "-b", base, "-F", "qcow2", other)):
        result = qcowfs(*words)
        assert result.returncode == 3
        assert 'base.data"), which nothing below an overlay can have; make one file of it' in result.stderr


def test_a_damaged_overlay_is_not_committed(tmp_path: Path) -> None:
    image = overlay(over_qcow2, FORMS[0], tmp_path)
    base = tmp_path / "base.qcow2"
    poke_word(image, l2_entry_at(image, 0), 1 << 55 | 1 << 63)
    before = image.read_bytes(), base.read_bytes()
    result = qcowfs("commit", image)
    assert (result.returncode, "repair it with qcowfs check" in result.stderr) == (4, True)
    assert (image.read_bytes(), base.read_bytes()) == before


def test_a_base_that_is_in_use_gets_nothing(tmp_path: Path) -> None:
    image = overlay(over_qcow2, FORMS[0], tmp_path)
    before = image.read_bytes()
    with opened(tmp_path / "base.qcow2"):
        result = qcowfs("commit", image)
    assert (result.returncode, "in use" in result.stderr) == (5, True)
    assert image.read_bytes() == before


def test_what_has_no_backing_file_is_not_committed(tmp_path: Path) -> None:
    lone = create(tmp_path / "lone.qcow2", MIB)
    result = qcowfs("commit", lone)
    assert (result.returncode, "has no backing file to commit to" in result.stderr) == (2, True)


def test_a_base_that_is_too_small_grows(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    image = create(tmp_path / "image.qcow2", 2 * MIB, "-b", base.name, "-F", "qcow2")
    qemu_io(image, "write -q -P 5 0 100k", "write -q -P 6 1536k 100k")
    before = as_raw(image, tmp_path / "before")
    assert main(["commit", str(image)]) == 0
    qemu_img("check", base)
    qemu_img("check", image)
    assert_same(as_raw(base, tmp_path / "after"), before)
    assert_same(as_raw(image, tmp_path / "above"), before)


def test_an_emptied_overlay_takes_no_space(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2", 4 * MIB)
    image = create(tmp_path / "image.qcow2", 4 * MIB, "-b", "base.qcow2", "-F", "qcow2")
    qemu_io(image, "write -q 0 4M")
    assert main(["commit", str(image)]) == 0
    assert image.stat().st_blocks * 512 < MIB
