"""A daemon killed in the middle of writing loses nothing that a sync covered; the next mount works."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e import records
from tests.e2e.mounts import Daemon, in_background, is_mounted
from tests.e2e.tools import KIB, QCOWFS, TIMEOUT, as_raw, create, qemu_img, raw_file, until
from tests.e2e.writes import assert_leaks_at_most, assert_sound

SIZE = records.PLACES * records.SIZE
ROUNDS = 20


@contextmanager
def record_writer(disk: Path, first: int) -> Iterator[subprocess.Popen[str]]:
    """A process that writes records and tells the synced ones; it ends when its writes fail."""
    command = [sys.executable, "-m", "tests.e2e.records", str(disk), str(first)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)


def killed_while_writing(daemon: Daemon, first: int, synced: int) -> int:
    """Kill the daemon after that many syncs; the number of the last record that was told to be synced."""
    with record_writer(daemon.disk, first) as writer:
        assert writer.stdout is not None
        told = [writer.stdout.readline() for _ in range(synced)]
        signal.pidfd_send_signal(daemon.process, signal.SIGKILL)
        daemon.wait()
        told += writer.stdout.readlines()
    return int(told[-1])


def assert_synced(disk: Path, last: int, tried: int) -> None:
    """Fail unless every place holds its newest record up to `last`, or one that was tried after it."""
    with disk.open("rb") as file:
        held = {place: records.number_in(file.read(records.SIZE)) for place in range(records.PLACES)}
    for number in range(max(1, last - records.PLACES + 1), last + 1):
        newest = held[records.place(number)]
        assert number <= newest <= tried, f"record {number} is lost, {newest} is in its place"
        assert records.place(newest) == records.place(number)


def test_what_was_synced_survives_twenty_kills(tmp_path: Path) -> None:
    image, folder = create(tmp_path / "image.qcow2", SIZE, cluster_size=4096), tmp_path / "here"
    source, last, tried = random.Random("kills"), 0, 0
    with ExitStack() as stack:
        for _ in range(ROUNDS):
            daemon = stack.enter_context(in_background(folder, *QCOWFS, "mount", image, folder))
            assert_synced(daemon.disk, last, tried)
            last = killed_while_writing(daemon, last + 1, source.randint(1, 40))
            tried = last + records.MOST_AT_ONCE
            assert is_mounted(folder)
            assert_leaks_at_most(image)
            assert_synced(as_raw(image, tmp_path / "raw"), last, tried)
        last_daemon = stack.enter_context(in_background(folder, *QCOWFS, "mount", image, folder))
        assert_synced(last_daemon.disk, last, tried)
    qemu_img("check", "-q", "-r", "leaks", image)
    assert_sound(image)
    assert last > ROUNDS


def with_snapshot(folder: Path) -> Path:
    """Every write is to a cluster that the snapshot shares."""
    raw = raw_file(folder / "zeros", 0, "")
    raw.write_bytes(bytes(SIZE))
    image = folder / "image.qcow2"
    qemu_img("convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, image)
    qemu_img("snapshot", "-c", "before", image)
    return image


def tiny_clusters(folder: Path) -> Path:
    return create(folder / "image.qcow2", SIZE, cluster_size=512, refcount_bits=64)


def parts_of_clusters(folder: Path) -> Path:
    return create(folder / "image.qcow2", SIZE, cluster_size=128 * KIB, extended_l2="on")


@pytest.mark.parametrize("make", [with_snapshot, tiny_clusters, parts_of_clusters], ids=lambda f: f.__name__)
def test_what_was_synced_survives_a_kill_whatever_has_to_be_copied(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    image, folder = make(tmp_path), tmp_path / "here"
    last = 0
    for synced in (25, 60):
        with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
            last = killed_while_writing(daemon, last + 1, synced)
        assert_leaks_at_most(image)
    held = as_raw(image, tmp_path / "raw")
    with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
        for file in (held, daemon.disk):
            with file.open("rb") as disk:
                disk.seek(records.place(last) * records.SIZE)
                assert records.number_in(disk.read(records.SIZE)) == last
    assert_leaks_at_most(image)


SNAPSHOTS = """cd "$1" && while touch snapshots/$$.raw && echo x | dd of=disk.raw conv=notrunc status=none
do rm snapshots/$$.raw || exit; done"""


def test_a_kill_while_snapshots_are_taken_frees_the_image(tmp_path: Path) -> None:
    """The kernel's pages are written back before each; nothing of the daemon may wait for that for ever."""
    image, folder = create(tmp_path / "image.qcow2", 1 << 20), tmp_path / "here"
    for _ in range(5):
        with in_background(folder, *QCOWFS, "mount", image, folder) as daemon:
            words = ["sh", "-c", SNAPSHOTS, "sh", str(folder)]
            with subprocess.Popen(words, stderr=subprocess.DEVNULL) as changer:
                before = image.stat().st_mtime_ns
                until(lambda before=before: image.stat().st_mtime_ns > before)  # type: ignore[misc]
                signal.pidfd_send_signal(daemon.process, signal.SIGKILL)
                daemon.wait()
                changer.wait(TIMEOUT)
    assert_leaks_at_most(image)
