"""What is wrong with a mount point or a call is told in one line, with its exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.mounts import in_background, is_mounted, mounted, refusal
from tests.e2e.tools import MIB, QCOWFS, Word, attempt, create, qcowfs

ODD_NAMES = [
    "a,b", "back\\slash", "ümlaut", "new\nline", "tab\t", "space and #", "x=y", "line\u2028separator",
    "form\ffeed", b"\xff\xfe".decode(errors="surrogateescape"),
]  # fmt: skip
STRICT = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
"""Where Python encodes as in any common locale, even if the tests run in the locale C."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "image.qcow2", MIB)


def test_an_absent_mount_point_is_refused(image: Path, tmp_path: Path) -> None:
    result = qcowfs("mount", image, tmp_path / "absent")
    assert result.returncode == 2
    assert result.stderr == f"qcowfs: mount point {tmp_path}/absent: No such file or directory\n"
    assert result.stdout == ""


def test_a_file_as_mount_point_is_refused(image: Path) -> None:
    result = qcowfs("mount", image, image)
    assert result.returncode == 2
    assert result.stderr == f"qcowfs: mount point {image}: is not a folder; make one with mkdir\n"


@pytest.mark.parametrize("foreground", [[], ["--foreground"]], ids=["background", "foreground"])
def test_a_folder_that_shows_an_image_already_is_refused(foreground: list[Word], image: Path) -> None:
    with mounted(image) as mount:
        folder = mount.folder
        result = qcowfs("mount", image, folder, *foreground)
        assert result.returncode == 2
        assert result.stderr == (
            f"qcowfs: mount point {folder}: already shows an image; free it with qcowfs umount {folder}\n"
        )
        assert mount.disk.stat().st_size == MIB


def test_a_folder_inside_a_mount_cannot_be_mounted_on_but_the_mount_lives_on(image: Path) -> None:
    with mounted(image) as mount:
        result = qcowfs("mount", image, mount.disk)
        assert result.returncode == 2
        assert result.stderr == f"qcowfs: mount point {mount.disk}: is not a folder; make one with mkdir\n"
        assert mount.disk.stat().st_size == MIB


def test_a_folder_with_content_can_be_mounted_on_and_shows_it_again_afterwards(
    image: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "note").write_text("still here")
    with mounted(image, at=folder):
        assert not (folder / "note").exists()
    assert (folder / "note").read_text() == "still here"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_image_of_any_name_can_be_mounted_from_the_foreground(name: str, tmp_path: Path) -> None:
    image = create(tmp_path / "plain", MIB).rename(tmp_path / name)
    with mounted(image, env=STRICT) as mount:
        assert mount.disk.stat().st_size == MIB


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_image_of_any_name_can_be_mounted_in_the_background(name: str, tmp_path: Path) -> None:
    image = create(tmp_path / "plain", MIB).rename(tmp_path / name)
    with in_background(tmp_path / "here", *QCOWFS, "mount", image, tmp_path / "here", env=STRICT) as daemon:
        assert daemon.said.startswith(f"{tmp_path}/")
        assert daemon.disk.stat().st_size == MIB


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_image_can_be_mounted_on_a_folder_of_any_name(name: str, image: Path, tmp_path: Path) -> None:
    """In a namespace of its own, since a mount with such a name is in everybody's table of mounts."""
    folder = tmp_path / name
    folder.mkdir()
    script = """
        image=$1 here=$2
        shift 2
        "$@" mount "$image" "$here" >&2
        stat --format %s "$here/disk.raw"
        "$@" mount "$image" "$here" || echo "exit code $?"
        "$@" umount "$here"
        ls "$here"
    """
    namespace = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    result = attempt(*namespace, "sh", "-ec", script, "sh", image, folder, *QCOWFS, env=STRICT)
    assert (result.returncode, result.stdout) == (0, f"{MIB}\nexit code 2\n"), result.stderr


def test_an_absent_image_is_refused(tmp_path: Path) -> None:
    result = refusal(tmp_path / "absent.qcow2", tmp_path / "here")
    assert result.returncode == 1
    assert result.stderr == f"qcowfs: {tmp_path}/absent.qcow2: No such file or directory\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "999"], "argument --mode: '999' is no octal mode between 000 and 777"),
        (["--table-cache", "much"], "argument --table-cache: 'much' is no size such as 4096, 1.5G or 20GiB"),
        (["--sideways"], "unrecognized arguments: --sideways"),
        (["-o", "ro,sideways"], "unrecognized arguments: --sideways"),
        (["-o", "ro,mode=8"], "argument --mode: '8' is no octal mode between 000 and 777"),
    ],
)
def test_a_wrong_option_is_told_with_the_usage(
    options: list[Word], message: str, image: Path, tmp_path: Path
) -> None:
    result = refusal(image, tmp_path / "here", *options)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith(f": error: {message}")


@pytest.mark.parametrize("words", [[], ["--version", "mount"]], ids=["nothing", "version"])
def test_a_call_without_a_command_prints_and_mounts_nothing(words: list[str]) -> None:
    result = qcowfs(*words)
    assert result.returncode == (0 if words else 2)
    assert result.stdout.startswith("qcowfs 0" if words else "usage: qcowfs ")


def test_a_link_to_a_folder_stands_for_the_folder(image: Path, tmp_path: Path) -> None:
    folder, link = tmp_path / "here", tmp_path / "link"
    link.symlink_to(folder)
    with in_background(folder, *QCOWFS, "mount", image, link) as daemon:
        assert qcowfs("mount", image, link).returncode == 2
        assert qcowfs("umount", link).returncode == 0
        assert not is_mounted(folder)
        daemon.wait()
