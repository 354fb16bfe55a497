"""Progress: a bar on a terminal, JSON for programs, silence for everyone else."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.e2e.tools import MIB, QCOWFS, qcowfs, raw_file

SIZE = 9 * MIB


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return raw_file(tmp_path / "a.raw", SIZE, "progress")


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
    assert {record["total"] for record in records} == {records[-1]["done"]}
    assert records[-1]["percent"] == 100
    done = [record["done"] for record in records]
    assert done == sorted(set(done))


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
