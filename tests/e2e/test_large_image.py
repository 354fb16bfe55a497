"""A disk of 2 TiB whose every cluster is mapped: memory stays bounded, read, written or checked."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.e2e.mounts import daemon_of, mounted
from tests.e2e.tools import KIB, MEASURED, MIB, QCOWFS, create, qemu_io, run, until

SIZE = 2 << 40
LOOKS = 3000


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 320 MiB of tables, no data."""
    return create(tmp_path_factory.mktemp("large") / "image.qcow2", SIZE, preallocation="metadata")


def peak_memory(pid: int) -> int:
    """The most memory that a process has used, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize(("cache", "most"), [("1M", 64 * MIB), ("32M", 110 * MIB)])
@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
def test_random_looks_at_a_large_disk_cost_bounded_memory(
    cache: str, most: int, writable: bool, image: Path
) -> None:
    places = random.Random(8)
    with mounted(image, "--table-cache", cache, writable=writable) as mount:
        with mount.disk.open("rb", buffering=0) as disk:
            os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(LOOKS):
                place = places.randrange(SIZE // 4096) * 4096
                assert os.pread(disk.fileno(), 4096, place) == bytes(4096)
        assert peak_memory(daemon_of(mount.folder)) < most


def test_a_check_takes_some_bytes_a_cluster(image: Path) -> None:
    peak = int(run(*MEASURED, *QCOWFS, "check", image).stdout.splitlines()[-1])
    assert peak * KIB < 170 * MIB  # 3 for each of 32 Mi clusters, and the program


def test_what_a_large_disk_takes_is_counted_in_the_background(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", SIZE)
    qemu_io(image, f"write -q -P 1 {SIZE // 2} 192k")
    with mounted(image) as mount:
        until(lambda: mount.disk.stat().st_blocks == 192 * KIB // 512)
        assert mount.disk.stat().st_size == SIZE
