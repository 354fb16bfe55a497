"""Progress: a bar on a terminal, JSON for programs, silence for everyone else."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.e2e.tools import (
    MIB,
    QCOWFS,
    TIMEOUT,
    create,
    host_offset,
    l2_entry_at,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_io,
    raw_file,
)

SIZE = 9 * MIB


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return raw_file(tmp_path / "a.raw", SIZE, "progress")


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An image over a raw file, with compressed clusters and something to mend."""
    raw_file(tmp_path / "base.raw", SIZE, "below")
    image = create(tmp_path / "over.qcow2", SIZE, "-b", "base.raw", "-F", "raw")
    qemu_io(image, "write -q -P 1 1M 1M", "write -q -c -P 2 4M 64k")
    poke_word(image, l2_entry_at(image, MIB), host_offset(image, MIB))
    return image


OF_OVERLAYS: dict[str, tuple[str, ...]] = {
    "check": (), "check data": ("--data",), "commit": (), "rebase": ("-b", ""), "map": (),
    "map picture": ("--picture", "a.svg"), "map range": ("--json", "-s", "1M", "--max-length", "2M"),
    "amend": ("-o", "refcount_bits=32"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_OVERLAYS)
def test_programs_hear_how_far_work_on_an_image_is(what: str, overlay: Path) -> None:
    command = what.split()[0]
    if command != "check":
        assert qcowfs("check", "--repair", "all", overlay).returncode == 0
    words = (word.replace("a.svg", str(overlay.with_name("a.svg"))) for word in OF_OVERLAYS[what])
    result = qcowfs(command, "--progress=json", *words, overlay)
    assert result.returncode == (2 if command == "check" else 0)
    assert_goes_to_the_end([json.loads(line)["progress"] for line in result.stderr.splitlines()])


def test_a_repair_tells_of_the_check_and_then_of_itself(overlay: Path) -> None:
    result = qcowfs("check", "--repair", "all", "--data", "--progress=json", overlay)
    assert result.returncode == 0
    records = [json.loads(line)["progress"] for line in result.stderr.splitlines()]
    ends = [at for at, record in enumerate(records, 1) if record["percent"] == 100]
    assert len(ends) == 2
    assert_goes_to_the_end(records[: ends[0]])
    assert_goes_to_the_end(records[ends[0] :])


def assert_goes_to_the_end(records: list[dict[str, float]]) -> None:
    assert {record["total"] for record in records} == {records[-1]["done"]}
    assert records[-1]["percent"] == 100
    done = [record["done"] for record in records]
    assert done == sorted(set(done))


@pytest.mark.parametrize("command", ["convert", "compare", "create"])
def test_programs_get_lines_that_end_at_the_end(command: str, raw: Path, tmp_path: Path) -> None:
    words: dict[str, tuple[str | Path, ...]] = {
        "convert": (raw, tmp_path / "b.qcow2"),
        "compare": (raw, raw),
        "create": ("-o", "preallocation=full", tmp_path / "b.qcow2", str(SIZE)),
    }
    result = qcowfs(command, "--progress=json", *words[command])
    records = [json.loads(line)["progress"] for line in result.stderr.splitlines()]
    assert result.returncode == 0
    assert_goes_to_the_end(records)


@pytest.mark.parametrize(
    ("command", "label"), [("check", b"checking"), ("commit", b"committing"), ("map", b"looking")]
)
def test_a_bar_leaves_standard_output_as_it_is(command: str, label: bytes, overlay: Path) -> None:
    assert qcowfs("check", "--repair", "all", overlay).returncode == 0
    said = qcowfs(command, *(["--keep"] if command == "commit" else []), overlay).stdout
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*QCOWFS, command, str(overlay)], stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    os.close(ours)
    assert label in shown
    assert done.stdout == said


def test_a_terminal_shows_a_bar_that_vanishes(raw: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [*QCOWFS, "convert", str(raw), str(tmp_path / "b.raw")]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    subprocess.run(words, stderr=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    os.close(ours)
    assert b"copying" in shown
    assert b"100%" in shown
    assert shown.endswith(b"\x1b[2K")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # nobody else has the terminal open any more
        return b""


@pytest.mark.parametrize("words", [(), ("--progress=none",)])
def test_a_pipe_gets_nothing(words: tuple[str, ...], raw: Path, tmp_path: Path) -> None:
    result = qcowfs("convert", *words, raw, tmp_path / "b.raw")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_nobody_who_looks_is_no_reason_to_stop(raw: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    target = tmp_path / "copy.qcow2"
    command = [*QCOWFS, "convert", "--progress=json", "--format", "raw", str(raw), str(target)]
    code = subprocess.run(command, stderr=writer, check=False, timeout=TIMEOUT).returncode
    os.close(writer)
    assert code == 0
    qemu_img("compare", "-f", "qcow2", "-F", "raw", target, raw)
