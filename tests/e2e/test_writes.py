"""disk.raw of a writable mount is written as a block device of fixed size is, whatever way is taken."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import Mount, mounted
from tests.e2e.tools import KIB, MIB, SECTOR, as_raw, assert_same, convert, qemu_img, raw_file, run, until
from tests.e2e.writes import assert_holds, assert_on_disk, assert_sound, checked, opened, put

SIZE = 2 * MIB + 5 * SECTOR
CLUSTER = 64 * KIB
DATA = random.Random("data").randbytes(MIB)


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    return raw_file(tmp_path / "twin", SIZE, "writes")


@pytest.fixture
def mount(twin: Path) -> Iterator[Mount]:
    """A writable mount of what the twin holds; afterwards the image must hold what the twin does then."""
    image = convert(twin, twin.parent / "image.qcow2")
    qemu_img("snapshot", "-c", "before", image)
    frozen = as_raw(image, twin.parent / "frozen")
    with mounted(image, writable=True) as mount:
        yield mount
    assert_sound(image)
    assert_holds(image, twin)
    assert_same(as_raw(image, twin.parent / "snapshot", "before"), frozen)


def put_into_twin(twin: Path, offset: int, data: bytes) -> None:
    with opened(twin) as fd:
        put(fd, offset, data)


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, SIZE + 10 * MIB])
def test_a_write_past_the_end_finds_no_space(offset: int, mount: Mount) -> None:
    with opened(mount.disk) as fd, pytest.raises(OSError, match="No space left") as caught:
        os.pwrite(fd, b"x", offset)
    assert caught.value.errno == errno.ENOSPC
    assert mount.disk.stat().st_size == SIZE


def test_an_append_finds_no_space(mount: Mount) -> None:
    with opened(mount.disk, os.O_WRONLY | os.O_APPEND) as fd:
        with pytest.raises(OSError, match="No space left") as caught:
            os.write(fd, b"x")
        assert caught.value.errno == errno.ENOSPC
    assert mount.disk.stat().st_size == SIZE


@pytest.mark.parametrize("extra", [1, 5000, 600_000])
def test_a_write_over_the_end_is_short(extra: int, mount: Mount, twin: Path) -> None:
    fits = 700
    with opened(mount.disk) as fd:
        assert os.pwrite(fd, DATA[: fits + extra], SIZE - fits) == fits
        assert os.pread(fd, fits + extra, SIZE - fits) == DATA[:fits]
    assert mount.disk.stat().st_size == SIZE
    put_into_twin(twin, SIZE - fits, DATA[:fits])


def test_a_handle_that_may_only_write_changes_parts_of_pages(mount: Mount, twin: Path) -> None:
    with opened(mount.disk, os.O_WRONLY) as fd:
        for offset in (1, 5000, CLUSTER - 3, 3 * CLUSTER + 4095):
            put(fd, offset, DATA[:777])
            put_into_twin(twin, offset, DATA[:777])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pread(fd, 1, 0)
    assert_same(mount.disk, twin)


def test_direct_writes_are_seen_by_cached_reads(mount: Mount, twin: Path) -> None:
    with opened(mount.disk) as cached, opened(mount.disk, os.O_RDWR | os.O_DIRECT) as direct:
        assert len(os.pread(cached, SIZE, 0)) == SIZE
        with mmap.mmap(-1, 20 * KIB) as buffer:  # page aligned, as direct writes must be
            buffer.write(DATA[: 20 * KIB])
            assert os.pwrite(direct, buffer, CLUSTER - 4 * KIB) == 20 * KIB
        assert os.pread(cached, 20 * KIB, CLUSTER - 4 * KIB) == DATA[: 20 * KIB]
    put_into_twin(twin, CLUSTER - 4 * KIB, DATA[: 20 * KIB])


def test_what_is_written_through_a_shared_mapping_arrives(mount: Mount, twin: Path) -> None:
    with opened(mount.disk) as fd, mmap.mmap(fd, SIZE) as shared:
        for offset in (0, 70_001, SIZE - 333):
            shared[offset : offset + 333] = DATA[:333]
            put_into_twin(twin, offset, DATA[:333])
        shared.flush()
        os.fsync(fd)
        assert_on_disk(mount, twin)


def test_a_mapping_that_is_never_synced_arrives_with_the_unmount(mount: Mount, twin: Path) -> None:
    with opened(mount.disk) as fd, mmap.mmap(fd, SIZE) as shared:
        shared[12_345:12_388] = DATA[:43]
    put_into_twin(twin, 12_345, DATA[:43])
    mount.unmount()
    assert_holds(mount.image, twin)


def test_two_writers_on_neighbouring_ranges_do_not_disturb_each_other(mount: Mount, twin: Path) -> None:
    """Stripes of an odd width: most clusters and pages are shared by both."""
    width, count = 3001, SIZE // 3001
    failures: list[OSError | AssertionError] = []

    def write_stripes(first: int) -> None:
        try:
            with opened(mount.disk) as fd:
                for number in range(first, count, 2):
                    put(fd, number * width, bytes([1 + number % 255]) * width)
        except (OSError, AssertionError) as failure:
            failures.append(failure)

    threads = [threading.Thread(target=write_stripes, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    put_into_twin(twin, 0, b"".join(bytes([1 + n % 255]) * width for n in range(count)))
    assert_same(mount.disk, twin)


SYNCS: dict[str, Callable[[int], object]] = {
    "fsync": os.fsync,
    "fdatasync": os.fdatasync,
    "syncfs": lambda fd: run("sync", "-f", f"/proc/{os.getpid()}/fd/{fd}"),
    "closing a copy": lambda fd: os.close(os.dup(fd)),
}


@pytest.mark.parametrize("sync", SYNCS.values(), ids=SYNCS)
def test_what_was_synced_is_in_the_image_while_it_is_mounted(
    sync: Callable[[int], object], mount: Mount, twin: Path
) -> None:
    with opened(mount.disk) as fd:
        put(fd, 3 * CLUSTER - 5, DATA[:CLUSTER])
        put_into_twin(twin, 3 * CLUSTER - 5, DATA[:CLUSTER])
        sync(fd)
        assert_on_disk(mount, twin)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_a_synchronous_write_is_in_the_image_when_it_returns(flag: int, mount: Mount, twin: Path) -> None:
    put_into_twin(twin, 99_999, DATA[:9])
    with opened(mount.disk, os.O_RDWR | flag) as fd:
        put(fd, 99_999, DATA[:9])
        assert_on_disk(mount, twin)


def test_what_nobody_syncs_reaches_the_image_soon_by_itself(mount: Mount, twin: Path) -> None:
    with opened(mount.disk) as fd:
        put(fd, CLUSTER + 17, DATA)
        put_into_twin(twin, CLUSTER + 17, DATA)
        seen = twin.with_suffix(".seen")
        until(lambda: as_raw(mount.image, seen).read_bytes() == twin.read_bytes())
        until(lambda: checked(mount.image, "-U").returncode == 0)


def test_a_write_and_a_touch_set_the_time(mount: Mount, twin: Path) -> None:
    before = mount.disk.stat().st_mtime_ns
    with opened(mount.disk) as fd:
        put(fd, 0, b"now")
        put_into_twin(twin, 0, b"now")
    until(lambda: mount.disk.stat().st_mtime_ns > before)
    os.utime(mount.disk, ns=(10**18, 10**18))
    assert mount.disk.stat().st_mtime_ns == 10**18


def test_the_live_disk_alone_is_shown_as_writable(mount: Mount) -> None:
    snapshot = mount.snapshot("before").stat()
    assert stat.filemode(mount.disk.stat().st_mode) == "-rw-------"
    assert stat.filemode(snapshot.st_mode) == "-r--------"
    (line,) = [x for x in Path("/proc/self/mounts").read_text().splitlines() if f" {mount.folder} " in x]
    assert {"rw", "nosuid", "nodev", "default_permissions"} <= set(line.split(" ")[3].split(","))


REFUSED: dict[str, tuple[int, Callable[[Path], object]]] = {
    "change the mode": (errno.EPERM, lambda folder: (folder / "disk.raw").chmod(0o644)),
    "change the owner": (errno.EPERM, lambda folder: os.chown(folder / "disk.raw", 1, 1)),
    "shrink": (errno.EINVAL, lambda folder: os.truncate(folder / "disk.raw", SIZE - SECTOR)),
    "remove": (errno.EPERM, lambda folder: (folder / "disk.raw").unlink()),
    "rename": (errno.EPERM, lambda folder: (folder / "disk.raw").rename(folder / "other")),
    "create": (errno.EPERM, lambda folder: (folder / "new").touch()),
    "make a folder": (errno.EROFS, lambda folder: (folder / "new").mkdir()),
    "write to a snapshot": (errno.EROFS, lambda folder: _snapshot(folder).open("r+b")),
    "cut a snapshot": (errno.EROFS, lambda folder: os.truncate(_snapshot(folder), 0)),
}


def _snapshot(folder: Path) -> Path:
    return folder / "snapshots" / "before.raw"


@pytest.mark.parametrize(("number", "change"), REFUSED.values(), ids=REFUSED)
def test_nothing_but_the_content_and_snapshots_can_be_changed(
    number: int, change: Callable[[Path], object], mount: Mount
) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        change(mount.folder)
    assert caught.value.errno == number
    assert mount.disk.stat().st_size == SIZE


def test_cutting_to_the_size_it_has_changes_nothing(mount: Mount, twin: Path) -> None:
    os.truncate(mount.disk, SIZE)
    assert_same(mount.disk, twin)


def test_fio_finds_again_what_it_wrote_at_random_places(mount: Mount, twin: Path) -> None:
    run(
        "fio", "--name=job", f"--filename={mount.disk}", "--size=2m", "--rw=randwrite", "--bsrange=4k-64k",
        "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--loops=6",
        "--randseed=7", "--ioengine=psync", "--fsync=32", "--allow_file_create=0", "--output-format=terse",
    )  # fmt: skip
    twin.write_bytes(mount.disk.read_bytes())


def test_fio_finds_again_what_several_jobs_wrote_directly(mount: Mount, twin: Path) -> None:
    run(
        "fio", "--name=job", f"--filename={mount.disk}", "--size=512k", "--offset_increment=512k",
        "--numjobs=4", "--rw=randwrite", "--bsrange=4k-64k", "--direct=1", "--verify=crc32c",
        "--verify_fatal=1", "--verify_state_save=0", "--io_size=4m", "--randseed=8",
        "--ioengine=libaio", "--iodepth=8", "--allow_file_create=0", "--output-format=terse", "--thread",
    )  # fmt: skip
    twin.write_bytes(mount.disk.read_bytes())
