"""The manual pages hold what the parsers hold, and the formatter has nothing to say against them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfs.cli.main import COMMANDS
from qcowfs.cli.words import commands


def qcowfs_man(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qcowfs", "man", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    assert qcowfs_man("--output", str(folder)).returncode == 0
    return folder


def test_there_is_a_page_for_the_program_and_for_each_command(pages: Path) -> None:
    names = {page.name for page in pages.iterdir()}
    assert names == {"qcowfs.1", *(f"qcowfs-{name}.1" for name in COMMANDS)}
    assert qcowfs_man("map").stdout == (pages / "qcowfs-map.1").read_text()
    assert qcowfs_man().stdout == (pages / "qcowfs.1").read_text()
    assert qcowfs_man("map", "--output", str(pages)).returncode == 2


def test_each_page_says_what_the_help_says(pages: Path) -> None:
    for command in commands():
        text = (pages / f"qcowfs-{command.name}.1").read_text().replace("\\-", "-")
        assert command.summary in text
        for word in command.words:
            assert all(rf"\fB{flag}\fR" in text for flag in word.flags)
            assert word.help in text


def test_the_formatter_has_no_complaints(pages: Path) -> None:
    for page in sorted(pages.iterdir()):
        result = subprocess.run(
            ["groff", "-man", "-ww", "-Tascii", page], capture_output=True, text=True, check=True, timeout=60
        )
        assert result.stderr == ""
        assert "EXIT STATUS" in re.sub(".\x08", "", result.stdout)
