"""Snapshots taken, renamed and dropped as files of a writable mount; qemu-img judges what is in the image."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.kinds import Form, Made, extended_l2, over_raw, plain, zeroed, zlib
from tests.e2e.mounts import Mount, mounted
from tests.e2e.tools import (
    KIB,
    MIB,
    SECTOR,
    TIMEOUT,
    as_raw,
    assert_same,
    convert,
    create,
    peek,
    poke,
    qemu_img,
    qemu_info,
    raw_file,
    run,
    snapshot_table_at,
)
from tests.e2e.writes import assert_holds, assert_leaks_at_most, assert_sound, opened, write_to_both

CLUSTER = 64 * KIB
RECORD = struct.Struct(">QIHHIIQII")
LONG = "n" * 251


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 4 MiB that is full of content."""
    return convert(raw_file(tmp_path / "content", 4 * MIB, "live"), tmp_path / "image.qcow2")


@contextmanager
def refused(code: int) -> Iterator[None]:
    """Fail unless the body fails with that errno."""
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
        yield
    assert caught.value.errno == code


def take(mount: Mount, name: str) -> Path:
    """Take a snapshot by making its file; the file."""
    file = mount.snapshot(name)
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return file


def names(image: Path) -> list[str]:
    """What qemu-img lists, also of an image that is mounted."""
    return [record["name"] for record in qemu_info(image).get("snapshots", [])]


def files(mount: Mount) -> list[str]:
    return os.listdir(mount.snapshots)  # noqa: PTH208 - in order


def record_of(image: Path) -> tuple[tuple[int, ...], bytes]:
    """The numbers of the image's first snapshot record, and the bytes that follow them."""
    table = snapshot_table_at(image)
    fixed = RECORD.unpack(peek(image, table, RECORD.size))
    length = fixed[8] + fixed[2] + fixed[3]
    padded = -(-(RECORD.size + length) // 8) * 8 - RECORD.size
    return fixed, peek(image, table + RECORD.size, padded)


# -- what qemu-img sees


def test_touching_a_file_takes_a_snapshot_that_qemu_lists(image: Path) -> None:
    before = time.time()
    with mounted(image, writable=True) as mount:
        run("touch", mount.snapshot("before upgrade"))
        after = time.time()
        (record,) = qemu_info(image)["snapshots"]
        assert files(mount) == ["before upgrade.raw"]
        taken = record["date-sec"] * 10**9 + record["date-nsec"]
        status = mount.snapshot("before upgrade").stat()
        assert (status.st_mtime_ns, status.st_size) == (taken, 4 * MIB)
        assert status.st_mode & 0o777 == 0o400
    assert before <= taken / 10**9 <= after
    assert {key: value for key, value in record.items() if not key.startswith("date")} == {
        "id": "1", "name": "before upgrade", "vm-state-size": 0, "vm-clock-sec": 0, "vm-clock-nsec": 0,
    }  # fmt: skip
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["date-sec"]))
    line = qemu_img("snapshot", "-l", image).splitlines()[-1]
    assert re.fullmatch(rf"1 +before upgrade +0 B {date} 00:00:00\.000 *", line)
    assert_sound(image)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_the_record_has_the_layout_that_qemu_gives_it(version: str, tmp_path: Path) -> None:
    ours = convert(raw_file(tmp_path / "raw", MIB, "record"), tmp_path / "ours.qcow2", compat=version)
    theirs = tmp_path / "theirs.qcow2"
    shutil.copy(ours, theirs)
    qemu_img("snapshot", "-c", "näme", theirs)
    with mounted(ours, writable=True) as mount:
        take(mount, "näme")
    (_, *fixed), rest = record_of(ours)
    (_, *expected), expected_rest = record_of(theirs)
    assert fixed[:3] + fixed[5:] == expected[:3] + expected[5:]
    assert fixed[7] == 24
    assert rest[:24] == struct.pack(
        ">QQq", 0, MIB, -1
    )  # this qemu-img has 0 for -1, which says "not counted"
    assert (rest[:16], rest[24:].rstrip(b"\0")) == (expected_rest[:16], expected_rest[24:].rstrip(b"\0"))


def test_ids_go_on_from_the_largest_one_as_qemus_do(image: Path) -> None:
    for name in ("one", "two", "three"):
        qemu_img("snapshot", "-c", name, image)
    with mounted(image, writable=True) as mount:
        mount.snapshot("two").unlink()
        take(mount, "four")
        mount.snapshot("four").unlink()
        mount.snapshot("three").unlink()
        take(mount, "five")
    assert [(s["id"], s["name"]) for s in qemu_info(image)["snapshots"]] == [("1", "one"), ("2", "five")]
    assert_sound(image)


def test_a_file_of_that_name_can_be_made_only_once(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        take(mount, "once")
        with refused(errno.EEXIST):
            take(mount, "once")
        run("touch", mount.snapshot("once"))  # of a file that is there: no second snapshot
        with mount.snapshot("once").open("rb") as file:
            assert file.read(512) == peek(mount.disk, 0, 512)
        with refused(errno.EROFS):
            mount.snapshot("once").open("r+b")
        assert names(image) == ["once"]
    assert_sound(image)


def test_the_handle_that_made_a_snapshot_reads_it_and_writes_nothing(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        with opened(mount.snapshot("kept"), os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
            before = os.pread(fd, MIB, 0)
            poke(mount.disk, 0, bytes(MIB))
            assert os.pread(fd, MIB, 0) == before == (image.parent / "content").read_bytes()[:MIB]
            with refused(errno.EROFS):
                os.pwrite(fd, b"no", 0)
                os.fsync(fd)
        mount.take_complaints()
        assert peek(mount.snapshot("kept"), 0, MIB) == before
    assert_sound(image)


# -- what a snapshot holds


def _v2_compressed(folder: Path, _: Form) -> Made:
    return zlib(folder, Form("v2", CLUSTER))


def _tiny_clusters(folder: Path, _: Form) -> Made:
    return plain(folder, Form("v3", SECTOR))


def _wide_counts(folder: Path, form: Form) -> Made:
    return Made(convert(raw_file(folder / "raw", form.size, "wide"), folder / "i.qcow2", refcount_bits=64))


def _four_bit_counts(folder: Path, form: Form) -> Made:
    return Made(convert(raw_file(folder / "raw", form.size, "narrow"), folder / "i.qcow2", refcount_bits=4))


KINDS = [
    plain, zlib, extended_l2, zeroed, over_raw, _v2_compressed, _tiny_clusters, _wide_counts,
    _four_bit_counts,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__.strip("_"))
def test_each_snapshot_holds_what_was_written_before_it(
    kind: Callable[[Path, Form], Made], tmp_path: Path
) -> None:
    made = kind(tmp_path, Form("v3", CLUSTER))
    twin = as_raw(made.image, tmp_path / "twin")
    kept: dict[str, Path] = {}
    with mounted(made.image, *made.options, writable=True) as mount:
        for name in ("first", "second", "third"):
            write_to_both(mount.disk, twin, f"{kind.__name__} {name}", 8)
            take(mount, name)
            kept[name] = Path(shutil.copy(twin, tmp_path / name))
        write_to_both(mount.disk, twin, f"{kind.__name__} later", 8)
        for name, expected in kept.items():
            assert_same(mount.snapshot(name), expected)
        mount.snapshot("second").unlink()
        write_to_both(mount.disk, twin, f"{kind.__name__} last", 8)
        assert_same(mount.disk, twin)
        assert_leaks_at_most(made.image, "-U")
    assert_sound(made.image)
    assert_holds(made.image, twin)
    assert names(made.image) == ["first", "third"]
    for name in ("first", "third"):
        assert_same(as_raw(made.image, tmp_path / "raw", name), kept[name])


def test_what_was_written_through_a_shared_mapping_and_not_synced_is_in_the_snapshot(image: Path) -> None:
    with (
        mounted(image, writable=True) as mount,
        opened(mount.disk) as fd,
        mmap.mmap(fd, 4 * MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapping,
    ):
        for number in (1, 2, 3):
            for offset in range(100, 4 * MIB, 300_000):
                mapping[offset : offset + 5] = bytes([number]) * 5
            take(mount, f"{number}")
        for number in (1, 2, 3):
            with mount.snapshot(f"{number}").open("rb") as file:
                for offset in range(100, 4 * MIB, 300_000):
                    assert os.pread(file.fileno(), 5, offset) == bytes([number]) * 5
    assert_sound(image)


def test_an_empty_image_has_empty_snapshots(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 5 * MIB + SECTOR)
    with mounted(image, writable=True) as mount:
        take(mount, "nothing")
        poke(mount.disk, 5 * MIB, b"x" * SECTOR)
        take(mount, "end")
        assert mount.snapshot("nothing").read_bytes() == bytes(5 * MIB + SECTOR)
        assert mount.snapshot("nothing").stat().st_blocks == 0
        assert mount.snapshot("end").read_bytes() == bytes(5 * MIB) + b"x" * SECTOR
    assert_sound(image)


def test_snapshots_outlive_the_mount_and_go_on_in_the_next_one(image: Path, tmp_path: Path) -> None:
    twin = as_raw(image, tmp_path / "twin")
    for name in ("one", "two", "three"):
        with mounted(image, writable=True) as mount:
            take(mount, name)
            shutil.copy(twin, tmp_path / name)
            write_to_both(mount.disk, twin, name, 4)
    with mounted(image) as mount:
        assert files(mount) == ["one.raw", "two.raw", "three.raw"]
        for name in ("one", "two", "three"):
            assert_same(mount.snapshot(name), tmp_path / name)
    assert_holds(image, twin)
    assert_sound(image)


# -- names


NAMES = [
    ("a%2Fb.raw", "a/b"),
    ("%2E..raw", ".."),
    ("größe 🎉.raw", "größe 🎉"),
    (f"{LONG}.raw", LONG),
    ("100%25.raw", "100%"),
    ("a.raw.raw", "a.raw"),
    ("-x.raw", "-x"),
    ("1.raw", "1"),
    ("%FF%FE.raw", b"\xff\xfe".decode(errors="surrogateescape")),
]


def test_a_files_name_says_what_the_snapshot_is_called(image: Path) -> None:
    made = [file for file, _ in NAMES]
    with mounted(image, writable=True) as mount:
        for file in made:
            run("touch", "--", mount.snapshots / file)
        assert files(mount) == made
    with mounted(image) as mount:
        assert files(mount) == made
        for file, name in NAMES:
            assert os.getxattr(mount.snapshots / file, "user.qcowfs.name") == os.fsencode(name)
    assert_sound(image)


UNUSABLE = [
    "plain", "x.img", ".raw", ".hidden.raw", "100%.raw", "a%2fb.raw", "a%41.raw", "%id=7.raw", "x.RAW",
    "two\nlines.raw",
]  # fmt: skip


def test_a_file_name_that_no_snapshot_would_get_is_refused(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        take(mount, "good")
        for file in UNUSABLE:
            with refused(errno.EINVAL):
                os.close(os.open(mount.snapshots / file, os.O_CREAT | os.O_WRONLY))
            with refused(errno.EINVAL):
                mount.snapshot("good").rename(mount.snapshots / file)
        assert files(mount) == ["good.raw"]
    assert names(image) == ["good"]


def test_a_snapshot_is_renamed_within_its_folder_and_keeps_id_date_and_inode(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        before = take(mount, "old").stat()
        (record,) = qemu_info(image)["snapshots"]
        with mount.snapshot("old").open("rb") as handle:
            run("mv", mount.snapshot("old"), mount.snapshot("new name"))
            assert handle.read() == mount.disk.read_bytes()
        after = mount.snapshot("new name").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert files(mount) == ["new name.raw"]
        assert not mount.snapshot("old").exists()
        assert qemu_info(image)["snapshots"] == [record | {"name": "new name"}]
        take(mount, "old")
        assert names(image) == ["new name", "old"]
    assert_sound(image)


def test_a_snapshot_is_never_moved_over_another_or_out_of_its_folder(image: Path, tmp_path: Path) -> None:
    with mounted(image, writable=True) as mount:
        one, two = take(mount, "one"), take(mount, "two")
        with refused(errno.EEXIST):
            one.rename(two)
        with refused(errno.EPERM):
            one.rename(mount.folder / "one.raw")
        with refused(errno.EXDEV):
            one.rename(tmp_path / "one.raw")
        with refused(errno.EPERM):
            mount.disk.rename(mount.snapshot("disk"))
        with refused(errno.EPERM):
            mount.disk.unlink()
        with refused(errno.EPERM):
            (mount.folder / "more.raw").touch()
        with refused(errno.ENOENT):
            mount.snapshot("none").unlink()
        with refused(errno.ENOENT):
            mount.snapshot("none").rename(mount.snapshot("some"))
        one.rename(one)
        assert sorted(os.listdir(mount.folder)) == ["disk.raw", "snapshots"]  # noqa: PTH208
        assert files(mount) == ["one.raw", "two.raw"]
    assert names(image) == ["one", "two"]


def test_folders_links_and_special_files_are_no_snapshots(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        take(mount, "one")
        with pytest.raises(OSError, match=r"Read-only|not permitted|not implemented"):
            (mount.snapshots / "folder.raw").mkdir()
        with pytest.raises(OSError, match=r"Read-only|not permitted|not implemented"):
            mount.snapshot("link").symlink_to("one.raw")
        with pytest.raises(OSError, match=r"Read-only|not permitted|not implemented"):
            mount.snapshot("hard").hardlink_to(mount.snapshot("one"))
        with pytest.raises(OSError, match=r"Read-only|not permitted|not implemented"):
            os.mkfifo(mount.snapshot("pipe"))
        with pytest.raises(OSError, match=r"Read-only|not permitted|Not a directory"):
            mount.snapshots.rmdir()
        assert files(mount) == ["one.raw"]
    assert names(image) == ["one"]


# -- inodes and open handles


def test_no_inode_number_comes_twice_and_no_old_page_shows_under_a_name_used_again(image: Path) -> None:
    seen: set[int] = set()
    with mounted(image, writable=True) as mount:
        for number in range(1, 13):
            poke(mount.disk, 0, bytes([number]) * MIB)
            again = take(mount, "again")
            assert again.read_bytes()[:MIB] == bytes([number]) * MIB
            assert again.stat().st_ino not in seen
            seen.add(again.stat().st_ino)
            again.unlink()
            assert not again.exists()
    assert_sound(image)


def test_an_open_handle_of_a_dropped_snapshot_gives_right_bytes_or_a_clean_error(image: Path) -> None:
    expected = (image.parent / "content").read_bytes()
    with mounted(image, writable=True) as mount:
        file = take(mount, "dropped")
        with opened(file, os.O_RDONLY) as fd, opened(file, os.O_RDONLY | os.O_DIRECT) as direct:
            assert os.pread(fd, MIB, 0) == expected[:MIB]
            file.unlink()
            poke(mount.disk, 0, b"\xaa" * 4 * MIB)
            take(mount, "dropped")
            stale = 0
            for offset in range(0, 4 * MIB, 256 * KIB):
                for handle in (fd, direct):
                    try:
                        assert os.pread(handle, 4 * KIB, offset) == expected[offset : offset + 4 * KIB]
                    except OSError as error:
                        assert error.errno == errno.ESTALE  # noqa: PT017 - either outcome is right
                        stale += 1
            assert stale
        assert mount.snapshot("dropped").read_bytes() == b"\xaa" * 4 * MIB
        mount.take_complaints()
    assert_sound(image)


def test_a_snapshot_is_read_on_while_others_come_and_go(image: Path) -> None:
    expected = (image.parent / "content").read_bytes()
    rounds, wrong, ended = 0, [], threading.Event()

    def read_on(file: Path) -> None:
        nonlocal rounds
        with opened(file, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, MIB) as buffer:
            while not ended.is_set():
                offset = rounds % 4 * MIB
                if os.preadv(fd, [buffer], offset) != MIB or buffer[:] != expected[offset : offset + MIB]:
                    wrong.append(offset)
                rounds += 1

    with mounted(image, writable=True) as mount:
        reader = threading.Thread(target=read_on, args=(take(mount, "read"),))
        reader.start()
        try:
            for number in range(20):
                poke(mount.disk, number * 190_000, bytes([number]) * 190_000)
                take(mount, "other").unlink()
        finally:
            ended.set()
            reader.join(TIMEOUT)
    assert rounds > 4
    assert wrong == []
    assert_sound(image)
