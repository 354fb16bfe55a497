"""Writes of zeros under --detect-zeroes: clusters as QEMU makes them with the same setting, content right."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.e2e.mounts import mounted, refusal
from tests.e2e.tools import KIB, MIB, SECTOR, as_raw, convert, create, peek, qemu_img, raw_file, run
from tests.e2e.writes import assert_holds, assert_sound, opened, put, write_to_both

CLUSTER = 64 * KIB
SETTINGS = ("off", "on", "unmap")
FORMS: dict[str, dict[str, object]] = {
    "v3": {},
    "v2": {"compat": "v2"},
    "extended L2": {"extended_l2": "on"},
}
WHOLE = [(0, 4 * CLUSTER), (5 * CLUSTER, CLUSTER), (12 * CLUSTER, 8 * CLUSTER)]
PARTS = [
    (7 * CLUSTER + 4 * KIB, 4 * KIB), (9 * CLUSTER - 8 * KIB, 16 * KIB), (21 * CLUSTER, CLUSTER - 4 * KIB),
    (24 * CLUSTER + 4 * KIB, 2 * CLUSTER),
]  # fmt: skip
"""Parts of one cluster and of two, and runs that begin or end within one; in whole pages."""


def states(image: Path) -> list[str]:
    """Where each 4 KiB of the disk come from, by qemu-img map: a place in the file, zeros, or below."""
    found: list[str] = []
    for extent in json.loads(qemu_img("map", "--output=json", "-f", "qcow2", image)):
        state = "below" if extent["depth"] else "place" if "offset" in extent else "zeros"
        found += [state] * (extent["length"] // (4 * KIB))
    return found


def allocated(image: Path) -> int:
    """How many guest clusters have a place in the file, as qemu-img check counts them."""
    record = json.loads(qemu_img("check", "--output=json", image))
    count: int = record.get("allocated-clusters", 0)
    return count


def write_by_qemu(image: Path, setting: str, writes: list[tuple[int, int]]) -> None:
    options = f"driver=qcow2,file.driver=file,file.filename={image},detect-zeroes={setting}"
    if setting == "unmap":
        options += ",discard=unmap"
    words = [word for offset, length in writes for word in ("-c", f"write -q -P 0 {offset} {length}")]
    run("qemu-io", "--image-opts", options, *words)


@pytest.mark.parametrize(
    ("setting", "form", "content"),
    [
        *((setting, "v3", content) for setting in SETTINGS for content in ("full", "empty", "over backing")),
        *((setting, form, "full") for setting in SETTINGS[1:] for form in ("v2", "extended L2")),
        *((setting, "extended L2", kind) for setting in SETTINGS[1:] for kind in ("empty", "over backing")),
        ("on", "v2", "over backing"),
    ],
)
def test_zeros_become_what_they_become_in_qemu(setting: str, form: str, content: str, tmp_path: Path) -> None:
    size, theirs = 32 * CLUSTER, tmp_path / "theirs.qcow2"
    data = random.Random("detect").randbytes(size)
    raw = tmp_path / "raw"
    raw.write_bytes(data)
    image = tmp_path / "image.qcow2"
    if content == "full":
        convert(raw, image, **FORMS[form])
    else:
        create(image, size, *(("-b", raw, "-F", "raw") if content == "over backing" else ()), **FORMS[form])
    shutil.copy(image, theirs)
    writes = WHOLE + PARTS
    write_by_qemu(theirs, setting, writes)
    with mounted(image, "--detect-zeroes", setting, writable=True) as mount, opened(mount.disk) as fd:
        for offset, length in writes:
            put(fd, offset, bytes(length))
    assert_sound(image)
    assert_holds(image, as_raw(theirs, tmp_path / "expected"))
    assert states(image) == states(theirs)
    assert allocated(image) == allocated(theirs)


@pytest.mark.parametrize("setting", SETTINGS)
def test_odd_writes_some_of_them_zeros_are_right_beside_a_snapshot(setting: str, tmp_path: Path) -> None:
    image = convert(raw_file(tmp_path / "raw", 4 * MIB, "odd"), tmp_path / "image.qcow2", extended_l2="on")
    qemu_img("snapshot", "-c", "before", image)
    twin = as_raw(image, tmp_path / "twin")
    with mounted(image, "--detect-zeroes", setting, writable=True) as mount:
        write_to_both(mount.disk, twin, f"detect {setting}", 20)
        for offset, length in ((100, 70_000), (300_001, 2 * CLUSTER), (MIB - 1, 2), (3 * MIB, MIB)):
            for disk in (mount.disk, twin):
                with opened(disk) as fd:
                    put(fd, offset, bytes(length))
        assert peek(mount.disk, 0, 4 * MIB) == twin.read_bytes()
    assert_sound(image)
    assert_holds(image, twin)
    assert as_raw(image, tmp_path / "then", "before").read_bytes() == (tmp_path / "raw").read_bytes()


def test_unmap_gives_the_hosts_blocks_back_and_on_keeps_them(tmp_path: Path) -> None:
    raw, blocks = raw_file(tmp_path / "raw", 8 * MIB, "blocks"), {}
    raw.write_bytes(random.Random("blocks").randbytes(8 * MIB))
    for setting in SETTINGS:
        image = convert(raw, tmp_path / f"{setting}.qcow2")
        with mounted(image, "--detect-zeroes", setting, writable=True) as mount:
            run(
                "dd",
                "if=/dev/zero",
                f"of={mount.disk}",
                "bs=1M",
                "count=8",
                "conv=notrunc,fsync",
                "status=none",
            )
        assert_sound(image)
        assert not any(as_raw(image, tmp_path / "seen").read_bytes())
        blocks[setting] = image.stat().st_blocks * 512
    assert blocks["off"] >= 8 * MIB
    assert blocks["on"] >= 8 * MIB
    assert blocks["unmap"] < MIB


def test_a_write_that_is_zero_but_for_its_last_byte_is_data(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 4 * MIB)
    with mounted(image, "--detect-zeroes", "unmap", writable=True) as mount, opened(mount.disk) as fd:
        put(fd, 0, bytes(CLUSTER - 1) + b"\1")
        put(fd, MIB, bytes(MIB))
        os.fsync(fd)
        assert mount.disk.stat().st_size == 4 * MIB
    assert_sound(image)
    assert allocated(image) == 1
    assert as_raw(image, tmp_path / "raw").read_bytes() == bytes(CLUSTER - 1) + b"\1" + bytes(
        4 * MIB - CLUSTER
    )


def test_another_word_is_a_usage_error(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", SECTOR)
    result = refusal(image, tmp_path / "here", "--detect-zeroes", "maybe", writable=True)
    assert result.returncode == 2
    assert "maybe" in result.stderr
