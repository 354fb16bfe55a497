"""The compiled session under load: many processes at once, waiting requests, errors, a mount's end."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.mounts import mounted
from tests.e2e.tools import KIB, MIB, assert_same, content, convert, create, qemu_img, run, until
from tests.e2e.writes import assert_holds, assert_leaks_at_most, assert_on_disk, assert_sound, opened, put

PART = 4 * MIB
WORKERS = 4
WORKER = """
import os, random, sys
path, start, length, seed, rounds = sys.argv[1], *map(int, sys.argv[2:])
source, fd = random.Random(seed), os.open(path, os.O_RDWR)
model = bytearray(length)
print("open", file=sys.stderr, flush=True)
for _ in range(rounds):
    at, size = source.randrange(length), source.choice([1, 511, 4096, 70_000, 400_000])
    data = source.randbytes(min(size, length - at))
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], start + at + done)
    model[at : at + len(data)] = data
    at = source.randrange(length)
    seen = os.pread(fd, 300_000, start + at)[: length - at]
    assert seen == model[at : at + len(seen)], f"seed {seed}: differs near {start + at}"
    if source.random() < 0.05:
        os.fsync(fd)
assert os.pread(fd, length, start) == model
os.close(fd)
sys.stdout.buffer.write(model)
"""


def worker(disk: Path, number: int, rounds: int) -> subprocess.Popen[bytes]:
    """A process that changes a part of the disk of its own and compares what it reads there."""
    words = (disk, number * PART, PART, number, rounds)
    command = [sys.executable, "-c", WORKER, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"open\n"
    return process


def test_processes_that_read_and_write_at_once_each_see_their_own_bytes(tmp_path: Path) -> None:
    image, twin = create(tmp_path / "image.qcow2", WORKERS * PART), tmp_path / "twin"
    with mounted(image, writable=True) as mount:
        workers = [worker(mount.disk, number, 150) for number in range(WORKERS)]
        ends = [process.communicate(timeout=60) for process in workers]
        assert [process.returncode for process in workers] == [0] * WORKERS, ends[0][1][-500:]
        twin.write_bytes(b"".join(out for out, _ in ends))
        assert_same(mount.disk, twin)
    assert_sound(image)
    assert_holds(image, twin)


@pytest.mark.parametrize("cluster_size", ["4k", "64k", "2M"])
def test_small_and_large_requests_in_a_row_agree_with_a_twin(tmp_path: Path, cluster_size: str) -> None:
    """Past the kernel's cache, so that each is a request to the daemon: known clusters, runs and gaps."""
    raw = tmp_path / "raw"
    model = bytearray(content(8 * MIB, cluster_size) + bytes(4 * MIB))
    raw.write_bytes(model)
    image = convert(raw, tmp_path / "image.qcow2", cluster_size=cluster_size)
    source, buffer = random.Random(cluster_size), mmap.mmap(-1, MIB)
    with mounted(image, writable=True) as mount:
        with opened(mount.disk, os.O_RDWR | os.O_DIRECT) as fd:
            for step in range(600):
                size = source.choice([512, 4 * KIB, 32 * KIB, 64 * KIB, 200 * KIB, MIB])
                at = source.randrange((len(model) - size) // 512 + 1) * 512
                part = memoryview(buffer)[:size]
                if source.random() < 0.4:
                    part[:] = model[at : at + size] = source.randbytes(size)
                    assert os.pwritev(fd, [part], at) == size
                else:
                    assert os.preadv(fd, [part], at) == size
                    assert part == model[at : at + size], f"step {step}: {size} bytes at {at} differ"
        raw.write_bytes(model)
        assert_same(mount.disk, raw)
    assert_sound(image)
    assert_holds(image, raw)


def test_what_was_overwritten_in_a_row_is_on_disk_after_a_sync_and_moves_the_time(tmp_path: Path) -> None:
    raw, twin = tmp_path / "raw", tmp_path / "twin"
    raw.write_bytes(content(MIB, "before"))
    image = convert(raw, tmp_path / "image.qcow2")
    model = bytearray(raw.read_bytes())
    with mounted(image, writable=True) as mount:
        before = mount.disk.stat().st_mtime_ns
        with opened(mount.disk) as fd:
            for at in range(0, MIB, 4 * KIB):
                put(fd, at, b"after" * 100)
                model[at : at + 500] = b"after" * 100
            os.fsync(fd)
            twin.write_bytes(model)
            assert_on_disk(mount, twin)
        assert mount.disk.stat().st_mtime_ns > before
    assert_sound(image)


def test_requests_that_wait_for_the_host_are_answered_right(tmp_path: Path) -> None:
    """Nothing of the image is in the page cache when four processes read it."""
    raw = tmp_path / "raw"
    raw.write_bytes(content(16 * MIB, "cold"))
    image = convert(raw, tmp_path / "image.qcow2")
    with opened(image) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with mounted(image) as mount:
        readers = [subprocess.Popen(["cmp", str(mount.disk), str(raw)]) for _ in range(WORKERS)]
        assert [reader.wait(60) for reader in readers] == [0] * WORKERS


def test_a_cluster_that_the_host_cut_off_is_an_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(random.Random(1).randbytes(4 * MIB))
    image = convert(raw, tmp_path / "image.qcow2")
    os.truncate(image, image.stat().st_size - MIB)
    with mounted(image) as mount:
        with opened(mount.disk, os.O_RDONLY) as fd:
            for _ in range(3):
                with pytest.raises(OSError, match="Input/output error") as caught:
                    os.pread(fd, 64 * KIB, 4 * MIB - 64 * KIB)
                assert caught.value.errno == errno.EIO
                assert os.pread(fd, MIB, 512 * KIB) == raw.read_bytes()[512 * KIB : MIB + 512 * KIB]
        complaints = mount.take_complaints()
        assert complaints
        assert all("lies past the end of the file" in line for line in complaints)


def test_a_signal_under_load_ends_the_mount_with_all_that_was_synced(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", (WORKERS + 1) * PART)
    with mounted(image, writable=True) as mount:
        with opened(mount.disk) as fd:
            put(fd, WORKERS * PART, b"synced" * 1000)
            os.fsync(fd)
        workers = [worker(mount.disk, number, 100_000) for number in range(WORKERS)]
        until(lambda: image.stat().st_size > MIB)
        mount.process.send_signal(signal.SIGTERM)
        ended = mount.process.wait(60)
        for process in workers:
            process.kill()
            process.communicate()
        mount.take_complaints()
        assert ended == 0
    assert_leaks_at_most(image)
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", image, raw)
    assert raw.read_bytes()[WORKERS * PART :].startswith(b"synced" * 1000)


def test_a_mount_that_is_busy_is_taken_away_lazily_and_written_back(tmp_path: Path) -> None:
    image, twin = create(tmp_path / "image.qcow2", WORKERS * PART), tmp_path / "twin"
    with mounted(image, writable=True) as mount:
        workers = [worker(mount.disk, number, 60) for number in range(WORKERS)]
        until(lambda: image.stat().st_size > MIB)
        run("umount", "-l", mount.folder)
        ends = [process.communicate(timeout=60) for process in workers]
        assert [process.returncode for process in workers] == [0] * WORKERS, ends[0][1][-500:]
        assert mount.wait() == 0
        twin.write_bytes(b"".join(out for out, _ in ends))
    assert_sound(image)
    assert_holds(image, twin)
