"""The documents against the program: options, exit codes, files, links, names and layers that they state."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

from qcowfs.cli import check, exits
from qcowfs.cli.main import COMMANDS
from qcowfs.cli.mount_words import as_arguments
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.metadata.snapshots import file_names
from tests.test_layers import LAYERS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
UNIT = ROOT / "systemd" / "qcowfs@.service"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMAND = re.compile(rf"\bqcowfs ({'|'.join(COMMANDS)})\b([^`\n#]*)")
MOUNT_WORDS = re.compile(r"-o ([a-z_]+[a-z_,=0-9]*)|fuse\.qcowfs (\S+) 0 0")
OPTION_SPAN = re.compile(r"`(--[a-z][^`]*)`")
LINK = re.compile(r"\[[^]]*\]\(([^)#]+)\)")
TEST_FILE = re.compile(r"tests/[\w/]+\.py")
OF_MOUNT_ALONE = {"loop", "offset"}


@cache
def options_of(command: str) -> frozenset[str]:
    """The options in a command's help text."""
    words = [sys.executable, "-m", "qcowfs", command, "--help"]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return frozenset(OPTION.findall(text)) - {"--help"}


def table(document: Path, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head; there are some."""
    section = f"\n{document.read_text()}".partition(f"\n{heading}\n")[2]
    lines = section.partition("\n|---")[2].splitlines()[1:]
    rows = [_cells(line) for line in takewhile(lambda line: line.startswith("|"), lines)]
    assert rows, f"{document}: no table below {heading}"
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def test_the_table_of_options_lists_exactly_those_of_mount() -> None:
    rows = table(DOCS / "mounting.md", "## Options")
    listed = [option for row in rows for option in OPTION.findall(row[0])]
    assert sorted(listed) == sorted(options_of("mount"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_uses_options_that_the_command_has(document: Path) -> None:
    text = document.read_text()
    for command, rest in COMMAND.findall(text):
        assert set(OPTION.findall(rest)) <= options_of(command), f"qcowfs {command}{rest}"


@pytest.mark.parametrize("document", [*DOCUMENTS, UNIT], ids=lambda path: path.name)
def test_every_option_named_in_passing_exists(document: Path) -> None:
    known = frozenset[str]().union(*map(options_of, COMMANDS))
    text = document.read_text()
    named = [*OPTION_SPAN.findall(text), *re.findall(r"OPTIONS=(--.*)", text)]
    assert {option for span in named for option in OPTION.findall(span)} <= known


def test_every_word_for_mount_exists() -> None:
    pages = README.read_text() + (DOCS / "mounting.md").read_text()
    found = [short or line for short, line in MOUNT_WORDS.findall(pages)]
    words = [word for line in found for word in line.split(",")]
    ours = ",".join(word for word in words if word.partition("=")[0] not in OF_MOUNT_ALONE)
    assert "allow_other" in ours
    assert {argument.partition("=")[0] for argument in as_arguments(ours)} <= options_of("mount")


def test_the_table_of_exit_codes_is_the_programs() -> None:
    listed = [int(row[0]) for row in table(DOCS / "commands.md", "## Exit codes")]
    codes = {exits.EXIT_OK, exits.EXIT_HOST, *exits.EXIT_CODES.values(), exits.EXIT_INTERRUPTED}
    assert listed == sorted(codes)


def test_the_table_of_the_checks_codes_is_the_commands() -> None:
    listed = [int(row[0]) for row in table(DOCS / "commands.md", "## Check")]
    assert listed == [check.CLEAN, check.NOT_COMPLETED, check.DAMAGED, check.LEAKING, check.UNSUPPORTED]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_file_that_a_document_names_exists(document: Path) -> None:
    named = TEST_FILE.findall(document.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_promise_names_what_proves_it() -> None:
    for document, heading in ((README, "## Evidence"), (DOCS / "evidence.md", "# Evidence")):
        assert [row[0] for row in table(document, heading) if not TEST_FILE.search(row[1])] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    links = LINK.findall(document.read_text())
    assert [link for link in links if not (document.parent / link).is_file()] == []


def test_snapshots_get_the_file_names_that_the_rule_shows() -> None:
    page = DOCS / "snapshot-names.md"
    rows = [["".join(spans(cell)) for cell in row] for row in table(page, "# The file name of a snapshot")]
    snapshots = [Snapshot(0, 0, id_.encode(), name.encode(), 0, 0, 0, 0) for id_, name, _ in rows]
    assert file_names(snapshots) == [file for _, _, file in rows]


def test_the_design_shows_the_layers_that_are_enforced() -> None:
    rows = [spans(row[0]) for row in table(DOCS / "design.md", "## Layers")]
    shown = [place for row in rows for place in row]
    package = ROOT / "qcowfs"
    there = {p for p in LAYERS if (package / p).is_dir() or (package / f"{p}.py").is_file()} - {"__main__"}
    assert set(shown) == there
    assert [LAYERS[place] for place in shown] == sorted(LAYERS[place] for place in shown)
