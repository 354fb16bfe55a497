"""`qcowfs bitmap list`, and bitmaps of an image that is mounted."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.mounts import mounted
from tests.e2e.tools import KIB, MIB, create, poke_word, qcowfs, qemu_img, qemu_info, qemu_io, word

AUTOCLEAR_AT = 88


def made(folder: Path) -> Path:
    image = create(folder / "image.qcow2", 4 * MIB)
    qemu_img("bitmap", "--add", "-g", "4096", image, "day")
    qemu_img("bitmap", "--add", "--disable", image, "odd \x1b name")
    qemu_io(image, "write -q 0 10k")
    return image


def test_bitmaps_are_listed_with_what_they_call_dirty(tmp_path: Path) -> None:
    image = made(tmp_path)
    assert qcowfs("bitmap", "list", image).stdout.splitlines() == [
        "day: granularity 4096, auto, 12288 bytes are dirty",
        "odd \\x1b name: granularity 65536, disabled, 0 bytes are dirty",
    ]
    listed = json.loads(qcowfs("bitmap", "list", "--json", image).stdout)
    theirs = qemu_info(image)["format-specific"]["data"]["bitmaps"]
    assert [one.pop("dirty-bytes") for one in listed] == [12288, 0]
    assert listed[0] == theirs[0]
    poke_word(image, AUTOCLEAR_AT, 0)
    assert "cannot be trusted" in qcowfs("bitmap", "list", image).stdout


def test_an_image_without_bitmaps_has_an_empty_list(tmp_path: Path) -> None:
    image = create(tmp_path / "image", MIB)
    assert (qcowfs("bitmap", "list", image).stdout, qcowfs("bitmap", "list", "--json", image).stdout) == (
        "", "[]\n",
    )  # fmt: skip


def test_a_mount_keeps_bitmaps_right(tmp_path: Path) -> None:
    image = made(tmp_path)
    with mounted(image, writable=True) as mount:
        with mount.disk.open("r+b") as disk:
            disk.seek(MIB)
            disk.write(b"x" * 100 * KIB)
        during = qcowfs("bitmap", "list", "--json", image)
        assert json.loads(during.stdout)[0]["flags"] == ["in-use", "auto"]
        assert "what follows may be out of date" in during.stderr
    listed = json.loads(qcowfs("bitmap", "list", "--json", image).stdout)
    assert (listed[0]["flags"], listed[0]["dirty-bytes"]) == (["auto"], 12288 + 100 * KIB)
    assert word(image, AUTOCLEAR_AT) == 1
    qemu_img("check", image)
