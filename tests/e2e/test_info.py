"""`qcowfs info` tells what `qemu-img info` tells, also of images that cannot be mounted."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import kinds
from tests.e2e.kinds import Form, Made, kinds_for
from tests.e2e.tools import (
    KIB,
    MIB,
    convert,
    create,
    poke,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_info,
    raw_file,
    run,
    snapshot_table_at,
)

FORMS = [Form("v2", 512), Form("v3", 64 * KIB), Form("v3", 2 * MIB)]
CASES = [
    pytest.param(form, make, id=f"{form.version}-{form.cluster_size}-{make.__name__}")
    for form in FORMS
    for make in kinds_for(form)
]
OURS = {"file-name", "disk-size"}
"""What we tell of a snapshot and QEMU does not."""

IN_OPEN = 0x20


def our_info(image: Path) -> dict[str, Any]:
    """The record that `qcowfs info --json` prints; nothing may be wrong with the image."""
    result = qcowfs("info", "--json", image)
    assert (result.returncode, result.stderr) == (0, "")
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def assert_same_info(image: Path) -> None:
    ours, theirs = our_info(image), qemu_info(image)
    theirs.pop("children", None)  # newer versions tell of the layers below the format
    for snapshot in ours.get("snapshots", []):
        for key in OURS:
            del snapshot[key]
    assert ours == theirs


@pytest.mark.parametrize(("form", "make"), CASES)
def test_the_record_is_that_of_qemu_for_each_kind_of_image(
    form: Form, make: Callable[[Path, Form], Made], tmp_path: Path
) -> None:
    made = make(tmp_path, form)
    if made.has_snapshots:
        qemu_img("snapshot", "-c", "first", made.image)
        qemu_img("snapshot", "-c", "ünd/second", made.image)
    assert_same_info(made.image)


@pytest.mark.parametrize(
    "fields",
    [
        {"lazy_refcounts": "on"},
        {"refcount_bits": 1},
        {"refcount_bits": 64},
        {"compression_type": "zstd"},
        {"compat": "v2"},
    ],
    ids=str,
)
def test_the_record_is_that_of_qemu_for_each_option(fields: dict[str, object], tmp_path: Path) -> None:
    assert_same_info(create(tmp_path / "image.qcow2", MIB, **fields))


def test_the_record_tells_of_bitmaps(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_img("bitmap", "--add", image, "first")
    qemu_img("bitmap", "--add", "--disable", "-g", "512k", image, "sécond")
    assert len(our_info(image)["format-specific"]["data"]["bitmaps"]) == 2
    assert_same_info(image)


def test_the_record_tells_of_dirt_and_corruption(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    poke_word(image, 72, 0b11)
    assert our_info(image)["format-specific"]["data"]["corrupt"]
    assert our_info(image)["dirty-flag"]
    assert_same_info(image)


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_the_record_tells_of_encryption(kind: str, encrypted_images: dict[str, Path]) -> None:
    image = encrypted_images[kind]
    ours = our_info(image)
    assert ours["encrypted"]
    assert ours["format-specific"]["data"]["encrypt"]["format"] == kind
    assert_same_info(image)


SIZES = [0, 512, 1000 * KIB, 1023 * KIB + 512, MIB + 512, 10 * MIB - 512, 999 * MIB + MIB // 2, 1 << 40]


@pytest.mark.parametrize("size", [*SIZES, 2 << 60])
def test_the_text_has_the_lines_of_qemu(size: int, tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", size, cluster_size="2M")
    result = qcowfs("info", image)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == sorted(_lines_of_qemu(image))


def test_the_text_tells_where_a_backing_file_is(tmp_path: Path) -> None:
    raw_file(tmp_path / "base.raw", MIB, "base")
    image = create(tmp_path / "image.qcow2", MIB, "-u", "-b", "base.raw", "-F", "raw")
    lines = qcowfs("info", image).stdout.splitlines()
    assert f"backing file: base.raw (actual path: {tmp_path}/base.raw)" in lines
    assert sorted(lines) == sorted(_lines_of_qemu(image))


def _lines_of_qemu(image: Path) -> list[str]:
    """Newer versions go on with what lies below the format."""
    lines = qemu_img("info", image).splitlines()
    return lines[: next((n for n, line in enumerate(lines) if line.startswith("Child node")), None)]


def test_the_text_lists_each_snapshot_with_its_file(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 3 * MIB)
    for name in ("a/b", "\x1b[31mred", "plain"):
        qemu_img("snapshot", "-c", name, image)
    lines = qcowfs("info", image).stdout.splitlines()
    start = lines.index("Snapshot list:")
    rows = [line.split() for line in lines[start + 1 : start + 5]]
    assert rows[0] == ["ID", "NAME", "VM", "SIZE", "DISK", "SIZE", "DATE", "FILE"]
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [
        ("1", '"a/b"', "snapshots/a%2Fb.raw"),
        ("2", '"\\x1b[31mred"', "snapshots/%1B[31mred.raw"),
        ("3", '"plain"', "snapshots/plain.raw"),
    ]


def test_features_that_nobody_knows_are_told_not_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    poke_word(image, 72, 1 << 40 | 1 << 5)
    data = our_info(image)["format-specific"]["data"]
    assert data["unsupported-features"] == [
        "incompatible feature bit 5 (unnamed)",
        "incompatible feature bit 40 (unnamed)",
    ]


@contextmanager
def watched(path: Path) -> Iterator[Callable[[], bool]]:
    """A question that tells whether anybody has opened the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(fd, os.fsencode(path), IN_OPEN) > 0

    def was_opened() -> bool:
        try:
            return bool(os.read(fd, 4096))
        except BlockingIOError:
            return False

    try:
        yield was_opened
    finally:
        os.close(fd)


@pytest.mark.parametrize("make", [kinds.over_raw, kinds.over_qcow2, kinds.data_file, kinds.data_file_raw])
def test_neither_backing_nor_data_files_are_opened(
    make: Callable[[Path, Form], Made], tmp_path: Path
) -> None:
    made = make(tmp_path, FORMS[1])
    names = {"over_raw": "base.raw", "over_qcow2": "base.qcow2"}
    other = tmp_path / names.get(make.__name__, "image.data")
    with watched(other) as was_opened:
        assert our_info(made.image)["format"] == "qcow2"
        assert not was_opened()
        run("cat", other)
        assert was_opened()
    other.unlink()
    assert our_info(made.image)["format"] == "qcow2"


def test_an_image_beside_a_writer_is_told_of_with_a_warning(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        print("read 0 1k", file=writer.stdin, flush=True)
        assert "1024" in writer.stdout.readline()
        result = qcowfs("info", "--json", image)
        writer.communicate("quit\n")
    assert result.returncode == 0
    assert result.stderr == (
        f"qcowfs: {image}: in use: pid {writer.pid} (qemu-io) has it open for 'write'; what follows may be "
        "out of date\n"
    )
    assert json.loads(result.stdout)["virtual-size"] == MIB


def test_a_snapshot_table_that_was_cut_is_told_and_the_rest_shown(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_img("snapshot", "-c", "lost", image)
    table = snapshot_table_at(image)
    os.truncate(image, table)
    result = qcowfs("info", "--json", image)
    assert result.returncode == 0
    assert result.stderr == (
        f"qcowfs: {image}: snapshot table at {table:#x}: record 1 of 1 is cut short by the end of the "
        "file or of the 64 MiB limit\n"
    )
    assert json.loads(result.stdout)["snapshots"] == []


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    poke(image, 20, struct.pack(">I", 40))
    result = qcowfs("info", image)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == f"qcowfs: {image}: header field cluster_bits = 40 is outside 9..21\n"
    poke(image, 0, b"XFI")
    result = qcowfs("info", image)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"qcowfs: {image}: is not a qcow2 image (starts with 58 46 49 fb, not ")


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    result = qcowfs("info", tmp_path / "gone")
    assert (result.returncode, result.stderr) == (1, f"qcowfs: {tmp_path}/gone: No such file or directory\n")


def test_the_name_is_shown_as_it_was_given(tmp_path: Path) -> None:
    raw = raw_file(tmp_path / "content", MIB, "info")
    image = convert(raw, tmp_path / "odd name.qcow2")
    shutil.copy(image, tmp_path / "-x")
    for words in (["odd name.qcow2"], ["--", "-x"]):
        result = qcowfs("info", "--json", *words, cwd=tmp_path)
        assert json.loads(result.stdout)["filename"] == words[-1]
