"""`qcowfs convert -n` writes a disk into a device or file that exists, as `qemu-img convert -n` does."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qcowfs.copying.convert import Copying, convert
from qcowfs.disk.disks import open_disk
from qcowfs.host import syscalls
from tests.e2e.tools import KIB, MIB, content, create, qcowfs, qemu_img, qemu_io, raw_file, run

SIZE = 5 * MIB + 3 * 512
OLD = b"\xaa"


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """The file below the device, full of what must not show through."""
    path = tmp_path / "below"
    path.write_bytes(OLD * 8 * MIB)
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[Path]:
    name = run("losetup", "--find", "--show", backing).stdout.strip()
    yield Path(name)
    run("losetup", "--detach", name)


@pytest.fixture(params=["raw", "qcow2", "compressed", "overlay"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A disk of data, zeros and holes."""
    raw = raw_file(tmp_path / "source.raw", SIZE, "into")
    with raw.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(MIB))
    if request.param == "raw":
        return raw
    image = tmp_path / "source.qcow2"
    if request.param == "overlay":
        create(image, SIZE, "-b", raw, "-F", "raw")
        qemu_io(image, "write -q -z 3M 200k", "write -q -P 9 100k 3k")
    else:
        words = ["-c"] if request.param == "compressed" else []
        qemu_img("convert", *words, "-f", "raw", "-O", "qcow2", raw, image)
    return image


def test_a_disk_is_not_written_over_itself_even_if_locks_are_shared(source: Path, tmp_path: Path) -> None:
    overlay = "backing file" in run("qemu-img", "info", source).stdout
    for target in {source, tmp_path / "source.raw"} if overlay else {source}:
        os.truncate(target, max(target.stat().st_size, SIZE))
        before = target.read_bytes()
        result = qcowfs("convert", "-U", "-n", "-O", "raw", source, target)
        assert result.stderr == f"qcowfs: -n: {target} is what {source} is read from\n"
        assert result.returncode == 2
        assert target.read_bytes() == before


def test_a_device_holds_the_disk_and_what_lay_behind_it(source: Path, device: Path, tmp_path: Path) -> None:
    result = qcowfs("convert", "-n", source, device)
    assert result.returncode == 0, result.stderr
    qemu_img("convert", "-O", "raw", source, tmp_path / "expected")
    found = device.read_bytes()
    assert found[:SIZE] == (tmp_path / "expected").read_bytes()
    assert found[SIZE:] == OLD * (8 * MIB - SIZE)


def test_a_file_is_written_into_as_qemu_does(source: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        path.write_bytes(OLD * (SIZE + 4096))
    assert qcowfs("convert", "-n", "-O", "raw", source, ours).returncode == 0
    qemu_img("convert", "-n", "-O", "raw", source, theirs)
    assert ours.read_bytes() == theirs.read_bytes()


def test_zeros_are_written_where_the_host_cannot_make_them(
    source: Path, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such thing")

    async def copy() -> None:
        async with open_disk(source, "raw" if source.suffix == ".raw" else "qcow2") as disk:
            await convert(disk, device, Copying(into=True))

    monkeypatch.setattr(syscalls, "punch_hole", refuse)
    trio.run(copy)
    qemu_img("convert", "-O", "raw", source, tmp_path / "expected")
    found = device.read_bytes()
    assert found[:SIZE] == (tmp_path / "expected").read_bytes()
    assert found[SIZE:] == OLD * (8 * MIB - SIZE)


@pytest.mark.parametrize("source", ["raw"], indirect=True)
def test_what_must_not_be_written_into_stays_as_it_is(source: Path, device: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(content(SIZE - 512, "small"))
    before = small.read_bytes()
    for target, words, code, text in (
        (device, (), 2, "-n writes into a device"),
        (device, ("--force",), 2, "-n writes into a device"),
        (small, ("-n",), 2, f"has {SIZE - 512} bytes, the disk has {SIZE}"),
        (small, ("-n", "-O", "qcow2"), 2, "only a raw disk"),
        (source, ("-n",), 5, "in use"),
        (tmp_path / "none", ("-n",), 1, "No such file"),
    ):
        result = qcowfs("convert", *words, "-f", "raw", source, target)
        assert (result.returncode, text in result.stderr) == (code, True), result.stderr
    assert small.read_bytes() == before
    assert device.read_bytes() == OLD * 8 * MIB
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("source", ["raw"], indirect=True)
def test_a_mounted_device_is_refused(source: Path, tmp_path: Path) -> None:
    below, folder = tmp_path / "ext4", tmp_path / "mounted"
    with below.open("wb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", below)
    folder.mkdir()
    run("mount", "-o", "loop", below, folder)
    try:
        device = run("findmnt", "-no", "SOURCE", folder).stdout.strip()
        result = qcowfs("convert", "-n", "-f", "raw", source, device)
        assert (result.returncode, "mounted" in result.stderr) == (5, True), result.stderr
        (folder / "still").write_bytes(bytes(KIB))
    finally:
        run("umount", folder)
    run("fsck.ext4", "-fn", below)
