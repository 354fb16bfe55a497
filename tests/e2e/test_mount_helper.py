"""Mounting as mount(8) does it: by type, from an fstab, and by the helper itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.e2e.mounts import in_background, is_mounted
from tests.e2e.tools import MIB, Result, Word, attempt, create, qemu_io, run

SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def command_folder(tmp_path: Path) -> Path:
    """A folder that holds nothing but the command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "qcowfs").symlink_to(SCRIPTS / "qcowfs")
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "image, with comma.qcow2", MIB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def alone(folder: Path, *command: Word) -> Result:
    """Run a command that mounts the image, then show the disk's status and unmount it again.

    mount(8) lets a helper search standard folders only, so this happens in a namespace of its own in
    which one of them has the command; nothing of it outlives the call.
    """
    script = """
        mount --bind "$1" /usr/local/bin
        here=$2
        shift 2
        "$@" >&2
        stat --format "%s %a %u" "$here/disk.raw"
        umount "$here"
    """
    namespace = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    return attempt(*namespace, "sh", "-ec", script, "sh", folder.parent / "bin", folder, *command)


def test_mount_finds_the_command_by_the_type(image: Path, folder: Path, command_folder: Path) -> None:
    options = "ro,noatime,uid=77,mode=444"
    result = alone(folder, "mount", "-t", "fuse.qcowfs", "-o", options, image, folder)
    assert (result.returncode, result.stdout) == (0, f"{MIB} 444 77\n"), result.stderr


def test_a_line_of_fstab_mounts_the_image(
    image: Path, folder: Path, command_folder: Path, tmp_path: Path
) -> None:
    table = tmp_path / "fstab"
    name = str(image).replace(" ", "\\040")
    table.write_text(f"{name} {folder} fuse.qcowfs ro,nofail,x-systemd.automount,allow_other,uid=5 0 0\n")
    result = alone(folder, "mount", "-T", table, folder)
    assert (result.returncode, result.stdout) == (0, f"{MIB} 400 5\n"), result.stderr


def test_mount_passes_on_what_is_wrong(folder: Path, command_folder: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"no image")
    result = alone(folder, "mount", "-t", "fuse.qcowfs", junk, folder)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"qcowfs: {junk}: is not a qcow2 image (starts with 6e 6f 20 69, not 51 46 49 fb)" in result.stderr


def test_the_helper_of_fuse_finds_the_command_on_the_path(
    image: Path, folder: Path, command_folder: Path
) -> None:
    environment = {**os.environ, "PATH": f"{command_folder}:{os.environ['PATH']}"}
    words: list[Word] = ["mount.fuse3", image, folder, "-t", "fuse.qcowfs", "-o", "ro,gid=3,mode=0040"]
    with in_background(folder, *words, env=environment) as daemon:
        status = daemon.disk.stat()
        assert (status.st_gid, status.st_mode & 0o777) == (3, 0o040)
        run("umount", folder)
        daemon.wait()
        qemu_io(image, "write -q 0 1k")


@pytest.mark.parametrize("words", [[], ["-o", "rw,mode=0440", "-s"], ["-t", "qcowfs", "-n", "-v"]])
def test_the_helper_takes_what_mount_gives_it(words: list[str], image: Path, folder: Path) -> None:
    with in_background(folder, SCRIPTS / "mount.qcowfs", image, folder, *words):
        assert (folder / "disk.raw").stat().st_mode & 0o777 == (0o440 if "-o" in words else 0o600)


@pytest.mark.parametrize("words", [("mount.qcowfs", "-f"), ("qcowfs", "mount", "--dry-run")])
def test_a_dry_run_does_everything_but_mount(words: tuple[str, ...], image: Path, folder: Path) -> None:
    command, *options = words
    run(SCRIPTS / command, *options, image, folder)
    assert not is_mounted(folder)
    qemu_io(image, "write -q 0 1k")
    image.write_bytes(b"no image")
    result = attempt(SCRIPTS / command, *options, image, folder)
    assert result.returncode == 2
    assert result.stderr.startswith(f"qcowfs: {image}: is not a qcow2 image ")
