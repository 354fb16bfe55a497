"""A guest's file system: changed by way of QEMU between snapshots, then read from every file of a mount."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.mounts import end, loop_mounted, mounted
from tests.e2e.tools import MIB, content, convert, create, qemu_img, run

SIZE = 24 * MIB
SNAPSHOTS = ("installed", "upgraded")
State = dict[str, str]


@contextmanager
def guest(image: Path, folder: Path) -> Iterator[Path]:
    """The image's file system, writable, on a loop device over what QEMU exports."""
    export, pid_file = folder / "export", folder / "pid"
    export.touch()
    run(
        "qemu-storage-daemon", "--daemonize", "--pidfile", pid_file,
        "--blockdev", f"driver=file,node-name=file,filename={image}",
        "--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap",
        "--export", f"type=fuse,id=out,node-name=disk,mountpoint={export},writable=on",
    )  # fmt: skip
    pid = int(pid_file.read_text())
    try:
        (folder / "guest").mkdir(exist_ok=True)
        run("mount", "-o", "loop,discard", export, folder / "guest")
        try:
            yield folder / "guest"
        finally:
            run("umount", folder / "guest")
    finally:
        end(pid, signal.SIGTERM)


def install(root: Path) -> None:
    for number in range(40):
        folder = root / f"folder {number % 5}"
        folder.mkdir(exist_ok=True)
        (folder / f"file {number}").write_bytes(content(number * 3001, number))
    (root / "link").symlink_to("folder 1/file 6")
    (root / "sparse").touch()
    os.truncate(root / "sparse", 5 * MIB)


def upgrade(root: Path) -> None:
    shutil.rmtree(root / "folder 0")
    (root / "folder 1").rename(root / "renamed")
    (root / "folder 2" / "file 7").write_bytes(content(2 * MIB, "upgrade"))
    with (root / "sparse").open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"no longer empty")


def work(root: Path) -> None:
    (root / "folder 2" / "file 7").unlink()
    (root / "report").write_bytes(content(MIB + 1, "work"))
    with (root / "folder 3" / "file 8").open("ab") as file:
        file.write(b"appended")


def state(root: Path) -> State:
    """Every path below the root, with its kind or a digest of its content."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def with_history(image: Path, folder: Path) -> dict[str, State]:
    """Let a guest work on the image between snapshots; returns what it saw at each."""
    seen = {}
    for name, change in (("installed", install), ("upgraded", upgrade), ("live", work)):
        with guest(image, folder) as root:
            change(root)
            seen[name] = state(root)
        if name in SNAPSHOTS:
            qemu_img("snapshot", "-c", name, image)
    return seen


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A raw disk with a new file system."""
    raw = tmp_path / "raw"
    raw.touch()
    os.truncate(raw, SIZE)
    run("mkfs.ext4", "-q", "-F", raw)
    return raw


@pytest.mark.parametrize(
    "fields",
    [{}, {"compat": "v2", "cluster_size": 512}, {"extended_l2": "on"}, {"cluster_size": "2M"}],
    ids=["usual", "version 2 with small clusters", "extended L2", "large clusters"],
)
def test_a_guests_files_are_found_in_the_disk_and_in_every_snapshot(
    fields: dict[str, object], empty: Path, tmp_path: Path
) -> None:
    image = convert(empty, tmp_path / "image.qcow2", **fields)
    seen = with_history(image, tmp_path)
    assert len({str(sorted(files.items())) for files in seen.values()}) == 3
    assert_found(image, tmp_path, seen)


def test_a_guests_files_are_found_over_a_compressed_backing_file(empty: Path, tmp_path: Path) -> None:
    base = convert(empty, tmp_path / "base.qcow2", "-c", compression_type="zstd")
    image = create(tmp_path / "image.qcow2", SIZE, "-b", base, "-F", "qcow2")
    assert_found(image, tmp_path, with_history(image, tmp_path))


def assert_found(image: Path, folder: Path, seen: dict[str, State]) -> None:
    """Fail unless the mounted image shows exactly what the guest saw, in file systems without a fault."""
    with mounted(image) as mount:
        disks = {"live": mount.disk} | {name: mount.snapshot(name) for name in SNAPSHOTS}
        for name, disk in disks.items():
            run("e2fsck", "-fn", disk)
            with loop_mounted(disk, folder / "look") as root:
                assert state(root) == seen[name]
