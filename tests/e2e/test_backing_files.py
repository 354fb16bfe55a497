"""What lies below an image: found, refused or missing, told with the name of the image that wants it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import mounted, refusal
from tests.e2e.tools import (
    MIB,
    as_raw,
    assert_same,
    create,
    peek,
    poke,
    qcowfs,
    qemu_img,
    qemu_io,
    raw_file,
    run,
)

BACKING_FORMAT = bytes.fromhex("e2792aca")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return raw_file(tmp_path / "base.raw", MIB, "base")


def overlay_of(name: str, folder: Path, kind: str = "raw") -> Path:
    """An image that names its backing file so, whether there is such a file or not."""
    image = create(folder / "overlay.qcow2", MIB, "-u", "-b", "P" * len(os.fsencode(name)), "-F", "qcow2")
    place = int.from_bytes(peek(image, 8, 8), "big")
    poke(image, place, os.fsencode(name))
    extension = image.read_bytes().index(BACKING_FORMAT)
    poke(image, extension + 4, len(kind).to_bytes(4, "big") + kind.encode().ljust(8, b"\0"))
    return image


def undeclare(image: Path) -> None:
    """Turn the extension that declares the backing format into one that nobody knows."""
    poke(image, image.read_bytes().index(BACKING_FORMAT), b"\x12\x34\x56\x78")


def assert_refused(image: Path, message: str, *options: str, code: int = 6) -> None:
    result = refusal(image, image.parent / "here", *options)
    assert (result.returncode, result.stderr) == (code, f"qcowfs: {message}\n")


@pytest.mark.parametrize(
    "name", ["base.raw", "./sub/../base.raw", "file:{folder}/base.raw", "{folder}/base.raw"]
)
def test_names_of_files_are_followed_from_the_images_folder(name: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    image = overlay_of(name.format(folder=tmp_path), tmp_path)
    qemu_io(image, "write -q -P 1 300000 100000")
    with mounted(image) as mount:
        assert_same(mount.disk, as_raw(image, tmp_path / "raw"))


def test_a_missing_backing_file_is_named_with_the_place_it_was_looked_for(tmp_path: Path) -> None:
    image = overlay_of("sub/gone.raw", tmp_path)
    assert_refused(
        image,
        f'{image}: wants the backing file "sub/gone.raw", looked for at {tmp_path}/sub/gone.raw: '
        "No such file or directory",
    )


def test_a_file_missing_further_down_is_named_with_the_image_that_wants_it(tmp_path: Path) -> None:
    middle = overlay_of("gone.raw", tmp_path).rename(tmp_path / "middle.qcow2")
    image = overlay_of(middle.name, tmp_path, "qcow2")
    assert_refused(
        image,
        f'{middle} (backing file of {image}): wants the backing file "gone.raw", looked for at '
        f"{tmp_path}/gone.raw: No such file or directory",
    )


def test_an_image_below_itself_is_a_loop(tmp_path: Path) -> None:
    image = overlay_of("overlay.qcow2", tmp_path, "qcow2")
    assert_refused(image, f"{image}: the backing file {image} is already part of the chain: a loop")


def test_a_longer_loop_is_found_too(tmp_path: Path) -> None:
    second = overlay_of("link.qcow2", tmp_path, "qcow2").rename(tmp_path / "second.qcow2")
    first = overlay_of("second.qcow2", tmp_path, "qcow2")
    (tmp_path / "link.qcow2").symlink_to(first)
    assert_refused(
        first,
        f"{second} (backing file of {first}): the backing file {tmp_path}/link.qcow2 is already part of the "
        "chain: a loop",
    )


def chain_of(depth: int, folder: Path) -> Path:
    """Images that each lie below the next; returns the topmost."""
    raw_file(folder / "000", MIB, "chain")
    image = create(folder / "001", MIB, "-u", "-b", "000", "-F", "raw")
    place = int.from_bytes(peek(image, 8, 8), "big")
    kind = image.read_bytes().index(BACKING_FORMAT)
    for number in range(2, depth + 1):
        image = folder / f"{number:03}"
        shutil.copy(folder / "001", image)
        poke(image, place, f"{number - 1:03}".encode())
        poke(image, kind + 4, (5).to_bytes(4, "big") + b"qcow2\0\0\0")
    return image


def test_a_chain_of_two_hundred_images_is_read_to_its_bottom(tmp_path: Path) -> None:
    top = chain_of(200, tmp_path)
    with mounted(top) as mount:
        assert_same(mount.disk, tmp_path / "000")


def test_a_deeper_chain_is_refused(tmp_path: Path) -> None:
    top = chain_of(202, tmp_path)
    result = refusal(top, tmp_path / "here")
    assert result.returncode == 6
    assert result.stderr.endswith(": the backing chain is deeper than 200 images\n")


@pytest.mark.parametrize(
    "name", ['json:{"driver":"raw"}', "nbd://localhost/disk", "http://localhost/x", "blkdebug::base.raw"]
)
def test_a_name_that_is_no_file_is_never_followed(name: str, tmp_path: Path) -> None:
    image = overlay_of(name, tmp_path)
    assert_refused(image, f'{image}: wants the backing file "{name}"; only names of files are followed')


@pytest.mark.parametrize(("name", "shown"), [("", ""), ("file:", "file:"), ("a\0b", "a\\x00b")])
def test_a_name_that_no_file_can_have_is_refused(name: str, shown: str, tmp_path: Path) -> None:
    image = overlay_of(name or "x", tmp_path)
    if not name:
        poke(image, 16, bytes(4))
    assert_refused(image, f'{image}: names "{shown}" as backing file, which is no file name')


def test_no_backing_refuses_every_backing_file(base: Path, tmp_path: Path) -> None:
    image = overlay_of("base.raw", tmp_path)
    message = f'{image}: wants the backing file "base.raw", which --no-backing refuses'
    assert_refused(image, message, "--no-backing")
    alone = create(tmp_path / "alone.qcow2", MIB)
    with mounted(alone, "--no-backing") as mount:
        assert mount.disk.stat().st_size == MIB


def test_an_undeclared_format_is_refused_unless_the_user_trusts_the_content(
    base: Path, tmp_path: Path
) -> None:
    image = overlay_of("base.raw", tmp_path)
    undeclare(image)
    assert_refused(
        image,
        f'{image}: does not declare the format of its backing file "base.raw"; declare it with qcowfs '
        "rebase -u -F FORMAT -b FILE, or trust the file's content with --probe-backing",
    )
    with mounted(image, "--probe-backing") as mount:
        assert_same(mount.disk, base)


def test_probing_finds_qcow2_and_names_what_it_does_not_read(base: Path, tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    image = overlay_of("lower", tmp_path)
    undeclare(image)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", base, lower)
    with mounted(image, "--probe-backing") as mount:
        assert_same(mount.disk, base)
    qemu_img("convert", "-f", "raw", "-O", "vmdk", base, lower)
    message = f"{image}: wants the backing file {lower}, which is a vmdk image"
    assert_refused(image, message, "--probe-backing")


def test_a_raw_backing_file_that_looks_like_qcow2_is_shown_as_it_is(tmp_path: Path) -> None:
    lower = create(tmp_path / "base.raw", MIB)
    image = overlay_of("base.raw", tmp_path)
    with mounted(image) as mount:
        shown = mount.disk.read_bytes()
    assert shown == lower.read_bytes().ljust(MIB, b"\0")
    assert shown == as_raw(image, tmp_path / "raw").read_bytes()


def test_a_declared_format_that_is_not_supported_is_named(base: Path, tmp_path: Path) -> None:
    image = overlay_of("base.raw", tmp_path, "vmdk")
    assert_refused(image, f'{image}: wants a backing file of format "vmdk"; qcow2 and raw are supported')


@pytest.fixture
def odd_files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """What is neither a regular file nor a block device, by kind."""
    fifo, folder, endpoint = tmp_path / "fifo", tmp_path / "folder", tmp_path / "socket"
    os.mkfifo(fifo)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(endpoint))
        yield {
            "a FIFO": fifo, "a directory": folder, "a character device": Path("/dev/zero"), "socket": endpoint
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a character device"])
def test_only_files_can_be_images_or_lie_below_one(
    kind: str, odd_files: dict[str, Path], tmp_path: Path
) -> None:
    path = odd_files[kind]
    message = f"{path}: is {kind}, neither a regular file nor a block device"
    result = refusal(path, tmp_path / "here")
    assert (result.returncode, result.stderr) == (2, f"qcowfs: {message}\n")
    image = overlay_of(str(path), tmp_path)
    assert_refused(image, f"{image}: wants a backing file that is refused: {message}")


def test_a_socket_cannot_be_an_image(odd_files: dict[str, Path], tmp_path: Path) -> None:
    path = odd_files["socket"]
    result = refusal(path, tmp_path / "here")
    assert (result.returncode, result.stderr) == (1, f"qcowfs: {path}: No such device or address\n")


def test_a_block_device_can_be_an_image_but_not_lie_below_one(base: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", base, image)
    device = run("losetup", "--find", "--show", "--read-only", image).stdout.strip()
    try:
        overlay = overlay_of(device, tmp_path, "qcow2")
        assert_refused(overlay, f"{overlay}: wants the backing file {device}, which is not a regular file")
        process = qcowfs("mount", device, tmp_path / "here")
        assert process.returncode == 0, process.stderr
        try:
            assert_same(tmp_path / "here" / "disk.raw", base)
        finally:
            assert qcowfs("umount", tmp_path / "here").returncode == 0
    finally:
        run("losetup", "-d", device)
