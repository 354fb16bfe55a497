"""Snapshots taken and dropped while others write, freeze, grow or kill; and where none can be taken."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.e2e.mounts import Daemon, in_background, loop_mounted, mounted
from tests.e2e.test_live_snapshots import files, names, refused, take
from tests.e2e.tools import (
    KIB,
    MIB,
    QCOWFS,
    TIMEOUT,
    as_raw,
    assert_same,
    convert,
    create,
    poke,
    qemu_img,
    qemu_info,
    qemu_io,
    raw_file,
    run,
    snapshot_table_at,
)
from tests.e2e.writes import assert_holds, assert_leaks_at_most, assert_sound, opened

PAGE = 4 * KIB
PLACES = 256
"""Each writer has so many pages, and writes them in a circle."""
KILLS = 10


# -- beside writers


@dataclass
class Writer:
    """Writes numbered pages to its part of the disk, in order; `begun` and `done` are the last numbers."""

    disk: Path
    part: int
    begun: int = 0
    done: int = 0
    failure: list[BaseException] = field(default_factory=list)

    def write_until(self, ended: threading.Event) -> None:
        try:
            with opened(self.disk) as fd:
                while not ended.is_set():
                    self.begun = self.done + 1
                    assert os.pwrite(fd, page(self.part, self.begun), self.place(self.begun)) == PAGE
                    self.done = self.begun
        except BaseException as error:
            self.failure.append(error)

    def place(self, number: int) -> int:
        return (self.part * PLACES + number % PLACES) * PAGE

    def assert_held(self, disk: Path, least: int, most: int) -> None:
        """Fail unless the disk holds what the first N writes left, with `least` <= N <= `most`."""
        with disk.open("rb") as file:
            file.seek(self.part * PLACES * PAGE)
            pages = [file.read(PAGE) for _ in range(PLACES)]
        numbers = [int.from_bytes(data[:8], "little") for data in pages]
        last = max(numbers)
        assert least <= last <= most
        for index, (number, data) in enumerate(zip(numbers, pages, strict=True)):
            newest = last - (last - index) % PLACES
            assert number == max(0, newest), f"place {index} of part {self.part}, at write {last}"
            assert data == (page(self.part, number) if number else bytes(PAGE))


def page(part: int, number: int) -> bytes:
    """What the writer of a part writes as its page of that number."""
    return number.to_bytes(8, "little") * 2 + bytes([part + 1]) * (PAGE - 16)


@contextmanager
def at_work(*writers: Writer) -> Iterator[None]:
    """Let the writers write for the length of the block."""
    ended = threading.Event()
    threads = [threading.Thread(target=writer.write_until, args=(ended,)) for writer in writers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(TIMEOUT)
    assert [writer.failure for writer in writers] == [[]] * len(writers)


def test_writers_go_on_while_fifty_snapshots_come_and_go(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 3 * PLACES * PAGE, cluster_size=16 * KIB)
    source = random.Random("fifty")
    held: dict[str, list[tuple[int, int]]] = {}
    with mounted(image, writable=True) as mount:
        writers = [Writer(mount.disk, part) for part in range(3)]
        with at_work(*writers):
            for number in range(50):
                least = [writer.done for writer in writers]
                take(mount, f"{number}")
                held[f"{number}"] = list(zip(least, (w.begun for w in writers), strict=True))
                if number % 10 == 0:
                    check_all(writers, mount.snapshot(f"{number}"), held[f"{number}"])
                if len(held) > 8:
                    dropped = source.choice(sorted(held))
                    mount.snapshot(dropped).unlink()
                    del held[dropped]
        assert sorted(files(mount)) == sorted(f"{name}.raw" for name in held)
        for name, bounds in held.items():
            check_all(writers, mount.snapshot(name), bounds)
    assert_sound(image)
    for name, bounds in held.items():
        check_all(writers, as_raw(image, tmp_path / "raw", name), bounds)
    check_all(writers, as_raw(image, tmp_path / "raw"), [(w.done, w.done) for w in writers])
    assert all(writer.done > 50 for writer in writers)


def check_all(writers: list[Writer], disk: Path, bounds: list[tuple[int, int]]) -> None:
    for writer, (least, most) in zip(writers, bounds, strict=True):
        writer.assert_held(disk, least, most)


def test_growing_the_disk_and_taking_snapshots_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Both need the kernel's lock of disk.raw, which a growing disk holds while the daemon works."""
    image = create(tmp_path / "image.qcow2", MIB)
    rounds = 40
    with mounted(image, writable=True) as mount:
        device = mount.folder.stat().st_dev
        growing = subprocess.Popen(
            ["sh", "-c", f'for n in $(seq {rounds}); do truncate -s +64K "$0" || exit; done', mount.disk]
        )
        taking = subprocess.Popen(
            ["sh", "-c", f'for n in $(seq {rounds}); do touch "$0/$n.raw" || exit; done', mount.snapshots]
        )
        try:
            codes = [process.wait(20) for process in (growing, taking)]
        except subprocess.TimeoutExpired:
            Path(f"/sys/fs/fuse/connections/{os.minor(device)}/abort").write_text("1")  # lets go of both
            raise
        finally:
            for process in (growing, taking):
                process.kill()
                process.wait(TIMEOUT)
        assert codes == [0, 0]
        assert mount.disk.stat().st_size == MIB + rounds * 64 * KIB
    assert names(image) == [f"{n + 1}" for n in range(rounds)]
    assert_sound(image)


# -- frozen and killed


def test_a_file_system_that_was_frozen_is_sound_in_the_snapshot(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 64 * MIB)
    with mounted(image, writable=True) as mount:
        run("mkfs.ext4", "-q", "-F", mount.disk)
        with loop_mounted(mount.disk, tmp_path / "guest", writable=True) as root:
            for number in range(40):
                (root / f"file-{number}").write_bytes(bytes([number]) * 50_000)
            run("fsfreeze", "--freeze", root)
            try:
                take(mount, "frozen")
            finally:
                run("fsfreeze", "--unfreeze", root)
            for number in range(0, 40, 2):
                (root / f"file-{number}").unlink()
            (root / "later").write_bytes(b"later" * 100_000)
            run("sync", "-f", root)
            take(mount, "later")
            run("e2fsck", "-fn", mount.snapshot("frozen"))
        run("e2fsck", "-fn", mount.disk)
    assert_sound(image)
    frozen = as_raw(image, tmp_path / "frozen.raw", "frozen")
    run("e2fsck", "-fn", frozen)
    for number in (0, 39):
        run("debugfs", "-R", f"dump file-{number} {tmp_path}/dumped", frozen)
        assert (tmp_path / "dumped").read_bytes() == bytes([number]) * 50_000


def take_and_drop(daemon: Daemon, first: int, told: SimpleQueue[int]) -> None:
    """Write a number all over the disk, take a snapshot of that name, drop the one before the last; go on."""
    try:
        with opened(daemon.disk) as fd:
            for number in itertools.count(first):
                for place in range(0, 4 * MIB, 256 * KIB):
                    os.pwrite(fd, number.to_bytes(8, "little"), place)
                folder = daemon.folder / "snapshots"
                os.close(os.open(folder / f"{number}.raw", os.O_CREAT | os.O_EXCL, 0o600))
                told.put(number)
                (folder / f"{number - 2}.raw").unlink(missing_ok=True)
                told.put(number)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise


def killed_while_at_it(daemon: Daemon, first: int, steps: int) -> int:
    """Kill the daemon after so many steps; the number of the last snapshot that was surely taken."""
    told: SimpleQueue[int] = SimpleQueue()
    worker = threading.Thread(target=take_and_drop, args=(daemon, first, told))
    worker.start()
    last = [told.get(timeout=TIMEOUT) for _ in range(steps)][-1]
    signal.pidfd_send_signal(daemon.process, signal.SIGKILL)
    worker.join(TIMEOUT)
    daemon.wait()
    while not told.empty():
        last = told.get()
    return last


def assert_whole(disk: Path, number: int) -> None:
    with disk.open("rb") as file:
        held = [os.pread(file.fileno(), 8, place) for place in range(0, 4 * MIB, 256 * KIB)]
    assert held == [number.to_bytes(8, "little")] * 16


def test_a_daemon_killed_while_snapshots_come_and_go_leaves_each_one_whole(tmp_path: Path) -> None:
    image, folder = create(tmp_path / "image.qcow2", 4 * MIB, cluster_size=4096), tmp_path / "here"
    source, first = random.Random("kills"), 1
    for _ in range(KILLS):
        with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
            last = killed_while_at_it(daemon, first, source.randint(2, 9))
        assert_leaks_at_most(image)
        listed = [int(name) for name in names(image)]
        assert last in listed
        first = max(listed) + 1
        for number in listed:
            assert_whole(as_raw(image, tmp_path / "raw", f"{number}"), number)
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        for number in listed:
            assert_whole(daemon.folder / "snapshots" / f"{number}.raw", number)
    qemu_img("check", "-q", "-r", "leaks", image)
    assert_sound(image)
    assert first > KILLS


# -- states of virtual machines


def with_vm_state(folder: Path) -> Path:
    """An image with a snapshot that holds 300 KiB of a virtual machine's memory behind the disk."""
    image = convert(raw_file(folder / "content", 2 * MIB, "vm"), folder / "image.qcow2")
    qemu_io(image, "write -q -b -P 0x5a 0 300k")
    qemu_img("snapshot", "-c", "running", image)
    poke(image, snapshot_table_at(image) + 40, struct.pack(">Q", 300 * KIB))
    assert qemu_info(image)["snapshots"][0]["vm-state-size"] == 300 * KIB
    return image


def test_the_state_of_a_virtual_machine_stays_with_its_snapshot(tmp_path: Path) -> None:
    image = with_vm_state(tmp_path)
    with mounted(image, writable=True) as mount:
        take(mount, "other")
        poke(mount.disk, 0, b"\xee" * MIB)
        mount.snapshot("running").rename(mount.snapshot("saved"))
        take(mount, "third")
        mount.snapshot("other").unlink()
        assert mount.snapshot("saved").read_bytes() == (tmp_path / "content").read_bytes()
        assert [s["vm-state-size"] for s in qemu_info(image)["snapshots"]] == [300 * KIB, 0]
    assert_sound(image)
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    qemu_img("snapshot", "-a", "saved", copy)
    qemu_io(copy, "read -q -b -P 0x5a 0 300k")
    assert_holds(copy, tmp_path / "content")


def test_the_state_of_a_virtual_machine_goes_with_its_snapshot(tmp_path: Path) -> None:
    image = with_vm_state(tmp_path)
    with mounted(image, writable=True) as mount:
        mount.snapshot("running").unlink()
        assert files(mount) == []
    assert_sound(image)
    assert names(image) == []
    assert_holds(image, tmp_path / "content")


# -- where none can be taken


def test_a_read_only_mount_refuses_every_change(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_img("snapshot", "-c", "one", image)
    before = image.read_bytes()
    with mounted(image) as mount:
        for change in (
            lambda: take(mount, "two"),
            lambda: mount.snapshot("one").unlink(),
            lambda: mount.snapshot("one").rename(mount.snapshot("two")),
            lambda: os.truncate(mount.disk, 2 * MIB),
        ):
            with refused(errno.EROFS):
                change()
    assert image.read_bytes() == before


def with_data_file(folder: Path) -> tuple[Path, tuple[str | Path, ...], int, str]:
    data = folder / "data"
    text = "internal snapshots cannot hold an external data file"
    return create(folder / "i.qcow2", MIB, data_file=data), ("--data-file", data), errno.EOPNOTSUPP, text


def with_narrow_counts(folder: Path) -> tuple[Path, tuple[str | Path, ...], int, str]:
    image = convert(raw_file(folder / "raw", MIB, "narrow"), folder / "i.qcow2", refcount_bits=1)
    return image, (), errno.EINVAL, "refcounts of 1 bit"


def with_two_bit_counts(folder: Path) -> tuple[Path, tuple[str | Path, ...], int, str]:
    image = convert(raw_file(folder / "raw", MIB, "narrow"), folder / "i.qcow2", refcount_bits=2)
    for name in ("one", "two"):
        qemu_img("snapshot", "-c", name, image)
    return image, (), errno.EINVAL, "more references than refcounts of 2 bits hold, at most 3"


@pytest.mark.parametrize(
    "make", [with_data_file, with_narrow_counts, with_two_bit_counts], ids=lambda f: f.__name__
)
def test_where_no_snapshot_can_be_taken_the_image_stays_as_it_was(
    make: Callable[[Path], tuple[Path, tuple[str | Path, ...], int, str]], tmp_path: Path
) -> None:
    image, options, code, text = make(tmp_path)
    listed, content = names(image), as_raw(image, tmp_path / "content")
    with mounted(image, *options, writable=True) as mount:
        before = files(mount)
        with refused(code):
            take(mount, "more")
        assert files(mount) == before
        (line,) = mount.take_complaints()
        assert text in line
        assert_same(mount.disk, content)
        poke(mount.disk, 70_000, b"goes on")
        poke(content, 70_000, b"goes on")
    assert names(image) == listed
    assert_sound(image)
    assert_holds(image, content)


def test_a_snapshot_holds_what_a_mapping_that_is_written_on_held_at_the_call(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    ended = threading.Event()

    def write_on(mapping: mmap.mmap) -> None:
        for number in itertools.count(1):
            if ended.is_set():
                return
            mapping[0:8] = mapping[PAGE - 8 : PAGE] = number.to_bytes(8, "little")

    with (
        mounted(image, writable=True) as mount,
        opened(mount.disk) as fd,
        mmap.mmap(fd, MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapping,
    ):
        thread = threading.Thread(target=write_on, args=(mapping,))
        thread.start()
        try:
            seen = []
            for number in range(10):
                at_least = int.from_bytes(mapping[PAGE - 8 : PAGE], "little")
                with take(mount, f"{number}").open("rb") as file:
                    seen.append((at_least, int.from_bytes(file.read(8), "little")))
        finally:
            ended.set()
            thread.join(TIMEOUT)
    assert all(at_least <= held for at_least, held in seen), seen
    assert_sound(image)
