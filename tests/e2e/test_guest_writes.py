"""File systems of the kernel, made and written to on disk.raw through a loop device, are sound afterwards."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.e2e.mounts import loop_mounted, mounted
from tests.e2e.test_guest_filesystems import state
from tests.e2e.tools import MIB, create, run
from tests.e2e.writes import assert_holds, assert_sound

SIZE = 1024 * MIB
_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "test")
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ext4": (("mkfs.ext4", "-q", "-F"), ("e2fsck", "-fn")),
    "xfs": (("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n")),
    "btrfs": (("mkfs.btrfs", "-q", "-f"), ("btrfs", "check", "--readonly")),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree of some tens of MiB as a tar file: Python's own library."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if member.issym() or member.islnk():  # a link out of the guest would lead to the host's own files
            return None
        return None if set(Path(member.name).parts) & set(_LEFT_OUT) else member

    path = tmp_path_factory.mktemp("sources") / "sources.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(Path(os.__file__).parent, arcname="library", filter=kept)
    assert path.stat().st_size > 10 * MIB
    return path


def work(root: Path, sources: Path) -> None:
    """Unpack the sources twice, sync, remove and change a part."""
    for name in ("one", "two"):
        (root / name).mkdir()
        run("tar", "-xf", sources, "-C", root / name)
    run("sync", "-f", root)
    shutil.rmtree(root / "one" / "library" / "asyncio")
    for file in sorted((root / "two" / "library").glob("*.py")):
        file.write_bytes(file.read_bytes()[::-1])


@pytest.mark.parametrize(("make", "check"), KINDS.values(), ids=KINDS)
def test_a_file_system_that_was_written_through_a_loop_device_is_sound(
    make: tuple[str, ...], check: tuple[str, ...], sources: Path, tmp_path: Path
) -> None:
    image, twin = create(tmp_path / "image.qcow2", SIZE), tmp_path / "twin"
    with mounted(image, writable=True) as mount:
        run(*make, mount.disk)
        with loop_mounted(mount.disk, tmp_path / "guest", writable=True) as root:
            work(root, sources)
            seen = state(root)
        run(*check, mount.disk)
        run("cp", "--sparse=always", mount.disk, twin)
    assert_sound(image)
    assert_holds(image, twin)
    assert len(seen) > 1000
    with mounted(image) as mount, loop_mounted(mount.disk, tmp_path / "guest") as root:
        assert state(root) == seen
