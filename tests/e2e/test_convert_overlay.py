"""`qcowfs convert -B`: an overlay that reads as the source, and holds no more than what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.tools import KIB, MIB, create, qcowfs, qemu_img, qemu_info, qemu_io, raw_file

SIZE = 6 * MIB + 5 * 512
CHANGES = ("write -q -P 7 100k 3k", "write -q -z 1M 300k", "write -q -P 9 4M 700k", "write -q -z 5M 64k",
           "write -q -P 3 6M 2k")  # fmt: skip
FORMS = ["compat=v2", "cluster_size=4k", "extended_l2=on", "cluster_size=512,refcount_bits=1"]


@pytest.fixture(params=["raw", "qcow2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What all lies on: of the source's size, or half of it."""
    raw = raw_file(tmp_path / "base.raw", SIZE if request.param == "raw" else SIZE // 2 // 512 * 512, "base")
    if request.param == "raw":
        return raw
    image = tmp_path / "base.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
    return image


@pytest.fixture
def source(base: Path, tmp_path: Path) -> Path:
    """An overlay on it, with changes."""
    image = create(tmp_path / "source.qcow2", SIZE, "-b", base, "-F", base.suffix[1:])
    qemu_io(image, *CHANGES)
    return image


def clusters(image: Path) -> int:
    """How many clusters an image itself holds as data."""
    check = json.loads(qemu_img("check", "--output=json", image))
    return int(check.get("allocated-clusters", 0))


@pytest.mark.parametrize("words", [(), ("-c",), *(("-o", form) for form in FORMS)], ids=" ".join)
def test_an_overlay_reads_as_the_source_and_holds_no_more_than_qemus(
    words: tuple[str, ...], base: Path, source: Path, tmp_path: Path
) -> None:
    below = ("-B", base, "-F", base.suffix[1:])
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    result = qcowfs("convert", "-O", "qcow2", *words, *below, source, ours)
    assert result.returncode == 0, result.stderr
    qemu_img("convert", "-O", "qcow2", *words, *below, source, theirs)
    qemu_img("compare", ours, source)
    assert qemu_info(ours)["backing-filename"] == str(base)
    assert clusters(ours) <= clusters(theirs)


@pytest.mark.parametrize("words", [(), ("-o", "extended_l2=on"), ("-o", "compat=v2")], ids=" ".join)
def test_a_disk_that_was_copied_whole_becomes_an_overlay_again(
    words: tuple[str, ...], base: Path, source: Path, tmp_path: Path
) -> None:
    whole, image = tmp_path / "whole.raw", tmp_path / "x.qcow2"
    qemu_img("convert", "-O", "raw", source, whole)
    result = qcowfs("convert", *words, "-B", base.name, "-F", base.suffix[1:], "-f", "raw", whole, image)
    assert result.returncode == 0, result.stderr
    qemu_img("compare", image, whole)
    changed = 3 * KIB + 300 * KIB + 700 * KIB + 64 * KIB + 2 * KIB
    grown = SIZE if base.suffix == ".qcow2" else 0
    assert clusters(image) * 64 * KIB <= changed + grown + 12 * 64 * KIB


def test_what_equals_the_backing_file_takes_no_cluster(base: Path, tmp_path: Path) -> None:
    kind = base.suffix[1:]
    image = tmp_path / "x.qcow2"
    assert qcowfs("convert", "-B", base, "-F", kind, "-f", kind, base, image).returncode == 0
    assert clusters(image) == 0
    qemu_img("compare", image, base)
