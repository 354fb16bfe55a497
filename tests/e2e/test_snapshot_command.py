"""`qcowfs snapshot` on images and on mounts: what it does, prints and refuses, against qemu-img."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mounts import mounted
from tests.e2e.test_live_snapshots import files, names
from tests.e2e.test_locks import WRITER, held
from tests.e2e.test_write_locks import program
from tests.e2e.tools import (
    MIB,
    Result,
    Word,
    as_raw,
    assert_same,
    convert,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_info,
    qemu_io,
    raw_file,
)
from tests.e2e.writes import assert_holds, assert_sound

Target = Callable[[Path], "Iterator[Path]"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return convert(raw_file(tmp_path / "content", MIB, "command"), tmp_path / "image.qcow2")


def snapshot(*words: Word) -> Result:
    return qcowfs("snapshot", *words)


def done(*words: Word) -> None:
    result = snapshot(*words)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def listed(target: Path) -> list[dict[str, Any]]:
    result = snapshot("list", "--json", target)
    assert (result.returncode, result.stderr) == (0, "")
    records: list[dict[str, Any]] = json.loads(result.stdout)
    return records


@contextmanager
def offline(image: Path) -> Iterator[Path]:
    yield image


@contextmanager
def folder(image: Path) -> Iterator[Path]:
    with mounted(image, writable=True) as mount:
        yield mount.folder


@contextmanager
def mounted_image(image: Path) -> Iterator[Path]:
    with mounted(image, writable=True):
        yield image


EVERY_WAY = pytest.mark.parametrize("way", [offline, folder, mounted_image], ids=lambda f: f.__name__)


@EVERY_WAY
def test_every_action_does_to_the_image_what_it_says(way: Any, image: Path, tmp_path: Path) -> None:  # noqa: ANN401
    qemu_img("snapshot", "-c", "old", image)
    qemu_io(image, "write -q -P 7 0 500k")
    now = as_raw(image, tmp_path / "now")
    with way(image) as target:
        done("create", target, "näme/1")
        done("create", target, "old")
        assert [(s["id"], s["name"]) for s in listed(target)] == [("1", "old"), ("2", "näme/1"), ("3", "old")]
        done("rename", target, "3", "2")
        done("rename", target, "1", "first")
        done("revert", target, "first")
        done("delete", target, "2")  # an id comes before a name
        assert names(image) == ["first", "2"]
        done("delete", target, "1")
    assert names(image) == ["2"]
    assert_sound(image)
    assert_holds(image, tmp_path / "content")
    assert_same(as_raw(image, tmp_path / "raw", "2"), now)


@EVERY_WAY
def test_list_as_json_has_the_keys_and_values_of_qemu_img(way: Any, image: Path) -> None:  # noqa: ANN401
    for name in ("one", "a/b", "one"):
        qemu_img("snapshot", "-c", name, image)
    with way(image) as target:
        records = listed(target)
        expected = qemu_info(image)["snapshots"]
    own = {"file-name", "disk-size"}
    shown = [{key: value for key, value in r.items() if key not in own} for r in records]
    for record in (*shown, *expected):
        record.pop("icount", None)  # this qemu-img stores 0 where none is counted
    assert shown == expected
    assert [(r["file-name"], r["disk-size"]) for r in records] == [
        ("one.raw", MIB), ("a%2Fb.raw", MIB), ("one%id=3.raw", MIB),
    ]  # fmt: skip


@EVERY_WAY
def test_list_for_people_has_a_line_for_each_snapshot(way: Any, image: Path) -> None:  # noqa: ANN401
    with way(image) as target:
        empty = snapshot("list", target)
        assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "")
        assert listed(target) == []
        done("create", target, "a/b")
        lines = snapshot("list", target).stdout.splitlines()
    assert lines[0] == "Snapshot list:"
    assert lines[1].split("  ")[0] == "ID"
    assert re.fullmatch(
        r'1 +"a/b" +0 B +1 MiB +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +snapshots/a%2Fb\.raw', lines[2]
    )
    assert len(lines) == 3


@EVERY_WAY
@pytest.mark.parametrize("action", ["delete", "rename", "revert"])
def test_a_snapshot_that_is_not_there_is_one_clear_line(action: str, way: Any, image: Path) -> None:  # noqa: ANN401
    qemu_img("snapshot", "-c", "some", image)
    more = ("new",) if action == "rename" else ()
    with way(image) as target:
        result = snapshot(action, target, "none", *more)
    said = 'qcowfs: no snapshot has the id or name \'none\'; there are: "1" "some"\n'
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)
    assert names(image) == ["some"]
    assert_sound(image)


def test_what_the_command_does_shows_in_the_mount_at_once(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        done("create", image, "a/b")
        assert files(mount) == ["a%2Fb.raw"]
        done("create", mount.folder, "a/b")
        assert files(mount) == ["a%2Fb.raw", "a%2Fb%id=2.raw"]
        assert_same(mount.snapshots / "a%2Fb%id=2.raw", image.parent / "content")
        done("rename", image, "2", "plain")
        assert files(mount) == ["a%2Fb.raw", "plain.raw"]
        assert not (mount.snapshots / "a%2Fb%id=2.raw").exists()
        done("delete", image, "1")
        assert files(mount) == ["plain.raw"]
        assert not (mount.snapshots / "a%2Fb.raw").exists()
    assert_sound(image)


@pytest.mark.parametrize(
    "words", [("create", "x"), ("delete", "some"), ("rename", "some", "x"), ("revert", "some")]
)
def test_an_image_that_a_running_qemu_writes_is_left_alone(words: tuple[str, ...], image: Path) -> None:
    qemu_img("snapshot", "-c", "some", image)
    action, *rest = words
    with held(image, *WRITER) as other:
        result = snapshot(action, image, *rest)
        said = f"qcowfs: {image}: in use: pid {other.pid} ({program(other.pid)}) has it open for 'write'; "
    assert (result.returncode, result.stderr.startswith(said), result.stderr.count("\n")) == (5, True, 1)
    assert names(image) == ["some"]


@pytest.mark.parametrize("by", ["folder", "image"])
def test_a_read_only_mount_lists_its_snapshots_and_changes_none(by: str, image: Path) -> None:
    qemu_img("snapshot", "-c", "some", image)
    before = image.read_bytes()
    with mounted(image) as mount:
        target = mount.folder if by == "folder" else image
        assert [record["name"] for record in listed(target)] == ["some"]
        for words in (("create", "x"), ("delete", "some"), ("rename", "some", "x"), ("revert", "some")):
            result = snapshot(words[0], target, *words[1:])
            said = f"qcowfs: {mount.folder}: is mounted read-only\n"
            assert (result.returncode, result.stdout, result.stderr) == (2, "", said)
    assert image.read_bytes() == before


def test_a_damaged_image_is_refused_and_left_as_it_is(image: Path) -> None:
    qemu_img("snapshot", "-c", "some", image)
    l1_at = int.from_bytes(image.read_bytes()[40:48], "big")
    poke_word(image, l1_at, 1 << 40)  # an L2 table far past the end
    before = image.read_bytes()
    for words in (("create", "x"), ("revert", "some")):
        result = snapshot(words[0], image, *words[1:])
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (4, "", 1)
        assert result.stderr.startswith(f"qcowfs: {image}: ")
        assert "0x10000000000" in result.stderr
    assert image.read_bytes() == before


def test_an_image_marked_dirty_or_corrupt_takes_no_snapshot(image: Path) -> None:
    for bit, word in ((1, "dirty"), (2, "corrupt")):
        copy = Path(shutil.copy(image, image.parent / f"{word}.qcow2"))
        poke_word(copy, 72, bit)
        result = snapshot("create", copy, "x")
        assert (result.returncode, result.stdout) == (4, "")
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"qcowfs: {copy}: is marked {word}")


def test_wrong_words_are_usage_errors(image: Path, tmp_path: Path) -> None:
    for words in ((), ("create", image), ("drop", image, "x"), ("rename", image, "x"), ("list",)):
        result = snapshot(*words)
        assert (result.returncode, result.stdout) == (2, "")
        assert "Traceback" not in result.stderr
    missing = tmp_path / "missing.qcow2"
    result = snapshot("create", missing, "x")
    assert (result.returncode, result.stderr) == (1, f"qcowfs: {missing}: No such file or directory\n")
    result = snapshot("create", tmp_path / "content", "x")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    result = snapshot("create", tmp_path, "x")
    assert (result.returncode, result.stderr.count("\n")) in ((1, 1), (2, 1))


def test_names_may_be_anything_up_to_the_formats_limit(image: Path) -> None:
    odd = ["", "-x", "two\nlines", b"\xff\xfe".decode(errors="surrogateescape"), "é" * 32767]
    for name in odd:
        done("create", "--", image, name)
    with mounted(image, writable=True) as mount:
        for name in odd:
            done("create", "--", mount.folder, name)
        assert len(files(mount)) == 2 * len(odd)
        assert all(len(os.fsencode(file)) <= 255 for file in files(mount))
        result = snapshot("create", mount.folder, "x" * 65536)
        said = f"qcowfs: {image}: a snapshot name of 65536 bytes, over 65535\n"
        assert (result.returncode, result.stderr) == (2, said)
        mount.take_complaints()
    assert_sound(image)
    assert len(qemu_info(image)["snapshots"]) == 2 * len(odd)
