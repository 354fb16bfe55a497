"""What `convert` lets the host copy is what QEMU reads in the source, whatever the host can do."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from qcowfs.copying import convert as converting
from qcowfs.creation.form import Creation
from qcowfs.disk.disks import open_disk
from tests.e2e.tools import QCOWFS, run

SIZE = (5 << 20) + 512


def make_source(path: Path) -> None:
    """Clusters of data, of zeros that are stored, and of data behind zeros; the last one is cut."""
    chance = random.Random(5)
    data = bytearray(chance.randbytes(SIZE))
    for start in range(0, SIZE, 3 << 16):
        data[start : start + (1 << 16)] = bytes(min(1 << 16, SIZE - start))
    for start in range(1 << 16, SIZE, 6 << 16):
        data[start : start + 60_000] = bytes(60_000)
    path.write_bytes(data)


def copy(source: Path, target: Path, threads: int) -> None:
    async def whole() -> None:
        async with open_disk(source, "raw") as disk:
            await converting.convert(disk, target, converting.Copying(image=Creation(), threads=threads))

    trio.run(whole)


def refused(*_: int) -> int:
    raise OSError(errno.EXDEV, "not on one file system")


def short(*words: int) -> int:
    """The host copies a little, then claims that the source ends."""
    source, target, length, start, offset = words
    return REAL(source, target, min(length, 5000), start, offset) if start % 65536 == 0 else 0


REAL = os.copy_file_range


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A file system that is on no device, as those of the network are."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", folder)
    yield folder
    run("umount", folder)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("host", [REAL, refused, short])
def test_a_copy_is_the_same_where_the_host_copies_all_some_or_nothing(
    host: Callable[..., int], threads: int, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, other = elsewhere / "a.raw", elsewhere / "a.qcow2", elsewhere / "b.qcow2"
    make_source(source)
    asked: list[int] = []

    def ask(*words: int) -> int:
        asked.append(words[2])
        return host(*words)

    monkeypatch.setattr(os, "copy_file_range", ask)
    copy(source, target, threads)
    assert asked
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, target)
    run("qemu-img", "check", target)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, other)
    assert target.stat().st_size <= other.stat().st_size


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def file_system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of that kind."""
    folder, disk = tmp_path / "there", tmp_path / "there.disk"
    folder.mkdir()
    disk.touch()
    os.truncate(disk, 320 << 20)
    run(f"mkfs.{request.param}", "-q", disk)
    run("mount", "-o", "loop", disk, folder)
    yield folder
    run("umount", folder)


def test_long_runs_take_the_space_that_they_need_and_no_more(file_system: Path) -> None:
    """Some file systems have blocks set aside for them first."""
    source = file_system / "source.raw"
    source.touch()
    chance, runs = random.Random(7), [(0, 5 << 20), (9 << 20, 3 << 20), (21 << 20, 4096)]
    with source.open("rb+") as file:
        for start, length in runs:
            file.seek(start)
            file.write(chance.randbytes(length))
        file.truncate(30 << 20)
    run(*QCOWFS, "convert", "--format", "raw", "-O", "qcow2", source, file_system / "a.qcow2")
    run(*QCOWFS, "convert", "-O", "raw", file_system / "a.qcow2", file_system / "b.raw")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file_system / "a.qcow2", source)
    run("cmp", file_system / "b.raw", source)
    run("sync", "-f", file_system)
    stored = sum(length for _, length in runs)
    for name in ("a.qcow2", "b.raw"):
        status = (file_system / name).stat()
        assert stored <= status.st_blocks * 512 <= stored + (1 << 20), name
