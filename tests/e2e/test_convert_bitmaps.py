"""`qcowfs convert --bitmaps` takes an image's bitmaps along, as `qemu-img convert --bitmaps` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tools import KIB, MIB, create, poke_word, qcowfs, qemu_img, qemu_io

SIZE = 40 * MIB + 3 * KIB
AUTOCLEAR_AT = 88
FORMS = [(), ("-c",), ("-o", "cluster_size=512"), ("-o", "cluster_size=2M,extended_l2=on"),
         ("-o", "refcount_bits=1,cluster_size=4k")]  # fmt: skip


@pytest.fixture(params=[512, 65536])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image with a bitmap that is enabled, one that no longer is, and one that is empty."""
    image = create(tmp_path / "source.qcow2", SIZE, cluster_size=request.param)
    qemu_img("bitmap", "--add", "-g", "512", image, "fine")
    qemu_img("bitmap", "--add", "-g", "64k", image, "coarse")
    qemu_io(image, "write -q 0 3k", "write -q -P 2 9M 700k", f"write -q {SIZE - 2 * KIB} 2k")
    qemu_img("bitmap", "--disable", image, "coarse")
    qemu_img("bitmap", "--add", "-g", "1M", image, "empty")
    qemu_io(image, "write -q 30M 5M")
    return image


def bitmaps(image: Path) -> list[dict[str, Any]]:
    """What is listed of all bitmaps, with the bytes that each calls dirty."""
    found: list[dict[str, Any]] = json.loads(qcowfs("bitmap", "list", "--json", image).stdout)
    return sorted(found, key=lambda one: str(one["name"]))


@pytest.mark.parametrize("words", FORMS, ids=" ".join)
def test_bitmaps_are_those_that_qemu_copies(words: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    result = qcowfs("convert", "--bitmaps", *words, source, ours)
    assert result.returncode == 0, result.stderr
    qemu_img("convert", "--bitmaps", "-O", "qcow2", *words, source, theirs)
    qemu_img("check", ours)
    qemu_img("compare", ours, source)
    assert bitmaps(ours) == bitmaps(theirs) == bitmaps(source)
    alone, with_source = together([ours], tmp_path / "alone"), together([ours, source], tmp_path / "both")
    assert alone == with_source
    assert all(alone.values())


def together(images: list[Path], merged: Path) -> dict[str, int]:
    """Bytes that QEMU finds marked by each of the bitmaps in any of the images."""
    create(merged, SIZE)
    for name in ("coarse", "empty", "fine"):
        qemu_img("bitmap", "--add", "-g", "512", merged, name)
        for image in images:
            qemu_img("bitmap", "--merge", name, "-b", image, "-F", "qcow2", merged, name)
    return {one["name"]: int(one["dirty-bytes"]) for one in bitmaps(merged)}


def test_a_bitmap_that_cannot_be_trusted_is_told_or_left_out(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.qcow2"
    poke_word(source, AUTOCLEAR_AT, 0)
    result = qcowfs("convert", "--bitmaps", source, target)
    assert (result.returncode, "--skip-broken-bitmaps leaves it out" in result.stderr) == (4, True)
    assert not target.exists()
    assert qcowfs("convert", "--bitmaps", "--skip-broken-bitmaps", source, target).returncode == 0
    assert bitmaps(target) == []
    qemu_img("check", target)


@pytest.mark.parametrize(
    ("words", "text"),
    [(("-O", "raw"), "raw files have none"), (("-o", "compat=v2"), "version 2"),
     (("-f", "raw"), "only the live disk")],
)  # fmt: skip
def test_where_there_can_be_none_is_told(words: tuple[str, ...], text: str, source: Path) -> None:
    result = qcowfs("convert", "--bitmaps", *words, source, source.with_name("x.qcow2"))
    assert (result.returncode, text in result.stderr) == (2, True), result.stderr
    assert not source.with_name("x.qcow2").exists()
