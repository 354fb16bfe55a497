"""Space on real mounts: ranges zeroed and given back, places of data and holes found, by ordinary tools."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.mounts import Mount, loop_mounted, mounted
from tests.e2e.tools import (
    KIB,
    MIB,
    Word,
    as_raw,
    assert_same,
    attempt,
    content,
    create,
    qemu_img,
    qemu_io,
    run,
    until,
)
from tests.e2e.writes import assert_holds, assert_sound, opened, put

GIB, TIB = 1 << 30, 1 << 40
SIZE = 4 * MIB
FIELDS: dict[str, dict[str, object]] = {
    "plain": {},
    "small clusters": {"cluster_size": 512},
    "version 2": {"compat": "0.10"},
    "subclusters": {"extended_l2": "on", "cluster_size": 16 * KIB},
}


@contextmanager
def twins(folder: Path, *words: Word, **fields: object) -> Iterator[tuple[Mount, Path]]:
    """A mounted image full of data of all kinds, with a snapshot, and a raw file that holds the same."""
    image, twin = create(folder / "image.qcow2", SIZE, *words, **fields), folder / "twin"
    cluster = 64 * KIB
    qemu_io(image, f"write -q -P 1 0 {2 * MIB}")
    if not fields.get("extended_l2"):
        qemu_io(image, *(f"write -q -c -P 2 {2 * MIB + n * cluster} {cluster}" for n in range(4)))
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, f"write -q -P 3 {MIB} {512 * KIB}", f"write -q -z {3 * MIB} {100 * KIB}")
    as_raw(image, twin)
    with mounted(image, writable=True) as mount:
        yield mount, twin
    assert_sound(image)
    assert_holds(image, twin)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("backed", [False, True])
def test_ranges_of_all_kinds_of_clusters_read_as_zeros_and_the_snapshot_stays(
    fields: dict[str, object], backed: bool, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.write_bytes(content(SIZE, "base"))
    words = ("-b", base, "-F", "raw") if backed else ()
    with twins(tmp_path, *words, **fields) as (mount, twin):
        before = mount.snapshot("before").read_bytes()
        for mode in ("-p", "-z -n", "-z"):
            for start, length in (
                (100, 70_000), (MIB - 5, 9), (MIB + 64 * KIB, 128 * KIB), (2 * MIB + 1, 200_000),
                (3 * MIB - 512, 64 * KIB), (SIZE - 70_001, 70_001),
            ):  # fmt: skip
                at = start - (len(mode) * 4096 if start > 100_000 else 0)
                for path in (mount.disk, twin):
                    run("fallocate", *mode.split(), "-o", str(at), "-l", str(length), path)
        assert_same(mount.disk, twin)
        assert mount.disk.stat().st_size == SIZE
        assert mount.snapshot("before").read_bytes() == before


def fallocate(path: Path, *words: str) -> str:
    return attempt("fallocate", *words, path).stderr.partition(": ")[2].strip()


def test_the_end_of_the_disk_stays_where_it_is(tmp_path: Path) -> None:
    with twins(tmp_path) as (mount, twin):
        beyond = ("-o", str(SIZE - MIB), "-l", str(2 * MIB))
        full, unknown = (
            "fallocate failed: No space left on device",
            "fallocate failed: Operation not supported",
        )
        assert fallocate(mount.disk, "-z", *beyond) == full
        assert fallocate(mount.disk, "-l", str(2 * SIZE)) in (full, unknown)
        assert fallocate(mount.disk, "-l", str(MIB)) == unknown
        assert fallocate(mount.disk, "-c", "-o", "0", "-l", str(MIB)) == unknown
        assert_same(mount.disk, twin)
        run("fallocate", "-p", *beyond, mount.disk)
        run("fallocate", "-z", "-n", *beyond, mount.disk)
        run("fallocate", "-p", "-o", str(5 * SIZE), "-l", "4096", mount.disk)
        with opened(twin) as fd:
            put(fd, SIZE - MIB, bytes(MIB))
        assert mount.disk.stat().st_size == SIZE


def test_snapshots_and_read_only_mounts_give_no_space_back(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", SIZE)
    qemu_io(image, f"write -q -P 5 0 {MIB}")
    qemu_img("snapshot", "-c", "before", image)
    before = image.read_bytes()
    with mounted(image, writable=True) as mount:
        assert attempt("fallocate", "-p", "-l", "4096", mount.snapshot("before")).returncode == 1
    with mounted(image) as mount:
        assert attempt("fallocate", "-p", "-l", "4096", mount.disk).returncode == 1
    assert image.read_bytes() == before


def test_discarded_space_goes_back_to_the_host(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 64 * MIB)
    with mounted(image, writable=True) as mount:
        with opened(mount.disk) as fd:
            put(fd, 0, os.urandom(MIB) * 32)
            os.fsync(fd)
        full = image.stat().st_blocks * 512
        device = run("losetup", "--show", "-f", "--direct-io=on", mount.disk).stdout.strip()
        try:
            run("blkdiscard", "-o", str(8 * MIB), "-l", str(16 * MIB), device)
        finally:
            run("losetup", "-d", device)
        run("sync", "-d", mount.disk)
        assert full - image.stat().st_blocks * 512 >= 15 * MIB
        shown = mount.disk.read_bytes()
        assert shown[8 * MIB : 24 * MIB].count(0) == 16 * MIB
        assert shown[7 * MIB : 8 * MIB].count(0) < MIB // 64
    assert_sound(image)


@pytest.mark.parametrize("by", ["fstrim", "discard"])
def test_deleted_files_of_a_guest_give_their_space_back(by: str, tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 128 * MIB)
    with mounted(image, writable=True) as mount:
        run("mkfs.ext4", "-q", "-F", mount.disk)
        folder = tmp_path / "guest"
        with loop_mounted(mount.disk, folder, writable=True):
            if by == "discard":
                run("mount", "-o", "remount,discard", folder)
            (folder / "large").write_bytes(os.urandom(MIB) * 24)
            (folder / "kept").write_bytes(b"kept" * 5000)
            run("sync", "-f", folder)
            full = image.stat().st_blocks * 512
            (folder / "large").unlink()
            run("sync", "-f", folder)
            if by == "fstrim":
                run("fstrim", folder)
            # Unmounting drops what the guest's file system has not discarded yet.
            until(lambda: full - image.stat().st_blocks * 512 > 20 * MIB)
        with loop_mounted(mount.disk, folder):
            assert (folder / "kept").read_bytes() == b"kept" * 5000
    assert full - image.stat().st_blocks * 512 > 20 * MIB
    assert_sound(image)


# -- where data and holes are


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """Ranges of data, as lseek tells them."""
    found, at = [], 0
    with opened(path, os.O_RDONLY) as fd:
        size = os.fstat(fd).st_size
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO  # noqa: PT017 - there may be more data as well
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, at))
    return found


def mapped_ranges(image: Path, *words: Word) -> list[tuple[int, int]]:
    """Ranges of data, as QEMU tells them."""
    found: list[tuple[int, int]] = []
    for extent in json.loads(qemu_img("map", "-U", "--output=json", *words, image)):
        if extent["data"]:
            start, end = extent["start"], extent["start"] + extent["length"]
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
    return found


@pytest.mark.parametrize("kind", ["alone", "qcow2", "raw", "short raw"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_data_and_holes_are_where_qemu_sees_them(
    fields: dict[str, object], kind: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    words: tuple[Word, ...] = ()
    if kind == "qcow2":
        create(base, SIZE)
        qemu_io(base, f"write -q -P 9 {3 * MIB} 300k", "write -q -P 9 10k 1k", f"write -q -z {3 * MIB} 64k")
        words = ("-b", base, "-F", "qcow2")
    elif kind != "alone":
        base.write_bytes(b"\1" * 70_000)
        os.truncate(base, 2 * MIB if kind == "short raw" else SIZE)
        with opened(base) as fd:
            put(fd, MIB + 512 * KIB, b"\2" * 100_000)
        words = ("-b", base, "-F", "raw")
    image = create(tmp_path / "image.qcow2", SIZE, *words, **fields)
    qemu_io(image, "write -q -P 1 256k 200k", f"write -q -z {MIB} 64k", f"write -q -P 1 {2 * MIB} 512")
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -q -z 320k 64k", f"write -q -P 2 {3 * MIB + 512 * KIB} 128k")
    with mounted(image) as mount:
        assert data_ranges(mount.disk) == mapped_ranges(image)
        shown = mount.snapshot("before")
        places = data_ranges(shown)
        data = shown.read_bytes()
        assert places
        for start, end in zip([0, *(e for _, e in places)], [*(s for s, _ in places), SIZE], strict=True):
            assert data.count(0, start, end) == end - start
        assert (256 * KIB, 456 * KIB) in [(s, min(e, 456 * KIB)) for s, e in places]


@pytest.mark.parametrize("size", [TIB, 128 * GIB])
def test_a_large_disk_that_holds_little_is_packed_and_copied_sparsely(size: int, tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", size)
    qemu_io(image, f"write -q -P 7 {5 * GIB} 100k", f"write -q -P 8 {size - 4096} 4096")
    copy, packed = tmp_path / "copy", tmp_path / "packed.tar"
    with mounted(image) as mount:
        assert int(run("du", "-B1", mount.disk).stdout.split()[0]) <= MIB
        assert [start for start, _ in data_ranges(mount.disk)] == [5 * GIB, size - 64 * KIB]
        run("tar", "-S", "-C", mount.folder, "-cf", packed, "disk.raw")
        if size < TIB:  # QEMU asks for the same hole again with every 2 GiB of it
            qemu_img("convert", "-f", "raw", "-O", "qcow2", mount.disk, copy)
            assert mapped_ranges(copy)[0][0] == 5 * GIB
            qemu_io(copy, f"read -q -P 7 {5 * GIB} 100k", f"read -q -P 8 {size - 4096} 4096")
    assert packed.stat().st_size < MIB


def test_cp_keeps_holes(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 4 * GIB)
    qemu_io(image, f"write -q -P 7 {3 * GIB} 100k")
    copy = tmp_path / "copy"
    with mounted(image) as mount:
        run("cp", "--sparse=auto", mount.disk, copy)
    assert (copy.stat().st_size, copy.stat().st_blocks * 512 < MIB) == (4 * GIB, True)
    with opened(copy, os.O_RDONLY) as fd:
        assert os.pread(fd, 100 * KIB, 3 * GIB) == b"\7" * 100 * KIB


def test_programs_that_truncate_first_write_to_a_disk_of_the_same_size(tmp_path: Path) -> None:
    with twins(tmp_path) as (mount, twin):
        new = tmp_path / "new"
        new.write_bytes(content(3 * MIB, "new"))
        run("sh", "-c", 'printf hello > "$1"', "sh", mount.disk)
        run("dd", f"if={new}", f"of={mount.disk}", "bs=64K", "count=8", "status=none")
        run("cp", new, mount.disk)
        assert mount.disk.stat().st_size == SIZE
        with opened(twin) as fd:
            put(fd, 0, new.read_bytes())
        assert_same(mount.disk, twin)


# -- without the compiled session


MISSING, OLDER = "None", "__import__('types').ModuleType('older')"


def with_session(folder: Path, session: str) -> dict[str, str]:
    """An environment in which Python finds that in its place."""
    lines = f"import sys\nsys.modules['qcowfs.daemon._session'] = {session}\n"
    (folder / "sitecustomize.py").write_text(lines)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize("session", [MISSING, OLDER])
def test_a_mount_without_the_compiled_session_works_and_says_so_once(session: str, tmp_path: Path) -> None:
    image, twin = create(tmp_path / "image.qcow2", SIZE), tmp_path / "twin"
    twin.touch()
    os.truncate(twin, SIZE)
    text = "without the compiled session: no fallocate, discard or SEEK_HOLE, and slower; see README"
    with mounted(image, writable=True, env=with_session(tmp_path, session)) as mount:
        data = content(2 * MIB, "data")
        for path in (mount.disk, twin):
            with opened(path) as fd:
                put(fd, MIB + 77, data)
        assert fallocate(mount.disk, "-p", "-l", "4096") == "fallocate failed: keep size mode is unsupported"
        with opened(mount.disk, os.O_RDONLY) as fd:
            assert (os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 0, os.SEEK_HOLE)) == (0, SIZE)
        run("sh", "-c", ': > "$1"', "sh", mount.disk)
        assert_same(mount.disk, twin)
        complaints = mount.take_complaints()
        assert [line for line in complaints if text in line] == complaints
        assert len(complaints) == 1
    assert_sound(image)
    assert_holds(image, twin)
