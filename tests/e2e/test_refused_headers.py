"""Absurd headers are refused in one line that names the field, without much memory being asked for."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.mounts import is_mounted, mounted
from tests.e2e.tools import (
    KIB,
    MEASURED,
    MIB,
    QCOWFS,
    attempt,
    create,
    peek,
    poke,
    qemu_img,
    qemu_io,
    snapshot_table_at,
    word,
)

MOST_MEMORY = 96 * KIB
"""In KiB, as the kernel counts; an interpreter with everything loaded takes half of it."""


@dataclass(frozen=True)
class Absurd:
    """A value for a header field at an offset, the exit code and the message that it must lead to."""

    field: str
    offset: int
    value: bytes
    message: str
    code: int = 4


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


ABSURD = [
    Absurd("version", 4, u32(1), "is qcow version 1; versions 2 and 3 are known", 3),
    Absurd("version", 4, u32(4), "is qcow version 4; versions 2 and 3 are known", 3),
    Absurd("backing_size", 8, u64(600) + u32(1024), "header field backing_file_size = 1024 exceeds 1023"),
    Absurd(
        "backing_offset", 8, u64(1 << 63) + u32(9),
        f"header field backing_file_offset = {1 << 63} puts the name beyond the first cluster",
    ),
    Absurd("cluster_bits", 20, u32(0), "header field cluster_bits = 0 is outside 9..21"),
    Absurd("cluster_bits", 20, u32(8), "header field cluster_bits = 8 is outside 9..21"),
    Absurd("cluster_bits", 20, u32(22), "header field cluster_bits = 22 is outside 9..21"),
    Absurd("cluster_bits", 20, b"\xff" * 4, "header field cluster_bits = 4294967295 is outside 9..21"),
    Absurd("size", 24, u64(1 << 63), f"header field size = {1 << 63} needs an L1 table over 32 MiB"),
    Absurd("size", 24, b"\xff" * 8, f"header field size = {(1 << 64) - 1} needs an L1 table over 32 MiB"),
    Absurd(
        "size", 24, u64(1 << 40), "header field l1_size = 1 is below the 2048 entries that the size needs"
    ),
    Absurd("crypt_method", 32, u32(3), "encryption method 3 is unknown", 3),
    Absurd("l1_size", 36, u32(0), "header field l1_size = 0 is below the 1 entries that the size needs"),
    Absurd(
        "l1_size", 36, b"\xff" * 4, "header field l1_size makes a table of 34359738360 bytes, over 33554432"
    ),
    Absurd(
        "l1_offset", 40, u64(0x30200), "header: the table of l1_size at offset 0x30200 is not cluster aligned"
    ),
    Absurd(
        "l1_offset", 40, u64(1 << 63),
        "header: the table of l1_size at offset 0x8000000000000000 ends beyond 2^63",
    ),
    Absurd(
        "reftable_offset", 48, u64(0x101),
        "header: the table of refcount_table_clusters at offset 0x101 is not cluster aligned",
    ),
    Absurd("reftable_clusters", 56, u32(0), "header field refcount_table_clusters = 0 must not be 0"),
    Absurd(
        "reftable_clusters", 56, b"\xff" * 4,
        f"header field refcount_table_clusters makes a table of {0xFFFFFFFF << 16} bytes, over 8388608",
    ),
    Absurd("nb_snapshots", 60, b"\xff" * 4, "header field nb_snapshots = 4294967295 exceeds 65536"),
    Absurd(
        "nb_snapshots", 60, u32(65536) + u64(1 << 40),
        "snapshot table at 0x10000000000: record 1 of 65536 is cut short by the end of the file or of the "
        "64 MiB limit",
    ),
    Absurd(
        "snapshots_offset", 64, u64(8),
        "header: the table of snapshots_offset at offset 0x8 is not cluster aligned",
    ),
    Absurd(
        "incompatible", 72, u64(1 << 5),
        "needs incompatible feature bit 5 (unnamed), which this version does not support", 3,
    ),
    Absurd(
        "incompatible", 72, u64(1 << 63 | 1 << 9 | 1),
        "needs incompatible feature bit 9 (unnamed), incompatible feature bit 63 (unnamed), "
        "which this version does not support", 3,
    ),
    Absurd("refcount_order", 96, u32(7), "header field refcount_order = 7 exceeds 6"),
    Absurd(
        "header_length", 100, u32(96),
        "header field header_length = 96 must be a multiple of 8 and at least 104",
    ),
    Absurd(
        "header_length", 100, u32(109),
        "header field header_length = 109 must be a multiple of 8 and at least 104",
    ),
    Absurd(
        "header_length", 100, b"\xff\xff\xff\xf8",
        "header field header_length = 4294967288 goes beyond the first cluster (65536 bytes read)",
    ),
    Absurd("compression", 104, b"\1", "compression type 1 contradicts incompatible feature bit 3 (clear)"),
    Absurd("compression", 104, b"\2", "compression type 2 is unknown", 3),
    Absurd(
        "extension", 116, b"\xff" * 4, "header extension 0x6803f857 claims 4294967295 bytes, 65416 remain"
    ),
]  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "image.qcow2", MIB)


def refused_with(image: Path, folder: Path) -> tuple[int, str]:
    """Exit code and message of a mount that must fail, and must do so without much memory."""
    folder.mkdir()
    words = (*QCOWFS, "mount", "--foreground", image, folder)
    result = attempt(*MEASURED, *words)
    assert not is_mounted(folder)
    assert int(result.stdout) < MOST_MEMORY
    return result.returncode, result.stderr


@pytest.mark.parametrize("absurd", ABSURD, ids=lambda a: f"{a.field}={a.value[:8].hex()}")
def test_an_absurd_field_is_named(absurd: Absurd, image: Path, tmp_path: Path) -> None:
    poke(image, absurd.offset, absurd.value)
    said = refused_with(image, tmp_path / "here")
    assert said == (absurd.code, f"qcowfs: {image}: {absurd.message}\n")


def test_an_unknown_feature_is_called_what_the_image_calls_it(image: Path, tmp_path: Path) -> None:
    poke(image, 72, u64(1 << 7))
    assert word(image, 112) == 0x6803F857 << 32 | 384  # the table of names starts right after the header
    poke(image, 120, b"\0\7" + b'time\ntravel"'.ljust(46, b"\0"))
    name = '"time\\x0atravel""'
    message = f"needs incompatible feature bit 7 ({name}), which this version does not support"
    assert refused_with(image, tmp_path / "here") == (3, f"qcowfs: {image}: {message}\n")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, u32(0), "snapshot id 1: L1 table of 0 entries is short of its size"),
        (8, b"\xff" * 4, "snapshot id 1: L1 table of 34359738360 bytes, over 33554432"),
        (0, u64(0x12345), "snapshot id 1: L1 table at offset 0x12345 is not cluster aligned"),
        (0, u64(1 << 63), f"snapshot id 1: L1 table at {1 << 63:#x} ends beyond 2^63"),
        (48, u64(1 << 40), "snapshot id 1: L1 table of 1 entries is short of its size"),
        (36, u32(1025), "snapshot table: extra data of 1025 bytes, over 1024"),
    ],
    ids=["no L1 table", "huge L1 table", "unaligned", "beyond 2^63", "huge disk", "huge extra data"],
)
def test_an_absurd_snapshot_is_named(
    offset: int, value: bytes, message: str, image: Path, tmp_path: Path
) -> None:
    qemu_img("snapshot", "-c", "odd", image)
    poke(image, snapshot_table_at(image) + offset, value)
    assert refused_with(image, tmp_path / "here") == (4, f"qcowfs: {image}: {message}\n")


def high_water(pid: int) -> int:
    """The most memory that a process ever had, in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def test_the_largest_disk_there_is_takes_no_more_memory(tmp_path: Path) -> None:
    """Its L1 table alone has 32 MiB."""
    image = create(tmp_path / "image.qcow2", 2 << 60, cluster_size="2M")
    qemu_io(image, f"write -q -P 7 {(2 << 60) - 512} 512", f"write -q -P 8 {1 << 60} 512")
    with mounted(image) as mount:
        assert mount.disk.stat().st_size == 2 << 60
        with mount.disk.open("rb") as disk:
            for offset, byte in ((0, 0), (1 << 60, 8), ((2 << 60) - 512, 7), (3 << 58, 0)):
                disk.seek(offset)
                assert disk.read(512) == bytes([byte]) * 512
        assert high_water(mount.process.pid) < MOST_MEMORY


def test_tables_in_memory_stay_within_what_the_user_grants(tmp_path: Path) -> None:
    """Clusters of 512 bytes make 1 MiB of L2 tables here, in 2048 slices."""
    image = create(tmp_path / "image.qcow2", 64 * MIB, cluster_size=512)
    qemu_io(image, "write -q -P 1 0 64M")
    with mounted(image, "--table-cache", "64k") as mount:
        with mount.disk.open("rb", buffering=0) as disk:
            first = disk.read(MIB)
            before = high_water(mount.process.pid)
            assert all(disk.read(MIB) == first == b"\1" * MIB for _ in range(63))
        assert high_water(mount.process.pid) - before < 24 * KIB


def test_a_size_that_ends_within_a_sector_is_rounded_down_as_in_qemu(image: Path) -> None:
    poke(image, 24, u64(MIB - 100))
    assert '"virtual-size": 1048064' in qemu_img("info", "--output=json", image)
    with mounted(image) as mount:
        assert mount.disk.stat().st_size == MIB - 512
    assert peek(image, 24, 8) == u64(MIB - 100)
