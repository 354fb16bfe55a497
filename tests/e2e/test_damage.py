"""Damage inside an image: what is lost cannot be read and is logged once, everything else can be read."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.mounts import mounted
from tests.e2e.tools import (
    KIB,
    MIB,
    convert,
    create,
    host_offset,
    l1_entry_at,
    l2_entry_at,
    poke,
    poke_word,
    qemu_img,
    qemu_io,
    raw_file,
    snapshot_table_at,
    word,
)

CLUSTER = 64 * KIB
SIZE = MIB
BAD = 5 * CLUSTER
COPIED, COMPRESSED = 1 << 63, 1 << 62
FAR = 1 << 40
EVERYTHING = list(range(0, SIZE, CLUSTER))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    raw = tmp_path / "content"
    raw.write_bytes(b"".join(bytes([n + 1]) * CLUSTER for n in range(SIZE // CLUSTER)))
    return raw


@pytest.fixture
def image(raw: Path) -> Path:
    return convert(raw, raw.parent / "image.qcow2")


def survey(disk: Path, expected: bytes) -> list[int]:
    """Guest offsets of the clusters that fail with EIO; all others must be as expected."""
    lost = []
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        for start in range(0, len(expected), CLUSTER):
            try:
                assert os.pread(fd, CLUSTER, start) == expected[start : start + CLUSTER], f"{start:#x}"
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017 - which clusters fail is the answer
                lost.append(start)
    finally:
        os.close(fd)
    return lost


def unaligned_cluster(image: Path) -> tuple[int, str]:
    place, host = l2_entry_at(image, BAD), host_offset(image, BAD) + 512
    poke_word(image, place, host | COPIED)
    return place, f"L2 entry: cluster offset {host:#x} is not cluster aligned"


def cluster_past_the_end(image: Path) -> tuple[int, str]:
    poke_word(image, l2_entry_at(image, BAD), FAR | COPIED)
    return FAR, f"the cluster lies past the end of the file ({image.stat().st_size} bytes)"


def compressed_cluster_past_the_end(image: Path) -> tuple[int, str]:
    poke_word(image, l2_entry_at(image, BAD), FAR + 77 | COMPRESSED)
    return FAR + 77, f"the cluster lies past the end of the file ({image.stat().st_size} bytes)"


def compressed_cluster_of_zeros(image: Path) -> tuple[int, str]:
    """Three zero bits are an empty stored block whose length does not check."""
    host = host_offset(image, BAD)
    poke_word(image, l2_entry_at(image, BAD), host | COMPRESSED)
    poke(image, host, bytes(512))
    return host, "compressed cluster does not inflate: "


def compressed_cluster_that_is_too_small(image: Path) -> tuple[int, str]:
    """A stored block of 5 bytes, and the end of the stream."""
    host = host_offset(image, BAD)
    poke_word(image, l2_entry_at(image, BAD), host | COMPRESSED)
    poke(image, host, b"\1" + struct.pack("<HH", 5, 0xFFFF ^ 5) + b"short")
    return host, f"compressed cluster inflates to 5 bytes of {CLUSTER}"


ONE_CLUSTER = [
    unaligned_cluster, cluster_past_the_end, compressed_cluster_past_the_end,
    compressed_cluster_of_zeros, compressed_cluster_that_is_too_small,
]  # fmt: skip
Breaker = Callable[[Path], tuple[int, str]]


@pytest.mark.parametrize("damage", ONE_CLUSTER)
def test_a_lost_cluster_fails_alone_and_is_logged_once(damage: Breaker, image: Path, raw: Path) -> None:
    host, rule = damage(image)
    with mounted(image) as mount:
        for _ in range(2):
            assert survey(mount.disk, raw.read_bytes()) == [BAD]
        (line,) = mount.take_complaints()
        assert line.startswith(f"ERROR {image}: guest offset {BAD:#x}, host offset {host:#x}: {rule}")
        assert line.endswith("; reads fail")


@pytest.mark.parametrize("damage", ONE_CLUSTER)
def test_readers_through_the_page_cache_lose_only_the_pages_of_that_cluster(
    damage: Breaker, image: Path, raw: Path
) -> None:
    damage(image)
    expected = raw.read_bytes()
    with mounted(image) as mount:
        with pytest.raises(OSError, match="Input/output error"):
            mount.disk.read_bytes()
        with mount.disk.open("rb", buffering=0) as disk:
            for offset in (0, BAD - 4096, BAD + CLUSTER, SIZE - 4096):
                assert os.pread(disk.fileno(), 4096, offset) == expected[offset : offset + 4096]
            for offset in (BAD, BAD + CLUSTER - 4096):
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(disk.fileno(), 4096, offset)
        assert len(mount.take_complaints()) == 1


@pytest.mark.parametrize("damage", ONE_CLUSTER)
def test_lost_data_reads_as_zeros_where_the_user_asks_for_it(damage: Breaker, image: Path, raw: Path) -> None:
    host, rule = damage(image)
    expected = bytearray(raw.read_bytes())
    expected[BAD : BAD + CLUSTER] = bytes(CLUSTER)
    with mounted(image, "--lost-data=zeros") as mount:
        assert survey(mount.disk, bytes(expected)) == []
        assert mount.disk.read_bytes() == expected
        (line,) = mount.take_complaints()
        assert line.startswith(f"ERROR {image}: guest offset {BAD:#x}, host offset {host:#x}: {rule}")
        assert line.endswith("; reads as zeros")


def l2_table_unaligned(image: Path) -> tuple[int, str]:
    table = word(image, l1_entry_at(image)) & ~COPIED
    poke_word(image, l1_entry_at(image), table + 512 | COPIED)
    return 0, f"L1 entry 0: L2 table offset {table + 512:#x} is not cluster aligned"


def l2_table_past_the_end(image: Path) -> tuple[int, str]:
    poke_word(image, l1_entry_at(image), FAR | COPIED)
    size = image.stat().st_size
    return 0, f"L2 table at {FAR:#x}: the table lies past the end of the file ({size} bytes)"


def l1_table_past_the_end(image: Path) -> tuple[int, str]:
    poke_word(image, 40, FAR)
    size = image.stat().st_size
    return 0, f"L1 table at {FAR:#x}: the table lies past the end of the file ({size} bytes)"


@pytest.mark.parametrize("damage", [l2_table_unaligned, l2_table_past_the_end, l1_table_past_the_end])
def test_a_lost_table_loses_what_it_covers_and_is_logged_once(
    damage: Breaker, image: Path, raw: Path
) -> None:
    host, rule = damage(image)
    with mounted(image) as mount:
        assert survey(mount.disk, raw.read_bytes()) == EVERYTHING
        assert mount.take_complaints() == [
            f"ERROR {image}: guest offset 0x0, host offset {host:#x}: {rule}; reads fail"
        ]
        assert mount.disk.stat().st_size == SIZE


def test_a_zero_flag_in_a_version_2_image_is_damage(raw: Path) -> None:
    image = convert(raw, raw.parent / "image.qcow2", compat="v2")
    place = l2_entry_at(image, BAD)
    poke_word(image, place, 1)
    rule = "L2 entry has the zero flag, which version 2 does not know"
    with mounted(image) as mount:
        assert survey(mount.disk, raw.read_bytes()) == [BAD]
        assert mount.take_complaints() == [
            f"ERROR {image}: guest offset {BAD:#x}, host offset {place:#x}: {rule}; reads fail"
        ]


@pytest.mark.parametrize(
    ("offset", "bitmap", "rule"),
    [
        (True, 1 << 32 | 1, "L2 entry: a subcluster is marked both allocated and zero"),
        (False, 1, "L2 entry: subclusters are allocated but the cluster has no offset"),
    ],
)
def test_a_bitmap_that_contradicts_itself_is_damage(offset: bool, bitmap: int, rule: str, raw: Path) -> None:
    image = convert(raw, raw.parent / "image.qcow2", extended_l2="on")
    place = (word(image, l1_entry_at(image)) & ~COPIED) + BAD // CLUSTER * 16
    poke_word(image, place, word(image, place) if offset else 0)
    poke_word(image, place + 8, bitmap)
    with mounted(image) as mount:
        assert survey(mount.disk, raw.read_bytes()) == [BAD]
        assert mount.take_complaints() == [
            f"ERROR {image}: guest offset {BAD:#x}, host offset {place:#x}: {rule}; reads fail"
        ]


def test_damage_in_a_backing_file_is_logged_in_its_name(image: Path, raw: Path) -> None:
    overlay = create(image.parent / "overlay.qcow2", SIZE, "-b", image, "-F", "qcow2")
    place, rule = unaligned_cluster(image)
    label = f"{image} (backing file of {overlay})"
    with mounted(overlay) as mount:
        assert survey(mount.disk, raw.read_bytes()) == [BAD]
        assert mount.take_complaints() == [
            f"ERROR {label}: guest offset {BAD:#x}, host offset {place:#x}: {rule}; reads fail"
        ]


def test_damage_below_a_written_cluster_is_never_met(image: Path, raw: Path) -> None:
    overlay = create(image.parent / "overlay.qcow2", SIZE, "-b", image, "-F", "qcow2")
    qemu_io(overlay, f"write -q -P 0xee {BAD} 64k")
    unaligned_cluster(image)
    expected = bytearray(raw.read_bytes())
    expected[BAD : BAD + CLUSTER] = b"\xee" * CLUSTER
    with mounted(overlay) as mount:
        assert mount.disk.read_bytes() == expected


def test_damage_in_a_snapshot_leaves_the_live_disk_alone(image: Path, raw: Path, tmp_path: Path) -> None:
    qemu_img("snapshot", "-c", "old", image)
    fresh = raw_file(tmp_path / "fresh", SIZE, "fresh")
    qemu_io(image, f"write -q -s {fresh} 0 1M")
    snapshot_l1 = word(image, snapshot_table_at(image))
    poke_word(image, snapshot_l1, word(image, snapshot_l1) + 512)
    with mounted(image) as mount:
        assert mount.disk.read_bytes() == fresh.read_bytes()
        assert survey(mount.snapshot("old"), raw.read_bytes()) == EVERYTHING
        (line,) = mount.take_complaints()
        assert line.startswith(f"ERROR {image}")
        assert line.endswith(" is not cluster aligned; reads fail")


def test_an_image_that_is_marked_corrupt_or_dirty_is_read_with_a_warning(image: Path, raw: Path) -> None:
    poke_word(image, 72, 0b11)
    with mounted(image) as mount:
        assert mount.disk.read_bytes() == raw.read_bytes()
        assert mount.take_complaints() == [
            f"WARNING {image}: is marked dirty (not closed cleanly); reading it is safe",
            f"WARNING {image}: is marked corrupt; reads go on, check it with qcowfs check",
        ]
