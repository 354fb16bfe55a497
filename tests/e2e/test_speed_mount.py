"""`script/speed-mount` times what it says, and leaves nothing behind, not even when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.mounts import loop_devices
from tests.e2e.tools import TIMEOUT, Word, attempt, run, until

SCRIPT = Path(__file__).parents[2] / "script" / "speed-mount"
LINE = re.compile(r"([\w-]+) +([\d.]+)  \(qemu ([\d.]+) and qcowfs ([\d.]+) \S+; CPU [\d.]+ s and [\d.]+ s\)")


def command(folder: Path, *words: Word) -> list[Word]:
    return [sys.executable, SCRIPT, folder, "--mib", "4", *words]


def mounted_below(folder: Path) -> bool:
    return f" {folder}/" in Path("/proc/self/mountinfo").read_text()


def assert_nothing_is_left(folder: Path) -> None:
    assert not mounted_below(folder)
    assert loop_devices(folder) == []
    assert list(folder.iterdir()) == []


def test_each_work_gets_a_line_with_what_both_did(tmp_path: Path) -> None:
    works = ["ext4", "random-read-4k", "aes-write-over"]
    lines = run(*command(tmp_path, "--rounds", "1", *works)).stdout.splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    assert [line and line[1] for line in found] == works, lines
    assert all(float(figure) > 0 for line in found if line for figure in line.groups()[1:]), lines
    assert_nothing_is_left(tmp_path)


def test_interrupted_it_puts_its_mounts_down(tmp_path: Path) -> None:
    words = command(tmp_path, "--rounds", "1000", "read")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(lambda: mounted_below(tmp_path))
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 128 + signal.SIGINT
    assert_nothing_is_left(tmp_path)


def test_an_error_puts_its_mounts_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path.with_name(f"{tmp_path.name}-failing")
    failing.mkdir()
    (failing / "mkfs.ext4").write_text("#!/bin/sh\nexit 7\n")
    (failing / "mkfs.ext4").chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing}:{os.environ['PATH']}")
    result = attempt(*command(tmp_path, "ext4"))
    assert (result.returncode, "mkfs.ext4 -q -F" in result.stderr) == (1, True), result.stderr
    assert_nothing_is_left(tmp_path)


def test_an_unknown_work_is_told(tmp_path: Path) -> None:
    result = attempt(*command(tmp_path, "sleep"))
    assert (result.returncode, "no such work: sleep; there are read, " in result.stderr) == (2, True)
    assert_nothing_is_left(tmp_path)
