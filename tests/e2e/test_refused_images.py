"""Images that cannot be read here, or only with a file that the user must name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.mounts import mounted, refusal
from tests.e2e.tools import MIB, as_raw, assert_same, convert, create, qemu_io, raw_file


@pytest.mark.parametrize("start", [b"", b"KDMV\1\0\0\0", b"#!/bin/sh\n", b"\0" * 4096])
def test_another_kind_of_file_is_refused_with_what_to_do(start: bytes, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    image.write_bytes(start)
    message = "is empty; a qcow2 image starts with its header"
    if start:
        message = (
            f"is not a qcow2 image (starts with {start[:4].hex(' ')}, not 51 46 49 fb); "
            "another format can be converted: qemu-img convert -O qcow2"
        )
    result = refusal(image, tmp_path / "here")
    assert (result.returncode, result.stderr) == (2, f"qcowfs: {image}: {message}\n")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return raw_file(tmp_path / "content", MIB, "refused")


def test_an_external_data_file_is_opened_only_where_the_user_names_it(raw: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    image = convert(raw, tmp_path / "image.qcow2", data_file=data)
    result = refusal(image, tmp_path / "here")
    assert result.returncode == 3
    assert result.stderr == (
        f'qcowfs: {image}: keeps its data in an external data file (its header names "{data}"), which is '
        "opened only where you name it: --data-file PATH\n"
    )
    moved = data.rename(tmp_path / "moved")
    with mounted(image, "--data-file", moved) as mount:
        assert_same(mount.disk, raw)


def test_a_data_file_can_be_named_as_a_mount_option_from_where_the_user_is(raw: Path, tmp_path: Path) -> None:
    data = tmp_path / "data,1"
    image = convert(raw, tmp_path / "image.qcow2", data_file=tmp_path / "data")
    (tmp_path / "data").rename(data)
    with mounted(image, "-o", f"ro,data-file={str(data).replace(',', chr(92) + ',')},noatime") as mount:
        assert_same(mount.disk, raw)


def test_a_data_file_that_is_missing_is_named(raw: Path, tmp_path: Path) -> None:
    image = convert(raw, tmp_path / "image.qcow2", data_file=tmp_path / "data")
    result = refusal(image, tmp_path / "here", "--data-file", tmp_path / "gone")
    message = f"{image}: external data file {tmp_path}/gone: No such file or directory"
    assert (result.returncode, result.stderr) == (6, f"qcowfs: {message}\n")


def test_a_data_file_for_an_image_that_has_none_is_wrong_usage(raw: Path, tmp_path: Path) -> None:
    image = convert(raw, tmp_path / "image.qcow2")
    result = refusal(image, tmp_path / "here", "--data-file", raw)
    message = f"{image}: has no external data file; leave --data-file out"
    assert (result.returncode, result.stderr) == (2, f"qcowfs: {message}\n")


def test_clusters_past_the_end_of_the_data_file_are_lost(raw: Path, tmp_path: Path) -> None:
    raw.write_bytes(b"\7" * MIB)
    data = tmp_path / "data"
    image = convert(raw, tmp_path / "image.qcow2", data_file=data)
    os.truncate(data, MIB // 2 + 5)
    with mounted(image, "--data-file", data) as mount, mount.disk.open("rb", buffering=0) as disk:
        assert disk.read(MIB // 2) == b"\7" * (MIB // 2)
        assert os.pread(disk.fileno(), 65536, MIB // 2) == (b"\7" * 5).ljust(65536, b"\0")
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(disk.fileno(), 1, MIB - 1)
        complaints = mount.take_complaints()
        assert complaints[0].startswith(f"ERROR {image}: guest offset ")
        assert complaints[0].endswith(f"past the end of the file ({MIB // 2 + 5} bytes); reads fail")


def test_an_image_of_no_size_at_all_is_shown_as_an_empty_file(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 0)
    with mounted(image) as mount:
        assert mount.disk.read_bytes() == b""
        assert mount.disk.stat().st_blocks == 0


def test_unknown_compatible_and_autoclear_features_do_no_harm(raw: Path, tmp_path: Path) -> None:
    image = convert(raw, tmp_path / "image.qcow2")
    with image.open("r+b") as file:
        file.seek(80)
        file.write(b"\x80" + bytes(7) + b"\x40" + bytes(7))
    before = image.read_bytes()
    with mounted(image) as mount:
        assert_same(mount.disk, as_raw(image, tmp_path / "raw"))
    assert image.read_bytes() == before


def test_reading_never_changes_the_image_or_what_lies_below(raw: Path, tmp_path: Path) -> None:
    base = convert(raw, tmp_path / "base.qcow2", "-c")
    image = create(tmp_path / "image.qcow2", MIB, "-b", base, "-F", "qcow2", lazy_refcounts="on")
    qemu_io(image, "write -q -P 1 5 5")
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in (image, base)]
    with mounted(image) as mount:
        mount.disk.read_bytes()
    assert [(p.read_bytes(), p.stat().st_mtime_ns) for p in (image, base)] == before
