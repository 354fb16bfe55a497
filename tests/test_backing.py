"""The policy on backing files, and raw backing files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcowfs.data.backing import (
    BackingPolicy,
    BackingReference,
    RawBacking,
    open_for_reading,
    probe_format,
)
from qcowfs.errors import BackingFileError
from qcowfs.host.facts import FileFacts
from qcowfs.testing import MemoryHostFile
from tests.asserting import raises_exactly
from tests.memory import read

IMAGE = Path("/vm/disks/a.qcow2")
TRUSTING = BackingPolicy(probe=True)


def reference(name: bytes, declared: str | None = "raw") -> BackingReference:
    return BackingReference("LABEL", IMAGE, name, declared)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"b", "/vm/disks/b"),
        (b"../b", "/vm/disks/../b"),
        (b"/abs/b", "/abs/b"),
        (b"file:b", "/vm/disks/b"),
        (b"file:/abs/b", "/abs/b"),
        (b"./a:b", "/vm/disks/a:b"),
        (b"dir/a:b", "/vm/disks/dir/a:b"),
        (b"/abs/json:{}", "/abs/json:{}"),
        (b"\xff\xfe", "/vm/disks/\udcff\udcfe"),
        ("ümläut".encode(), "/vm/disks/ümläut"),
    ],
)
def test_names_are_paths_relative_to_the_image(name: bytes, path: str) -> None:
    assert str(reference(name).locate(BackingPolicy())) == path


@pytest.mark.parametrize("policy", [BackingPolicy(refuse_all=True), BackingPolicy(True, True)])
def test_refusing_all_counts_before_everything_else(policy: BackingPolicy) -> None:
    text = 'LABEL: wants the backing file "json:{}", which --no-backing refuses'
    with raises_exactly(BackingFileError, text):
        reference(b"json:{}", None).locate(policy)


def test_names_in_refusals_are_safe_for_a_terminal() -> None:
    shown = "\\x1b]0;owned\\x07:x"
    text = f'LABEL: wants the backing file "nbd:{shown}"; only names of files are followed'
    with raises_exactly(BackingFileError, text):
        reference(b"nbd:\x1b]0;owned\x07:x").locate(TRUSTING)


def test_a_missing_file_is_told_by_name_and_path(tmp_path: Path) -> None:
    missing = tmp_path / "gone"
    text = f'LABEL: wants the backing file "gone", looked for at {missing}: No such file or directory'
    with raises_exactly(BackingFileError, text):
        reference(b"gone").open(missing, open_for_reading)


@pytest.mark.parametrize(("kind", "shown"), [("folder", "a directory"), ("fifo", "a FIFO")])
def test_what_is_no_file_is_refused_without_waiting(kind: str, shown: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    why = f"{path}: is {shown}, neither a regular file nor a block device"
    with raises_exactly(BackingFileError, f"LABEL: wants a backing file that is refused: {why}"):
        reference(b"x").open(path, open_for_reading)


class Device(MemoryHostFile):
    """A file in memory that looks like a device."""

    def facts(self) -> FileFacts:
        return super().facts()._replace(regular=False)


def test_a_device_is_refused_and_closed() -> None:
    device = Device(b"")
    text = "LABEL: wants the backing file /dev/sda, which is not a regular file"
    with raises_exactly(BackingFileError, text):
        reference(b"/dev/sda").open(Path("/dev/sda"), lambda _: device)
    assert device.closed


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_bytes(b"content")
    file = reference(b"b").open(path, open_for_reading)
    try:
        assert file.facts().size == 7
    finally:
        file.close()


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"QFI\xfb\0\0\0\3", "qcow2"), (b"QFI\xfb", "qcow2"), (b"QFI", "raw"), (b"", "raw"),
        (b"KDMV\1\0\0\0", "vmdk"), (b"conectix", "vpc"), (b"conecti", "raw"), (b"vhdxfile", "vhdx"),
        (b"QED\0", "qed"), (b"QED ", "raw"), (bytes(512), "raw"),
    ],
)  # fmt: skip
async def test_formats_are_found_by_their_first_bytes(start: bytes, found: str) -> None:
    assert await probe_format(MemoryHostFile(start)) == found


@pytest.mark.parametrize("size", [0, 1, 513])
async def test_a_raw_backing_file_is_zeros_beyond_its_end(size: int) -> None:
    file = MemoryHostFile(b"r" * size)
    raw = RawBacking(file, "label")
    assert (raw.size, raw.label, await raw.allocated_bytes()) == (size, "label", size)
    assert await read(raw, 0, 600) == (b"r" * size).ljust(600, b"\0")
    assert await read(raw, 600, 10) == bytes(10)
    raw.close()
    assert file.closed
