"""The three shells complete what the parsers know, tried in the shells that are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcowfs.cli.main import COMMANDS
from qcowfs.cli.words import commands

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    words = [sys.executable, "-m", "qcowfs", "completion", shell]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_command_and_option_is_known() -> None:
    found = {command.name: command for command in commands()}
    assert list(found) == list(COMMANDS)
    flags = {flag for option in found["convert"].options for flag in option.flags}
    assert {"--compress", "-c", "-O", "--level", "-o", "--progress", "--snapshot"} <= flags
    assert [operand.value for operand in found["convert"].operands] == ["SOURCE", "TARGET"]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_has_every_option_and_is_sound(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    for command in commands():
        for flag in (flag for option in command.options for flag in option.flags):
            wanted = f"-l {flag[2:]}" if shell == "fish" and flag.startswith("--") else flag
            wanted = f"-s {flag[1:]}" if shell == "fish" and not flag.startswith("--") else wanted
            assert wanted in text
    path = tmp_path / "script"
    path.write_text(text)
    result = subprocess.run([shell, "-n", path], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qcowfs conv", ["convert"]),
        ("qcowfs --v", ["--version"]),
        ("qcowfs convert --comp", ["--compress"]),
        ("qcowfs convert --target-format ", ["raw", "qcow2"]),
        ("qcowfs convert -c --progress j", ["json"]),
        ("qcowfs completion z", ["zsh"]),
        ("qcowfs info fil", []),
    ],
)
def test_bash_offers_what_fits(line: str, expected: list[str]) -> None:
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{script('bash')}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        'COMPREPLY=(); _qcowfs; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qcowfs conv", {"convert"}),
        ("qcowfs convert --comp", {"--compress"}),
        ("qcowfs convert --progress j", {"json"}),
        ("qcowfs completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_fish_offers_what_fits(line: str, expected: set[str]) -> None:
    code = f"{script('fish')}\ncomplete -C '{line}'"
    result = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert {offer.split("\t")[0] for offer in result.stdout.splitlines()} == expected
