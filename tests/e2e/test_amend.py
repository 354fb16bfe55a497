"""`qcowfs amend` beside `qemu-img amend`: the same image afterwards, sound, with the same content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs.cli.main import main
from tests.e2e.kinds import (
    Form,
    Made,
    discarded,
    over_qcow2,
    over_raw,
    over_short,
    plain,
    preallocated,
    zeroed,
    zlib,
    zstd,
)
from tests.e2e.tools import (
    KIB,
    MIB,
    as_raw,
    assert_same,
    attempt,
    create,
    edits,
    poke,
    qcowfs,
    qemu_img,
    qemu_info,
    qemu_io,
    raw_file,
    run,
    snapshot_table_at,
)

V2, V3 = Form("v2", 64 * KIB), Form("v3", 64 * KIB)
SMALL_V2, SMALL_V3 = Form("v2", 512), Form("v3", 512)
CASES: list[tuple[Callable[[Path, Form], Made], Form, str]] = [
    (plain, V2, "compat=v3"),
    (over_qcow2, SMALL_V2, "compat=1.1,lazy_refcounts=on"),
    (zlib, V2, "compat=v3,refcount_bits=64"),
    (plain, V3, "compat=v2"),
    (zeroed, V3, "compat=0.10"),
    (discarded, SMALL_V3, "compat=v2"),
    (over_raw, V3, "compat=v2,lazy_refcounts=off"),
    (plain, V3, "refcount_bits=4"),
    (zlib, SMALL_V3, "refcount_bits=8"),
    (preallocated, V3, "refcount_bits=32,lazy_refcounts=on"),
    (zstd, V3, "lazy_refcounts=on"),
]
NAMES: list[tuple[Callable[[Path, Form], Made], Form, str, tuple[str, ...]]] = [
    (over_raw, SMALL_V3, "backing_file=longer,, name.raw,backing_fmt=raw", ("longer, name.raw", "-F", "raw")),
    (over_qcow2, V3, "backing_file=", ("",)),
    (over_qcow2, V2, "backing_fmt=raw", ("base.qcow2", "-F", "raw")),
]


def shown(image: Path) -> dict[str, object]:
    """What tells one image from another, but for sizes in the host's file system."""
    record = qemu_info(image)
    return {key: record[key] for key in sorted(record) if key not in ("actual-size", "filename", "snapshots")}


@pytest.mark.parametrize(
    ("kind", "form", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_an_image_is_changed_as_qemu_changes_it(
    kind: Callable[[Path, Form], Made], form: Form, options: str, tmp_path: Path
) -> None:
    image = kind(tmp_path, form).image
    if kind is plain:
        qemu_img("snapshot", "-c", "one", image)
        qemu_io(image, *edits(form.size, options, 3))
    other = Path(shutil.copy(image, tmp_path / "other.qcow2"))
    content = as_raw(image, tmp_path / "before.raw")
    assert main(["amend", "-o", options, str(image)]) == 0
    qemu_img("check", image)
    qemu_img("amend", "-o", options, other)
    expected = as_raw(other, tmp_path / "expected.raw")
    assert_same(as_raw(image, tmp_path / "after.raw"), expected)
    assert_same(content, expected)
    assert shown(image) == shown(other)
    if kind is plain:
        assert_same(as_raw(image, tmp_path / "s1", "one"), as_raw(other, tmp_path / "s2", "one"))


@pytest.mark.parametrize(("kind", "form", "options", "words"), NAMES)
def test_a_backing_file_is_renamed_as_qemu_img_rebase_does_unsafely(
    kind: Callable[[Path, Form], Made], form: Form, options: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    image = kind(tmp_path, form).image
    other = Path(shutil.copy(image, tmp_path / "other.qcow2"))
    assert main(["amend", "-o", options, str(image)]) == 0
    qemu_img("rebase", "-u", "-b", *words, other)
    ours, theirs = (
        json.loads(qcowfs("info", "--json", path).stdout, parse_int=str) for path in (image, other)
    )
    for key in ("backing-filename", "backing-filename-format", "format-specific"):
        assert ours.get(key) == theirs.get(key)
    assert main(["check", str(image)]) == 0


def test_a_changed_image_can_be_written_to(tmp_path: Path) -> None:
    image = plain(tmp_path, V3).image
    for options in ("refcount_bits=1", "refcount_bits=2", "compat=v2,refcount_bits=16", "compat=v3"):
        assert main(["amend", "-o", options, str(image)]) == 0
        qemu_io(image, *edits(V3.size, options, 4))
        qemu_img("check", image)


def test_old_snapshots_learn_the_disks_size(tmp_path: Path) -> None:
    image = create(tmp_path / "image", 4 * MIB, compat="v2")
    qemu_io(image, "write -q 0 1M")
    qemu_img("snapshot", "-c", "one", image)
    table = snapshot_table_at(image)
    data = image.read_bytes()
    poke(image, table + 36, bytes(4))
    poke(image, table + 40, data[table + 64 : table + 64 + 8])  # id and name follow without extra data
    before = as_raw(image, tmp_path / "before", "one")
    assert main(["amend", "-o", "compat=v3", str(image)]) == 0
    qemu_img("check", image)
    assert_same(as_raw(image, tmp_path / "after", "one"), before)


REFUSALS = [
    ("compat=v2", zstd, "version 2 has no data files, extended L2 entries or compression types"),
    ("compat=v2,refcount_bits=8", plain, "version 2 has refcounts of 16 bits only"),
    ("compat=v2,lazy_refcounts=on", plain, "version 2 has no lazy refcounts"),
    ("refcount_bits=3", plain, "-o refcount_bits=3: give one of 1, 2, 4, 8, 16, 32, 64"),
    ("compat=v4", plain, "-o compat=v4: give one of v2, 0.10, v3, 1.1"),
    ("cluster_size=512", plain, "-o cluster_size=512: give compat=VALUE"),
    ("backing_fmt=raw", plain, "has no backing file whose format could be declared"),
    (f"backing_file={'x' * 1024}", plain, "the backing file's name is over 1023 bytes"),
]


@pytest.mark.parametrize(("options", "kind", "rule"), REFUSALS)
def test_what_cannot_be_is_refused_and_nothing_is_changed(
    options: str, kind: Callable[[Path, Form], Made], rule: str, tmp_path: Path
) -> None:
    image = kind(tmp_path, V3).image
    before = image.read_bytes()
    result = qcowfs("amend", "-o", options, image)
    assert result.returncode in (2, 3)
    assert rule in result.stderr
    assert image.read_bytes() == before


@pytest.mark.parametrize("form", [V3, SMALL_V3], ids=str)
@pytest.mark.parametrize("kind", [over_raw, over_qcow2, over_short])
def test_zero_clusters_over_a_backing_file_become_data(
    kind: Callable[[Path, Form], Made], form: Form, tmp_path: Path
) -> None:
    image = kind(tmp_path, form).image
    qemu_io(image, "write -q -z -u 0 128k", "write -q 256k 64k", "write -q -z 256k 64k")
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -q -z -u 768k 192k", "write -q -P 7 0 4k")
    qemu_img("snapshot", "-c", "two", image)
    qemu_io(image, "write -q -z -u 600k 300k")
    other = Path(shutil.copy(image, tmp_path / "other.qcow2"))
    names: list[tuple[str, ...]] = [(), ("one",), ("two",)]
    before = [as_raw(image, tmp_path / "-".join(["before", *name]), *name) for name in names]
    assert main(["amend", "-o", "compat=0.10", str(image)]) == 0
    qemu_img("amend", "-o", "compat=0.10", other)
    assert shown(image) == shown(other)
    qemu_img("check", image)  # which finds wrong COPIED flags in what QEMU has made
    for path in (image, other):
        for name, content in zip(names, before, strict=True):
            assert_same(as_raw(path, tmp_path / "after", *name), content)
    qemu_io(image, *edits(form.size, "then", 4))
    qemu_img("check", image)


def test_encrypted_zero_clusters_over_a_backing_file_stay(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base", MIB, 1)
    secret = ("--object", "secret,id=key,data=word")
    options = "encrypt.format=aes,encrypt.key-secret=key"
    image = tmp_path / "image"
    qemu_img("create", *secret, "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", image)
    opened = ("--image-opts", f"driver=qcow2,file.filename={image},encrypt.key-secret=key")
    run("qemu-io", *secret, "-c", "write -q -z -u 0 128k", *opened)
    result = qcowfs("amend", "-o", "compat=v2", image)
    assert (result.returncode, "is encrypted: convert it instead" in result.stderr) == (2, True)


def test_counts_that_are_too_large_keep_their_width(tmp_path: Path) -> None:
    image = plain(tmp_path, V3).image
    for name in ("one", "two", "three"):
        qemu_img("snapshot", "-c", name, image)
    result = qcowfs("amend", "-o", "refcount_bits=2", image)
    assert (result.returncode, "has 4 references, more than 2 bits hold" in result.stderr) == (2, True)
    qemu_img("check", image)


def test_a_damaged_image_is_not_changed(tmp_path: Path) -> None:
    image = plain(tmp_path, V3).image
    poke(image, 0x20000, bytes(64))
    before = image.read_bytes()
    result = qcowfs("amend", "-o", "compat=v2", image)
    assert (result.returncode, "repair it with qcowfs check --repair all" in result.stderr) == (4, True)
    assert image.read_bytes() == before
    assert attempt("qemu-img", "check", image).returncode == 2


def test_a_name_that_does_not_fit_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base", MIB, 1)
    image = create(tmp_path / "image", MIB, "-b", base.name, "-F", "raw", cluster_size=512)
    before = image.read_bytes()
    result = qcowfs("amend", "-o", f"backing_file={'x' * 500}", image)
    assert (result.returncode, "a shorter backing file name may fit" in result.stderr) == (2, True)
    assert image.read_bytes() == before
