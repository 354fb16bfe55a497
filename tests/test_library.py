"""A disk as a Python file: what `io` promises, what the engine promises, threads, forks and endings."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import trio

import qcowfs
from qcowfs.errors import CorruptImage, NotQcow2, UsageError
from tests.e2e.tools import (
    KIB,
    MIB,
    as_raw,
    convert,
    create,
    l2_entry_at,
    poke_word,
    qemu_img,
    qemu_info,
    qemu_io,
    raw_file,
)

SIZE = 3 * MIB + 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with compressed content and a snapshot, changed since."""
    image = convert(raw_file(tmp_path / "raw", SIZE, "library"), tmp_path / "x.qcow2", "-c")
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write -q -P 9 100k 300k")
    return image


def test_it_reads_what_qemu_reads_live_and_then(image: Path) -> None:
    for snapshot in (None, "then", "1"):
        expected = as_raw(image, image.with_suffix(".raw"), None if snapshot is None else "then").read_bytes()
        with qcowfs.open(image, snapshot) as disk:
            assert disk.size == len(expected) == SIZE
            assert disk.read() == expected
            assert disk.read() == b""


def test_it_is_a_file_to_buffered_readers_and_copies(image: Path) -> None:
    expected = as_raw(image, image.with_suffix(".raw")).read_bytes()
    copied = io.BytesIO()
    with qcowfs.open(image) as disk:
        shutil.copyfileobj(disk, copied, 70_001)
        disk.seek(0)
        reader = io.BufferedReader(disk, 4096)
        assert reader.peek(1) == expected[:4096]
    assert copied.getvalue() == expected


def test_positions_move_as_in_any_file(image: Path) -> None:
    with qcowfs.open(image) as disk:
        assert (disk.seek(-1, os.SEEK_END), disk.tell()) == (SIZE - 1, SIZE - 1)
        assert (len(disk.read(5)), disk.tell()) == (1, SIZE)
        assert (disk.seek(7, os.SEEK_CUR), disk.read(5)) == (SIZE + 7, b"")
        assert disk.readinto(bytearray(4)) == 0
        with pytest.raises(OSError, match="Invalid argument"):
            disk.seek(-1)
        with pytest.raises(ValueError, match="whence 9"):
            disk.seek(0, 9)
        assert (disk.readable(), disk.seekable(), disk.writable(), disk.mode) == (True, True, False, "rb")


def test_what_is_written_is_there_for_qemu(image: Path) -> None:
    with qcowfs.open(image, mode="r+") as disk:
        with tarfile.open(fileobj=disk, mode="w") as archive:
            archive.add(__file__, "this")
        assert disk.write_at(b"end" * 300, SIZE - 600) == 600
        disk.flush()
    qemu_img("check", image)
    raw = as_raw(image, image.with_suffix(".raw"))
    assert raw.read_bytes()[-600:] == b"end" * 200
    with tarfile.open(raw) as archive:
        [member] = archive.getmembers()
        assert member.size == Path(__file__).stat().st_size


def test_a_disk_never_grows(image: Path) -> None:
    with qcowfs.open(image, mode="r+") as disk:
        disk.seek(0, os.SEEK_END)
        with pytest.raises(OSError, match="No space") as caught:
            disk.write(b"more")
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(io.UnsupportedOperation):
            disk.truncate(0)


def test_reading_does_not_write(image: Path) -> None:
    before = image.read_bytes()
    with qcowfs.open(image) as disk, pytest.raises(io.UnsupportedOperation, match="mode 'r\\+' writes"):
        disk.write(b"x")
    assert image.read_bytes() == before


def test_it_tells_what_it_is(image: Path) -> None:
    with qcowfs.open(image) as disk:
        extents = list(disk.extents())
        assert [(s.id, s.name, s.disk_size) for s in disk.snapshots] == [(b"1", b"then", SIZE)]
        ours = disk.info
    assert sum(extent.length for extent in extents) == SIZE
    assert any(extent.compressed and extent.stored for extent in extents)
    assert {key: ours[key] for key in ("virtual-size", "format", "cluster-size")} == {
        key: qemu_info(image)[key] for key in ("virtual-size", "format", "cluster-size")
    }


def test_extents_know_what_was_just_written(tmp_path: Path) -> None:
    image = create(tmp_path / "x.qcow2", MIB)
    with qcowfs.open(image, mode="r+") as disk:
        assert not any(extent.data for extent in disk.extents())
        disk.write(b"x")
        assert [extent.start for extent in disk.extents() if extent.data and not extent.zero] == [0]


def test_a_raw_disk_is_read_too(tmp_path: Path) -> None:
    raw = raw_file(tmp_path / "raw", 100_001, "raw")
    for form in ("raw", None):
        with qcowfs.open(raw, format=form) as disk:
            assert disk.read() == raw.read_bytes()
            assert (disk.info["format"], disk.snapshots) == ("raw", [])
            assert sum(extent.length for extent in disk.extents()) == 100_352


def test_what_cannot_be_opened_raises_before_any_thread_is_left(image: Path, tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(FileNotFoundError):
        qcowfs.open(tmp_path / "none")
    with pytest.raises(NotQcow2):
        qcowfs.open(tmp_path / "raw")
    with pytest.raises(UsageError, match='no snapshot has the id or name \'x\'; there are: "1" "then"'):
        qcowfs.open(image, "x")
    with pytest.raises(UsageError, match="read-only"):
        qcowfs.open(image, "then", "r+")
    with pytest.raises(UsageError, match="mode 'w'"):
        qcowfs.open(image, mode="w")
    with pytest.raises(UsageError, match="raw disks are only read"):
        qcowfs.open(tmp_path / "raw", mode="r+", format="raw")
    assert threading.active_count() == threads


def test_damage_is_an_error_that_leaves_the_disk_usable(tmp_path: Path) -> None:
    image = create(tmp_path / "x.qcow2", MIB)
    qemu_io(image, "write -q -P 5 0 128k")
    poke_word(image, l2_entry_at(image, 0), 3 * 512)
    with qcowfs.open(image) as disk:
        with pytest.raises(CorruptImage, match="guest offset 0x0"):
            disk.read(10)
        assert disk.tell() == 0
        disk.seek(64 * KIB)
        assert disk.read(3) == b"\5\5\5"


def test_a_closed_disk_says_so(image: Path) -> None:
    disk = qcowfs.open(image)
    disk.close()
    disk.close()
    for call in (disk.read, disk.tell, disk.readable, lambda: disk.info, lambda: list(disk.extents())):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_threads_share_a_disk(image: Path) -> None:
    expected = as_raw(image, image.with_suffix(".raw")).read_bytes()
    wrong: list[int] = []

    def look(first: int) -> None:
        for offset in range(first, SIZE, 16 * KIB * 4):
            part = bytearray(16 * KIB)
            length = disk.readinto_at(part, offset)
            if part[:length] != expected[offset : offset + length]:
                wrong.append(offset)

    with qcowfs.open(image) as disk:
        threads = [threading.Thread(target=look, args=(n * 16 * KIB,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


async def test_it_works_within_a_trio_program(image: Path) -> None:
    with qcowfs.open(image) as disk:
        first = disk.read(4096)
    async with await qcowfs.Image.open(image) as same:
        buffer = bytearray(4096)
        await same.active.read_into(0, memoryview(buffer))
    await trio.lowlevel.checkpoint()
    assert buffer == first


FORK = """
import os, sys, qcowfs
disk = qcowfs.open(sys.argv[1], mode="r+")
disk.write(b"parent")
if (pid := os.fork()) == 0:
    try:
        disk.read(1)
    except qcowfs.QcowError as error:
        print("child:", error, flush=True)
    sys.exit(0)
os.waitpid(pid, 0)
disk.write(b" still writes")
"""


def test_a_forked_child_is_refused_and_disturbs_nobody(image: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORK, image], capture_output=True, text=True, timeout=60, check=True
    )
    assert "opened before this process was forked" in result.stdout
    # the parent did not close: its end did
    assert as_raw(image, image.with_suffix(".raw")).read_bytes().startswith(b"parent still writes")
    qemu_img("check", image)


def test_it_needs_no_fuse_and_loads_nothing_early(image: Path) -> None:
    code = (
        "import sys; sys.modules['pyfuse3'] = None\n"
        "import qcowfs\n"
        "assert not {'trio', 'numpy'} & set(sys.modules)\n"
        "print(len(qcowfs.open(sys.argv[1]).read()))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, image],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.stdout, result.stderr) == (f"{SIZE}\n", "")


def test_the_public_names_are_these() -> None:
    names = [
        "DiskExtent",
        "DiskFile",
        "Image",
        "Keys",
        "OpenOptions",
        "QcowError",
        "Snapshot",
        "__version__",
        "open",
    ]
    assert qcowfs.__all__ == names
    assert all(getattr(qcowfs, name) is not None for name in names)
    stub = Path(qcowfs.__file__).with_suffix(".pyi").read_text()
    assert all(name in stub for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'made_up'"):
        _ = qcowfs.made_up  # type: ignore[attr-defined] # that is the point
