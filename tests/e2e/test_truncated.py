"""Images whose file was cut short: a cluster that is cut reads on as zeros, what is wholly gone is lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.e2e.mounts import Mount, mounted, refusal
from tests.e2e.tools import KIB, MIB, OFFSET_MASK, content, convert, l1_entry_at, l2_entry_at, word

CLUSTER = 4 * KIB
SIZE = MIB
GUESTS = range(0, SIZE, CLUSTER)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """No zeros, so that every cluster is stored."""
    raw = tmp_path / "content"
    raw.write_bytes(bytes(byte or 1 for byte in content(SIZE, "truncated")))
    return raw


@pytest.fixture
def image(raw: Path) -> Path:
    return convert(raw, raw.parent / "image.qcow2", cluster_size=CLUSTER)


def where_clusters_lie(image: Path) -> dict[int, int]:
    return {guest: word(image, l2_entry_at(image, guest)) & OFFSET_MASK for guest in GUESTS}


def expect(image: Path, raw: Path, length: int) -> dict[int, bytes | None]:
    """What each cluster must read as once the file is cut; None where it must fail."""
    whole = raw.read_bytes()
    hosts = where_clusters_lie(image)
    last_table_end = -(-length // CLUSTER) * CLUSTER
    expected: dict[int, bytes | None] = {}
    for guest, host in hosts.items():
        entry = l2_entry_at(image, guest)
        if entry >= last_table_end:
            expected[guest] = None  # its table is gone
        elif entry >= length:
            expected[guest] = bytes(CLUSTER)  # its table is cut: the entry reads as unallocated
        else:
            kept = max(0, length - host)
            expected[guest] = whole[guest : guest + CLUSTER][:kept].ljust(CLUSTER, b"\0") if kept else None
    return expected


def read_clusters(mount: Mount) -> dict[int, bytes | None]:
    found: dict[int, bytes | None] = {}
    fd = os.open(mount.disk, os.O_RDONLY | os.O_DIRECT)
    for guest in GUESTS:
        try:
            found[guest] = os.pread(fd, CLUSTER, guest)
        except OSError as error:
            assert error.strerror == "Input/output error"  # noqa: PT017 - which clusters fail is the answer
            found[guest] = None
    os.close(fd)
    return found


@pytest.mark.parametrize("place", ["last byte", "within a cluster", "between clusters", "half", "L2 table"])
def test_a_truncated_image_gives_what_is_left(place: str, image: Path, raw: Path) -> None:
    hosts = sorted(where_clusters_lie(image).values())
    second_table = word(image, l1_entry_at(image, 1)) & OFFSET_MASK
    length = {
        "last byte": hosts[-1] + CLUSTER - 1,
        "within a cluster": hosts[-3] + 1000,
        "between clusters": hosts[-3],
        "half": image.stat().st_size // 2 + 513,
        "L2 table": second_table + 160,
    }[place]
    expected = expect(image, raw, length)
    os.truncate(image, length)
    with mounted(image) as mount:
        assert read_clusters(mount) == expected
        lost = [guest for guest, data in expected.items() if data is None]
        complaints = mount.take_complaints()
        assert bool(complaints) == bool(lost)
        assert all(line.startswith(f"ERROR {image}: guest offset ") for line in complaints)
        assert all(
            line.endswith(f"past the end of the file ({length} bytes); reads fail") for line in complaints
        )
        assert len(complaints) == len(set(complaints)) <= len(lost)


def test_an_image_without_its_tables_still_tells_its_size(image: Path) -> None:
    end = 3 * CLUSTER
    os.truncate(image, end)
    rule = f"L1 table at {end:#x}: the table lies past the end of the file ({end} bytes)"
    with mounted(image) as mount:
        assert mount.disk.stat().st_size == SIZE
        assert set(read_clusters(mount).values()) == {None}
        assert mount.take_complaints() == [
            f"ERROR {image}: guest offset 0x0, host offset 0x0: {rule}; reads fail"
        ]


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_compressed_image_that_was_cut_loses_its_last_clusters(kind: str, tmp_path: Path) -> None:
    """What is left of a stream is never taken for the whole, whatever the zeros after it would mean."""
    cluster, kept = 64 * KIB, 3 * 64 * KIB
    raw, source = tmp_path / "content", random.Random(5)
    raw.write_bytes(b"".join(source.randbytes(2 * KIB) * 4 for _ in range(5 * 8)))
    image = convert(raw, tmp_path / "image.qcow2", "-c", compression_type=kind)
    entries = [word(image, l2_entry_at(image, n * cluster)) for n in range(5)]
    assert all(entry & 1 << 62 for entry in entries)
    places = [entry & (1 << 54) - 1 for entry in entries]
    length = places[3] + 9000
    os.truncate(image, length)
    with mounted(image) as mount:
        with mount.disk.open("rb", buffering=0) as disk:
            assert disk.read(kept) == raw.read_bytes()[:kept]
            for guest in (kept, kept + cluster):
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(disk.fileno(), 10, guest)
        cut, gone = sorted(line.split(": ", 2)[2] for line in mount.take_complaints())
    assert cut.startswith("compressed cluster ")
    assert gone == f"the cluster lies past the end of the file ({length} bytes); reads fail"


@pytest.mark.parametrize("length", [0, 1, 3, 4, 71, 72, 103])
def test_a_header_that_was_cut_is_refused(length: int, image: Path, tmp_path: Path) -> None:
    start = image.read_bytes()[:4]
    os.truncate(image, length)
    result = refusal(image, tmp_path / "here")
    message, code = f"header is cut short: {length} bytes of at least {72 if length < 72 else 104}", 4
    if length == 0:
        message, code = "is empty; a qcow2 image starts with its header", 2
    elif length < 4:
        message, code = (
            (
                f"is not a qcow2 image (starts with {start[:length].hex(' ')}, not 51 46 49 fb); "
                "another format can be converted: qemu-img convert -O qcow2"
            ),
            2,
        )
    assert (result.returncode, result.stderr) == (code, f"qcowfs: {image}: {message}\n")
