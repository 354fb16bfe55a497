"""What the host does to a writable mount: a full file system, an image that may not be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import Mount, mounted, refusal
from tests.e2e.tools import KIB, MIB, assert_same, create, poke_word, qemu_img, qemu_io, run, until, word
from tests.e2e.writes import assert_holds, assert_leaks_at_most, assert_sound, changes, opened, put

SIZE = 48 * MIB
ROOM = 24 * MIB
FILLER = 8 * MIB
CHUNK = 300 * KIB
INCOMPATIBLE = 72


def _ext4(folder: Path) -> None:
    disk = folder.with_suffix(".disk")
    disk.touch()
    os.truncate(disk, ROOM)
    run("mkfs.ext4", "-q", "-F", "-m", "0", disk)
    run("mount", "-o", "loop", disk, folder)


def _tmpfs(folder: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder)


@pytest.fixture(params=[_ext4, _tmpfs], ids=["ext4", "tmpfs"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system, a part of which is taken by a file called filler."""
    folder = tmp_path / "small"
    folder.mkdir()
    request.param(folder)
    try:
        (folder / "filler").write_bytes(b"\1" * FILLER)
        yield folder
    finally:
        run("umount", folder)


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    twin = tmp_path / "twin"
    twin.touch()
    os.truncate(twin, SIZE)
    return twin


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Path]:
    """A block device that takes 12 MiB and fails to write more to its disk."""
    folder = tmp_path / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=12M", "tmpfs", folder)
    try:
        below = folder / "below"
        below.touch()
        os.truncate(below, 128 * MIB)
        device = run("losetup", "--find", "--show", below).stdout.strip()
        try:
            yield Path(device)
        finally:
            run("losetup", "--detach", device)
    finally:
        run("umount", folder)


def test_once_a_sync_failed_every_later_one_does(failing: Path, tmp_path: Path) -> None:
    """The host drops what it could not write, so that its own next sync succeeds without it."""
    create(failing, SIZE)
    with mounted(failing, writable=True, beside=tmp_path) as mount:
        fd = os.open(mount.disk, os.O_RDWR)
        for number in range(40):
            put(fd, number * MIB, bytes([number]) * MIB)
        for call in (os.fsync, os.fsync, os.fdatasync, os.close):
            with pytest.raises(OSError, match="Input/output error"):
                call(fd)
        run("umount", mount.folder)
        assert mount.wait() == 1
        complaints = mount.take_complaints()
        assert any("an earlier sync failed" in line for line in complaints)
        mount.process.returncode = 0  # as it should be for any other mount


def chunk(number: int) -> tuple[int, bytes]:
    return number * CHUNK, number.to_bytes(2, "big") * (CHUNK // 2)


def write_until_full(fd: int) -> int:
    """Write chunks one after the other, each synced, until the host is full; how many were synced."""
    for number in range(SIZE // CHUNK):
        try:
            put(fd, *chunk(number))
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return number
    raise AssertionError("the host never ran full")


def assert_only_space_was_missing(mount: Mount) -> None:
    lines = mount.take_complaints()
    assert all("No space left on device" in line for line in lines), lines


def test_a_full_host_is_told_to_the_writer_and_writing_goes_on_once_there_is_space(
    small: Path, twin: Path
) -> None:
    image = create(small / "image.qcow2", SIZE)
    with mounted(image, writable=True, beside=twin.parent) as mount:
        with opened(mount.disk) as fd, opened(twin) as other:
            synced = write_until_full(fd)
            assert synced * CHUNK > (ROOM - FILLER) // 2
            assert_leaks_at_most(image, "-U")
            for number in range(synced):
                offset, data = chunk(number)
                assert os.pread(fd, CHUNK, offset) == data
            (small / "filler").unlink()
            for number in range(synced + 5):
                put(other, *chunk(number))
                if number >= synced:
                    put(fd, *chunk(number))
            os.fsync(fd)
        assert_same(mount.disk, twin)
        assert_only_space_was_missing(mount)
    assert_sound_or_leaking(image)
    assert_holds(image, twin)


def assert_sound_or_leaking(image: Path) -> None:
    """A flush that failed half way may leave counts too high, never anything worse."""
    assert_leaks_at_most(image)
    qemu_img("check", "-q", "-r", "leaks", image)
    assert_sound(image)


def test_random_writes_to_a_full_host_never_harm_the_image(small: Path, twin: Path) -> None:
    """Each write is repeated until it works; the host has space again after a few failures."""
    image = create(small / "image.qcow2", SIZE, cluster_size=4096)
    failures = 0
    with mounted(image, writable=True, beside=twin.parent) as mount:
        with opened(mount.disk) as fd, opened(twin) as other:
            for offset, data in changes(SIZE, "a full host", 500):
                put(other, offset, data)
                while not written(fd, offset, data):
                    failures += 1
                    assert_leaks_at_most(image, "-U")
                    if failures == 4:
                        (small / "filler").unlink()
                    assert failures < 5
                if failures:
                    break
        assert failures == 4
        assert_same(mount.disk, twin)
        assert_only_space_was_missing(mount)
    assert_sound_or_leaking(image)
    assert_holds(image, twin)


def written(fd: int, offset: int, data: bytes) -> bool:
    """Write and sync; whether the host had space for it."""
    try:
        put(fd, offset, data)
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def test_an_image_that_stays_on_a_full_host_is_consistent_after_the_unmount(small: Path, twin: Path) -> None:
    image = create(small / "image.qcow2", SIZE)
    with mounted(image, writable=True, beside=twin.parent) as mount:
        with opened(mount.disk) as fd:
            synced = write_until_full(fd)
        run("umount", mount.folder)
        until(lambda: mount.process.poll() is not None)
        assert_only_space_was_missing(mount)
        mount.process.returncode = 0  # whether the last write-back failed is the host's affair
    assert_leaks_at_most(image)
    with mounted(image, beside=twin.parent) as mount, opened(mount.disk, os.O_RDONLY) as fd:
        assert all(os.pread(fd, CHUNK, n * CHUNK) == chunk(n)[1] for n in range(synced))


REPAIR = "repair it with qcowfs check --repair all, or open it read-only"


@pytest.mark.parametrize(
    ("bits", "rule"),
    [
        (1, "is marked dirty (not closed cleanly), its refcounts may be wrong"),
        (2, "is marked corrupt, so nothing may be written"),
        (3, "is marked corrupt, so nothing may be written"),
    ],
)
def test_a_dirty_or_corrupt_image_is_refused_for_writing(bits: int, rule: str, tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    poke_word(image, INCOMPATIBLE, bits)
    before = image.read_bytes()
    result = refusal(image, tmp_path / "here", writable=True)
    assert result.returncode == 4
    assert result.stderr.splitlines()[-1] == f"qcowfs: {image}: {rule}; {REPAIR}"
    assert image.read_bytes() == before
    qemu_img("check", "-q", "-r", "all", image)
    with mounted(image, writable=True) as mount, opened(mount.disk) as fd:
        put(fd, 0, b"repaired")
    assert (word(image, INCOMPATIBLE), image.stat().st_size > len(before)) == (0, True)
    qemu_io(image, "read -P 0x72 0 1")
