"""Blocks are set aside for long writes to a file on ext4, as long as the host takes it, and nowhere else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcowfs.host import reserving, syscalls
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.reserving import LEAST, Reserver, kind_of_file_system


class Told:
    """What the host was told, in the place of the system call."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.refusal: int | None = None

    def reserve(self, _fd: int, offset: int, length: int) -> None:
        self.ranges.append((offset, length))
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(syscalls, "reserve", found.reserve)
    monkeypatch.setattr(reserving, "kind_of_file_system", lambda _: "ext4")
    return found


def test_a_file_system_is_known_by_its_device() -> None:
    assert kind_of_file_system(Path("/proc").stat().st_dev) == "proc"
    assert kind_of_file_system(os.makedev(4095, 4095)) == ""


def test_names_of_other_mounts_are_no_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = tmp_path / "mounts"
    odd = "30 1 0:9 / /odd\x0c\x1c\x85\u2028name rw - tmpfs none rw\n"
    listed.write_text(odd + "31 1 8:1 / / rw shared:1 - ext4 /dev/a rw\n")
    monkeypatch.setattr(reserving, "_MOUNTS", listed)
    assert kind_of_file_system(os.makedev(8, 1)) == "ext4"


def test_where_no_mounts_are_listed_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reserving, "_MOUNTS", tmp_path / "missing")
    assert kind_of_file_system(tmp_path.stat().st_dev) == ""


def test_long_writes_have_blocks_set_aside_and_short_ones_have_not(told: Told, tmp_path: Path) -> None:
    file = OsHostFile.create(tmp_path / "file")
    file.expect_growth()
    data = memoryview(bytes(LEAST))
    file.write_here(0, [data])
    file.write_here(5 << 20, [data[1:]])
    file.write_here(1 << 20, [data[:4096], data])
    file.close()
    assert told.ranges == [(0, LEAST), (1 << 20, LEAST + 4096)]
    assert (tmp_path / "file").stat().st_size == (6 << 20) - 1


def test_one_refusal_ends_it_and_the_write_is_done(told: Told, tmp_path: Path) -> None:
    told.refusal = errno.ENOSPC
    file = OsHostFile.create(tmp_path / "file")
    file.expect_growth()
    for offset in (0, LEAST):
        file.write_here(offset, [memoryview(b"x" * LEAST)])
    file.close()
    assert told.ranges == [(0, LEAST)]
    assert (tmp_path / "file").read_bytes() == b"x" * 2 * LEAST


def test_other_file_systems_are_left_alone(
    told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reserving, "kind_of_file_system", lambda _: "xfs")
    fd = os.open(tmp_path, os.O_RDONLY)
    Reserver(fd).reserve(0, LEAST)
    os.close(fd)
    assert told.ranges == []


def test_the_real_call_keeps_size_and_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    fd = os.open(path, os.O_RDWR)
    syscalls.reserve(fd, 0, LEAST)
    os.close(fd)
    assert path.read_bytes() == b"kept"
    assert path.stat().st_blocks * 512 >= LEAST
