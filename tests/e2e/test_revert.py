"""Going back to a snapshot on a mount and on an image: content, size, cached pages, and who is in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.kinds import Form, Made, extended_l2, over_short, zlib
from tests.e2e.mounts import mounted
from tests.e2e.test_live_snapshots import names, take
from tests.e2e.tools import (
    KIB,
    MIB,
    SECTOR,
    TIMEOUT,
    Result,
    as_raw,
    assert_same,
    convert,
    poke,
    qcowfs,
    qemu_img,
    raw_file,
    run,
)
from tests.e2e.writes import assert_holds, assert_sound, opened, write_to_both

HOLD = "import sys; f = open(sys.argv[1], 'r+b'); print(flush=True); sys.stdin.read()"
WHY = "which would mix old and new; close it first, or use --force\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 4 MiB, with the snapshot "full" of its content."""
    image = convert(raw_file(tmp_path / "content", 4 * MIB, "revert"), tmp_path / "image.qcow2")
    qemu_img("snapshot", "-c", "full", image)
    return image


def revert(target: Path, snapshot: str, *options: str) -> Result:
    return qcowfs("snapshot", "revert", *options, target, snapshot)


def assert_done(result: Result) -> None:
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@contextmanager
def open_for_writing(disk: Path) -> Iterator[int]:
    """Another program that has the disk open for writing; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
    finally:
        process.communicate(timeout=TIMEOUT)


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


@pytest.mark.parametrize("by", ["folder", "image"])
def test_reverting_a_mount_drops_the_pages_that_the_kernel_holds(by: str, image: Path) -> None:
    content = (image.parent / "content").read_bytes()
    with mounted(image, writable=True) as mount:
        poke(mount.disk, 0, b"\xaa" * MIB)
        with opened(mount.disk, os.O_RDONLY) as fd:
            assert os.pread(fd, MIB, 0) == b"\xaa" * MIB
            assert_done(revert(mount.folder if by == "folder" else image, "full"))
            assert os.pread(fd, MIB, 0) == content[:MIB]
        assert mount.disk.read_bytes() == content
        poke(mount.disk, 0, b"\xbb" * MIB)
        assert mount.snapshot("full").read_bytes() == content
        assert mount.disk.read_bytes() == b"\xbb" * MIB + content[MIB:]
        assert_done(revert(mount.folder, "1"))
    assert_sound(image)
    assert_holds(image, image.parent / "content")


@pytest.mark.parametrize(
    ("kind", "form", "mounted_first"),
    [
        (zlib, Form("v2", 64 * KIB), False),
        (extended_l2, Form("v3", 64 * KIB), True),
        (over_short, Form("v3", 64 * KIB), True),
    ],
)
def test_the_disk_is_what_the_snapshot_is_and_both_go_their_own_ways(
    kind: Callable[[Path, Form], Made], form: Form, mounted_first: bool, tmp_path: Path
) -> None:
    image = kind(tmp_path, form).image
    twin, kept = as_raw(image, tmp_path / "twin"), tmp_path / "kept"
    with mounted(image, writable=True) as mount:
        write_to_both(mount.disk, twin, "before", 6)
        take(mount, "kept")
        shutil.copy(twin, kept)
        write_to_both(mount.disk, twin, "lost", 6)
        take(mount, "later")
        if mounted_first:
            assert_done(revert(mount.folder, "kept"))
            assert_same(mount.disk, kept)
    later = Path(shutil.copy(twin, tmp_path / "later"))
    if not mounted_first:
        assert_done(revert(image, "kept"))
    assert_sound(image)
    assert_holds(image, kept)
    shutil.copy(kept, twin)
    with mounted(image, writable=True) as mount:
        write_to_both(mount.disk, twin, "after", 6)
        assert_same(mount.disk, twin)
        assert_same(mount.snapshot("kept"), kept)
        assert_same(mount.snapshot("later"), later)
    assert_sound(image)
    assert_holds(image, twin)
    assert names(image) == ["kept", "later"]


def test_reverting_brings_back_the_size_that_the_disk_had(image: Path) -> None:
    content = (image.parent / "content").read_bytes()
    with mounted(image, writable=True) as mount:
        os.truncate(mount.disk, 9 * MIB)
        poke(mount.disk, 9 * MIB - SECTOR, b"end!" * (SECTOR // 4))
        take(mount, "large")
        assert mount.disk.read_bytes()[-4:] == b"end!"
        assert_done(revert(mount.folder, "full"))
        assert mount.disk.stat().st_size == 4 * MIB
        assert mount.disk.read_bytes() == content
        assert_done(revert(mount.folder, "large"))
        assert mount.disk.stat().st_size == 9 * MIB
        assert mount.disk.read_bytes() == content + bytes(5 * MIB - SECTOR) + b"end!" * (SECTOR // 4)
        device = run("losetup", "--find", "--show", "--read-only", mount.disk).stdout.strip()
        run("losetup", "-d", device)
    assert_sound(image)
    copy = Path(shutil.copy(image, image.parent / "copy.qcow2"))
    assert_done(revert(copy, "full"))
    assert_holds(copy, image.parent / "content")
    assert_sound(copy)


def test_it_is_refused_while_a_program_has_the_disk_open_for_writing(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        poke(mount.disk, 0, b"\xcc" * MIB)
        with open_for_writing(mount.disk) as pid:
            for target in (mount.folder, image):
                result = revert(target, "full")
                said = f"qcowfs: {image}: disk.raw is in use by pid {pid} ({comm(pid)}), {WHY}"
                assert (result.returncode, result.stderr) == (5, said)
            assert mount.disk.read_bytes()[:MIB] == b"\xcc" * MIB
            assert_done(revert(mount.folder, "full", "--force"))
            assert mount.disk.read_bytes() == (image.parent / "content").read_bytes()
        assert_done(revert(mount.folder, "full"))
    assert_sound(image)
    assert_holds(image, image.parent / "content")


def test_it_is_refused_while_a_loop_device_sits_on_the_disk(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        poke(mount.disk, 0, b"\xdd" * MIB)
        for options in ((), ("--read-only",)):
            device = run("losetup", "--find", "--show", *options, mount.disk).stdout.strip()
            try:
                result = revert(mount.folder, "full")
                said = f"qcowfs: {image}: disk.raw is in use by {device}, {WHY}"
                assert (result.returncode, result.stderr) == (5, said), options
            finally:
                run("losetup", "-d", device)
        assert mount.disk.read_bytes()[:MIB] == b"\xdd" * MIB
    assert_sound(image)


def test_readers_are_not_in_the_way(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        poke(mount.disk, 0, b"\xee" * MIB)
        with mount.disk.open("rb"), mount.snapshot("full").open("rb"):
            assert_done(revert(mount.folder, "full"))
    assert_sound(image)
    assert_holds(image, image.parent / "content")


def test_a_snapshot_that_is_not_there_is_one_clear_line(image: Path) -> None:
    said = 'qcowfs: no snapshot has the id or name \'none\'; there are: "1" "full"\n'
    assert (revert(image, "none").returncode, revert(image, "none").stderr) == (2, said)
    with mounted(image, writable=True) as mount:
        result = revert(mount.folder, "none")
        assert (result.returncode, result.stderr) == (2, said)
        assert_same(mount.disk, image.parent / "content")
    assert_sound(image)
