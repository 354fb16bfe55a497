"""A write that would land on the image's own tables is not done, and marks the image corrupt."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import Mount, mounted, refusal
from tests.e2e.tools import (
    KIB,
    MIB,
    OFFSET_MASK,
    TIMEOUT,
    create,
    l1_entry_at,
    l2_entry_at,
    poke_word,
    qemu_img,
    qemu_io,
    word,
)
from tests.e2e.writes import opened

SIZE = MIB
CLUSTER = 64 * KIB
BAD = 2 * CLUSTER
COPIED = 1 << 63
INCOMPATIBLE, CORRUPT = 72, 2

TABLES: dict[str, Callable[[Path], int]] = {
    "the header": lambda _: 0,
    "the refcount table": lambda image: word(image, 48),
    "a refcount block": lambda image: word(image, word(image, 48)) & OFFSET_MASK,
    "the L1 table": lambda image: word(image, 40),
    "an L2 table": lambda image: word(image, l1_entry_at(image)) & OFFSET_MASK,
    "the snapshot table": lambda image: word(image, 64),
    "a snapshot's L1 table": lambda image: word(image, word(image, 64)),
    "a place that is no cluster's": lambda image: image.stat().st_size // CLUSTER * CLUSTER + 512,
}


@pytest.fixture(params=list(TABLES.values()), ids=list(TABLES))
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image with a snapshot, one cluster of which seems to lie where a table does."""
    image = create(tmp_path / "image.qcow2", SIZE)
    qemu_io(image, "write -q -P 7 0 512k")
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -q -P 8 0 512k")
    poke_word(image, l2_entry_at(image, BAD), request.param(image) | COPIED)
    return image


@pytest.fixture
def mount(image: Path) -> Iterator[Mount]:
    with mounted(image, writable=True) as mount:
        yield mount


def write_error(mount: Mount, offset: int) -> str:
    """What dd says of a write there; a daemon that does not answer is killed, which frees the writer."""
    words = ("bs=4k", f"seek={offset // 4096}", "count=1", "conv=notrunc,fsync", "status=none")
    command = ["dd", "if=/dev/zero", f"of={mount.disk}", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as writer:
        try:
            return writer.communicate(timeout=TIMEOUT)[1]
        except subprocess.TimeoutExpired:
            mount.process.kill()
            return "no answer"


def test_a_write_onto_metadata_is_not_done_and_marks_the_image(mount: Mount, image: Path) -> None:
    before = bytearray(image.read_bytes())
    assert "Input/output error" in write_error(mount, BAD)
    assert word(image, INCOMPATIBLE) == CORRUPT
    before[INCOMPATIBLE : INCOMPATIBLE + 8] = CORRUPT.to_bytes(8, "big")
    assert image.read_bytes() == before
    assert len(mount.take_complaints()) == 1
    with opened(mount.disk) as fd:
        for offset in (0, BAD, 700 * KIB):
            with pytest.raises(OSError, match="Input/output error") as caught:
                os.pwrite(fd, b"x", offset)
            assert caught.value.errno == errno.EIO
        assert os.pread(fd, 2 * CLUSTER, 0) == b"\x08" * (2 * CLUSTER)
        assert os.pread(fd, 5 * CLUSTER, 3 * CLUSTER) == b"\x08" * (5 * CLUSTER)
    assert mount.snapshot("before").read_bytes()[: 512 * KIB] == b"\7" * (512 * KIB)
    mount.take_complaints()
    mount.unmount()
    assert image.read_bytes() == before
    result = refusal(image, mount.folder, writable=True)
    assert (result.returncode, "is marked corrupt" in result.stderr) == (4, True)
