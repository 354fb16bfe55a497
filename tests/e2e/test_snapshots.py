"""Snapshots: their sizes, names, dates and content, against what qemu-img says of each."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from pathlib import Path

import pytest

from tests.e2e.mounts import mounted
from tests.e2e.tools import (
    KIB,
    MIB,
    SECTOR,
    as_raw,
    assert_same,
    convert,
    create,
    edits,
    peek,
    poke,
    qemu_img,
    qemu_info,
    qemu_io,
    raw_file,
    snapshot_table_at,
)

LONG = "n" * 255
NAMES_AND_FILES = [
    ("a/b", "a%2Fb.raw"),
    ("..", "%2E..raw"),
    (".", "%2E.raw"),
    ("dup", "dup.raw"),
    ("dup", "dup%id=5.raw"),
    ("1", "1.raw"),
    ("Überraschung 🎉", "Überraschung 🎉.raw"),
    ("two\nlines", "two%0Alines.raw"),
    ("-x", "-x.raw"),
    ("100%", "100%25.raw"),
    ("%id=5", "%25id=5.raw"),
    ("\x1b[31m", "%1B[31m.raw"),
    ("disk.raw", "disk.raw.raw"),
    (LONG, f"{'n' * (255 - len('%id=14.raw'))}%id=14.raw"),
    (LONG, f"{'n' * (255 - len('%id=15.raw'))}%id=15.raw"),
    (b"\xff\xfe".decode(errors="surrogateescape"), "%FF%FE.raw"),
]


def _snapshot(image: Path, name: str) -> None:
    qemu_img("snapshot", "-c", name, "--", image)


def _filled(folder: Path, size: int = MIB, **fields: object) -> Path:
    raw = raw_file(folder / "content", size, "snapshots")
    return convert(raw, folder / "image.qcow2", **fields)


def test_snapshots_keep_the_size_that_the_disk_had(tmp_path: Path) -> None:
    image = _filled(tmp_path, MIB + 3 * SECTOR, cluster_size=4096)
    sizes = {"odd": MIB + 3 * SECTOR, "grown": 5 * MIB + SECTOR, "shrunk": 300 * KIB}
    for name, size in sizes.items():
        qemu_img("resize", "-q", "--shrink", image, str(size))
        qemu_io(image, *edits(size, name))
        _snapshot(image, name)
    qemu_img("resize", "-q", image, "2M")
    with mounted(image) as mount:
        assert {name: mount.snapshot(name).stat().st_size for name in sizes} == sizes
        assert mount.disk.stat().st_size == 2 * MIB
        for name in sizes:
            assert_same(mount.snapshot(name), _reverted(image, name, tmp_path))


def _reverted(image: Path, name: str, folder: Path) -> Path:
    """The live disk of a copy that went back to the snapshot: `convert -l` keeps the live disk's size."""
    copy = folder / "reverted.qcow2"
    shutil.copy(image, copy)
    qemu_img("snapshot", "-a", name, copy)
    return as_raw(copy, folder / "reverted.raw")


def test_a_snapshot_without_a_size_of_its_own_has_that_of_the_disk(tmp_path: Path) -> None:
    image = _filled(tmp_path, compat="v2")
    _snapshot(image, "bare")
    qemu_io(image, "write -q -P 9 0 100000")
    table = snapshot_table_at(image)
    fixed, names = peek(image, table, 36), peek(image, table + 64, len("1bare"))
    poke(image, table, (fixed + bytes(4) + names).ljust(72, b"\0"))
    with mounted(image) as mount:
        assert mount.snapshot("bare").stat().st_size == MIB
        assert_same(mount.snapshot("bare"), as_raw(image, tmp_path / "raw", "bare"))


def test_many_snapshots_are_listed_in_their_order_and_each_keeps_its_content(tmp_path: Path) -> None:
    image = _filled(tmp_path, cluster_size=512)
    names = [f"day-{day:02}" for day in range(60)]
    for name in names:
        qemu_io(image, *edits(MIB, name, 2))
        _snapshot(image, name)
    with mounted(image) as mount:
        assert os.listdir(mount.snapshots) == [f"{name}.raw" for name in names]  # noqa: PTH208 - in order
        for name in names:
            assert_same(mount.snapshot(name), as_raw(image, tmp_path / "raw", name))


def test_names_of_any_bytes_become_unique_file_names(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    for number, (name, _) in enumerate(NAMES_AND_FILES, 1):
        qemu_io(image, f"write -q -P {number} 0 64k")
        _snapshot(image, name)
    with mounted(image) as mount:
        listed = os.listdir(mount.snapshots)  # noqa: PTH208 - in order
        assert listed == [file for _, file in NAMES_AND_FILES]
        for number, (name, file) in enumerate(NAMES_AND_FILES, 1):
            with (mount.snapshots / file).open("rb") as disk:
                assert disk.read(2) == bytes([number]) * 2
            assert os.getxattr(mount.snapshots / file, "user.qcowfs.id") == b"%d" % number
            assert os.getxattr(mount.snapshots / file, "user.qcowfs.name") == os.fsencode(name)


def test_a_name_that_qemu_cuts_to_255_bytes_still_makes_a_file(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    _snapshot(image, "é" * 150)
    with mounted(image) as mount:
        (file,) = mount.snapshots.iterdir()
        assert len(os.fsencode(file.name)) <= 255
        assert file.name.startswith("ééé")
        assert file.name.endswith("%id=1.raw")
        assert os.getxattr(file, "user.qcowfs.name") == ("é" * 150).encode()[:255]


def test_a_snapshot_files_time_is_when_the_snapshot_was_made(tmp_path: Path) -> None:
    image = _filled(tmp_path)
    for name in ("one", "two"):
        _snapshot(image, name)
    with mounted(image) as mount:
        for record in qemu_info(image)["snapshots"]:
            mtime = mount.snapshot(record["name"]).stat().st_mtime_ns
            assert mtime == record["date-sec"] * 10**9 + record["date-nsec"]
        assert mount.disk.stat().st_mtime_ns == image.stat().st_mtime_ns


@pytest.mark.parametrize("place", [32, 40], ids=["32 bits", "64 bits"])
def test_a_virtual_machines_saved_state_is_not_part_of_the_disk(place: int, tmp_path: Path) -> None:
    image = _filled(tmp_path)
    _snapshot(image, "running")
    field = struct.pack(">I", 3 * MIB) if place == 32 else struct.pack(">Q", 3 * MIB)
    poke(image, snapshot_table_at(image) + place, field)
    if place == 32:
        poke(image, snapshot_table_at(image) + 40, struct.pack(">Q", 3 * MIB))
    assert qemu_info(image)["snapshots"][0]["vm-state-size"] == 3 * MIB
    with mounted(image) as mount:
        assert mount.snapshot("running").stat().st_size == MIB
        assert_same(mount.snapshot("running"), as_raw(image, tmp_path / "raw", "running"))


def test_a_snapshot_falls_through_to_the_backing_file(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.raw", 2 * MIB, "base")
    image = create(tmp_path / "image.qcow2", 3 * MIB, "-b", base, "-F", "raw")
    qemu_io(image, "write -q -P 3 70000 5000")
    _snapshot(image, "over base")
    qemu_io(image, "write -q -P 4 0 3M")
    with mounted(image) as mount:
        shown = mount.snapshot("over base")
        assert_same(shown, as_raw(image, tmp_path / "raw", "over base"))
        assert shown.read_bytes()[: 64 * KIB] == base.read_bytes()[: 64 * KIB]


def test_extended_attributes_tell_id_and_name_of_snapshots_only(tmp_path: Path) -> None:
    image = _filled(tmp_path)
    _snapshot(image, "only")
    with mounted(image) as mount:
        assert os.listxattr(mount.snapshot("only")) == ["user.qcowfs.id", "user.qcowfs.name"]
        assert os.listxattr(mount.disk) == os.listxattr(mount.snapshots) == []
        assert os.getxattr(mount.folder, "user.qcowfs.image") == os.fsencode(image)
        assert os.getxattr(mount.folder, "user.qcowfs.pid") == b"%d" % mount.process.pid
        with pytest.raises(OSError, match="No data available") as caught:
            os.getxattr(mount.disk, "user.qcowfs.id")
        assert caught.value.errno == errno.ENODATA
