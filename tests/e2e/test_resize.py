"""The disk's size changed by truncate and by command: what is new is zero, and nothing else changes."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mounts import mounted
from tests.e2e.test_live_snapshots import refused, take
from tests.e2e.test_locks import WRITER, held
from tests.e2e.tools import (
    KIB,
    MIB,
    SECTOR,
    Result,
    Word,
    as_raw,
    assert_same,
    convert,
    create,
    peek,
    poke,
    qcowfs,
    qemu_img,
    qemu_info,
    raw_file,
    run,
)
from tests.e2e.writes import assert_holds, assert_sound

GIB = 1 << 30
ODD = MIB + 37 * SECTOR


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk that ends within a cluster."""
    return convert(raw_file(tmp_path / "content", ODD, "resize"), tmp_path / "image.qcow2")


def resize(*words: Word) -> Result:
    return qcowfs("resize", *words)


def done(*words: Word) -> None:
    result = resize(*words)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def size_of(image: Path) -> int:
    size: int = qemu_info(image)["virtual-size"]
    return size


@contextmanager
def offline(image: Path) -> Iterator[Path]:
    yield image


@contextmanager
def folder(image: Path) -> Iterator[Path]:
    with mounted(image, writable=True) as mount:
        yield mount.folder


@contextmanager
def mounted_image(image: Path) -> Iterator[Path]:
    with mounted(image, writable=True):
        yield image


EVERY_WAY = pytest.mark.parametrize("way", [offline, folder, mounted_image], ids=lambda f: f.__name__)


@EVERY_WAY
def test_sizes_are_absolute_or_relative_and_a_smaller_one_must_be_meant(
    way: Any,  # noqa: ANN401 - one of the context managers above
    image: Path,
    tmp_path: Path,
) -> None:
    twin = tmp_path / "content"
    with way(image) as target:
        for word, size in (("3M", 3 * MIB), ("+1M", 4 * MIB), (str(5 * MIB), 5 * MIB), ("5M", 5 * MIB)):
            done(target, word)
            assert size_of(image) == size
        for word, size in (("2M", 2 * MIB), ("-1M", 4 * MIB)):
            result = resize(target, "--", word)
            said = (
                f"qcowfs: {image}: {size} bytes are less than the {5 * MIB} that it has; --shrink cuts it\n"
            )
            assert (result.returncode, result.stdout, result.stderr) == (2, "", said)
        done("--shrink", target, "--", "-3M")
        assert size_of(image) == 2 * MIB
        done("--shrink", target, "512K")
    os.truncate(twin, 512 * KIB)
    assert_sound(image)
    assert_holds(image, twin)


def test_truncate_grows_the_disk_and_a_loop_device_sees_it(image: Path, tmp_path: Path) -> None:
    twin = tmp_path / "content"
    with mounted(image, writable=True) as mount:
        device = run("losetup", "--find", "--show", mount.disk).stdout.strip()
        try:
            run("truncate", "-s", "+10G", mount.disk)
            assert mount.disk.stat().st_size == size_of(image) == ODD + 10 * GIB
            run("losetup", "-c", device)
            assert int(run("blockdev", "--getsize64", device).stdout) == ODD + 10 * GIB
            Path(device).open("r+b").close()
            poke(Path(device), 10 * GIB, b"far out")
            run("blockdev", "--flushbufs", device)
        finally:
            run("losetup", "-d", device)
        assert peek(mount.disk, 10 * GIB - 9, 25) == bytes(9) + b"far out" + bytes(9)
        assert mount.disk.stat().st_blocks * 512 < 4 * MIB
    assert_sound(image)
    os.truncate(twin, ODD + 10 * GIB)
    poke(twin, 10 * GIB, b"far out")
    assert_holds(image, twin)


def test_the_command_makes_an_open_disk_and_a_loop_device_larger(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        device = run("losetup", "--find", "--show", mount.disk).stdout.strip()
        try:
            assert peek(mount.disk, ODD - 1, 9) == peek(image.parent / "content", ODD - 1, 1)
            with mount.disk.open("r+b") as file:
                done(mount.folder, "3M")
                assert os.fstat(file.fileno()).st_size == 3 * MIB
                assert os.pread(file.fileno(), MIB, 2 * MIB) == bytes(MIB)
                assert os.pwrite(file.fileno(), b"new", 3 * MIB - 3) == 3
            run("losetup", "-c", device)
            assert int(run("blockdev", "--getsize64", device).stdout) == 3 * MIB
        finally:
            run("losetup", "-d", device)
        assert mount.disk.read_bytes()[-4:] == b"\0new"
    assert_sound(image)


def test_truncate_never_shrinks_the_disk(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        with refused(errno.EINVAL):
            os.truncate(mount.disk, 512 * KIB)
        with refused(errno.EINVAL):
            os.truncate(mount.disk, 2 * MIB + 1)
        mount.take_complaints()
        assert mount.disk.stat().st_size == ODD
        assert_same(mount.disk, image.parent / "content")
    assert_holds(image, image.parent / "content")


@pytest.mark.parametrize(
    ("live", "version", "fields"),
    [
        (True, "v3", {}),
        (True, "v3", {"extended_l2": "on"}),
        (False, "v3", {"cluster_size": SECTOR}),
        (False, "v2", {}),
    ],
    ids=str,
)
def test_what_was_cut_off_never_comes_back(
    live: bool, version: str, fields: dict[str, object], tmp_path: Path
) -> None:
    raw, source = (
        raw_file(tmp_path / "raw", 4 * MIB + SECTOR, "cut"),
        random.Random(f"cut {version} {fields}"),
    )
    image = convert(raw, tmp_path / "image.qcow2", compat=version, **fields)
    sizes = [source.randrange(1, 12_000) * SECTOR for _ in range(6)]
    with (folder if live else offline)(image) as target:
        for size in sizes:
            done("--shrink", target, str(size))
            os.truncate(raw, size)
            assert_same(as_raw(image, tmp_path / "seen"), raw)
            if live:
                assert_same(target / "disk.raw", raw)
    assert_sound(image)
    assert_holds(image, raw)


@pytest.mark.parametrize(
    ("extended", "size"), [("on", MIB + 100 * SECTOR), ("off", MIB + 100 * SECTOR), ("off", MIB)]
)
def test_growing_over_a_longer_backing_file_shows_none_of_it(
    extended: str, size: int, tmp_path: Path
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"\xba" * 4 * MIB)
    image = create(
        tmp_path / "image.qcow2", size, "-b", base, "-F", "raw", extended_l2=extended, cluster_size=64 * KIB
    )
    other = Path(shutil.copy(image, tmp_path / "other.qcow2"))
    expected = tmp_path / "expected"
    for new in (size + SECTOR, 3 * MIB, 6 * MIB):
        expected.write_bytes(b"\xba" * size + bytes(new - size))
        with mounted(image, writable=True) as mount:
            os.truncate(mount.disk, new)
            assert_same(mount.disk, expected)
        done(other, str(new))
        for grown in (image, other):
            assert_sound(grown)
            assert_holds(grown, expected)


def test_shrinking_then_growing_over_a_backing_file_reads_zeros(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"\xba" * 4 * MIB)
    image = create(tmp_path / "image.qcow2", 4 * MIB, "-b", base, "-F", "raw")
    with mounted(image, writable=True) as mount:
        poke(mount.disk, 3 * MIB, b"gone" * 1000)
        done("--shrink", mount.folder, str(MIB + SECTOR))
        done(mount.folder, "4M")
        assert mount.disk.read_bytes() == b"\xba" * (MIB + SECTOR) + bytes(3 * MIB - SECTOR)
    assert_sound(image)
    assert as_raw(image, tmp_path / "raw").read_bytes()[MIB + SECTOR :] == bytes(3 * MIB - SECTOR)


def test_snapshots_keep_what_a_shrunk_disk_lost(image: Path) -> None:
    content = image.parent / "content"
    with mounted(image, writable=True) as mount:
        take(mount, "whole")
        done("--shrink", mount.folder, "128K")
        assert_same(mount.snapshot("whole"), content)
        take(mount, "part")
        done(mount.folder, "2M")
        assert mount.snapshot("part").read_bytes() == content.read_bytes()[: 128 * KIB]
        assert mount.disk.read_bytes() == content.read_bytes()[: 128 * KIB] + bytes(2 * MIB - 128 * KIB)
    assert_sound(image)
    qemu_img("snapshot", "-a", "whole", image)
    assert_holds(image, content)


@EVERY_WAY
def test_sizes_that_no_disk_can_have_are_refused(way: Callable[..., Any], image: Path) -> None:
    l1 = (2 << 60) // (8192 * 64 * KIB) * 8
    refusals = {
        "1000": "a size of 1000 bytes: a disk has whole sectors of 512 bytes",
        "0": "a size of 0 bytes: a disk has whole sectors of 512 bytes",
        str(2 << 60): f"a size of {2 << 60} bytes needs an L1 table over the limit of {32 * MIB} bytes",
    }
    assert l1 > 32 * MIB
    with way(image) as target:
        for word, text in refusals.items():
            result = resize("--shrink", target, word)
            assert (result.returncode, result.stderr) == (2, f"qcowfs: {image}: {text}\n"), word
    for word in ("much", "", "+", "5X", "--", "1.5.5G"):
        result = resize(image, word)
        assert (result.returncode, result.stdout) == (2, ""), word
    assert_sound(image)
    assert_holds(image, image.parent / "content")


def test_an_image_whose_size_cannot_change_says_why(tmp_path: Path) -> None:
    image = create(tmp_path / "v2.qcow2", MIB, compat="v2")
    qemu_img("snapshot", "-c", "one", image)
    result = resize(image, "2M")
    text = "version 2 with snapshots keeps one size for all; delete them or convert it"
    assert (result.returncode, result.stderr) == (3, f"qcowfs: {image}: {text}\n")
    with mounted(image, writable=True) as mount:
        with refused(errno.EOPNOTSUPP):
            os.truncate(mount.disk, 2 * MIB)
        assert mount.take_complaints() == [f"ERROR setattr: {image}: {text}"]
        assert mount.disk.stat().st_size == MIB
    with mounted(image) as mount:
        result = resize(mount.folder, "2M")
        assert (result.returncode, result.stderr) == (2, f"qcowfs: {mount.folder}: is mounted read-only\n")
    with held(image, *WRITER):
        assert resize(image, "2M").returncode == 5
    assert size_of(image) == MIB
