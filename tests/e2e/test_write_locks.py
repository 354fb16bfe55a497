"""A writable mount is a writer to QEMU's locks: nobody else has the image, readers share what is below."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.mounts import mounted, refusal
from tests.e2e.test_locks import READER, WRITER, held
from tests.e2e.tools import MIB, attempt, create, qemu_io, raw_file, run

HOW = "stop it first, or read beside it with --force-share\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_io(image, "write -q -P 3 0 64k")
    return image


def program(pid: int) -> str:
    return (Path("/proc") / str(pid) / "comm").read_text().strip()


@pytest.mark.parametrize(
    ("command", "does"),
    [(WRITER, "has it open for 'write'"), (READER, "denies others 'write'")],
    ids=["a writer", "a reader"],
)
def test_a_running_qemu_excludes_a_writable_mount(
    command: tuple[str, ...], does: str, image: Path, tmp_path: Path
) -> None:
    with held(image, *command) as other:
        result = refusal(image, tmp_path / "here", writable=True)
        message = f"qcowfs: {image}: in use: pid {other.pid} (qemu-io) {does}; {HOW}"
        assert (result.returncode, result.stderr) == (5, message)
    with mounted(image, writable=True) as mount:
        assert mount.disk.read_bytes()[:2] == b"\3\3"


def test_a_writable_mount_excludes_every_other_qemu(image: Path) -> None:
    with mounted(image, writable=True) as mount:
        writer = attempt(*WRITER, "-c", "write 0 1k", image)
        assert (writer.returncode, 'Failed to get "write" lock' in writer.stderr) == (1, True)
        reader = attempt(*READER, "-c", "read 0 1k", image)
        assert (reader.returncode, 'Failed to get shared "write" lock' in reader.stderr) == (1, True)
        mount.unmount()
    run(*WRITER, "-c", "write 0 1k", image)


def test_an_image_is_mounted_for_writing_only_once(image: Path, tmp_path: Path) -> None:
    with mounted(image, writable=True) as mount:
        result = refusal(image, tmp_path / "here", writable=True)
        pid = mount.process.pid
        message = f"qcowfs: {image}: in use: pid {pid} ({program(pid)}) has it open for 'write'; {HOW}"
        assert (result.returncode, result.stderr) == (5, message)


def test_a_read_only_mount_beside_a_writable_one_is_refused(image: Path, tmp_path: Path) -> None:
    with mounted(image, writable=True) as mount:
        result = refusal(image, tmp_path / "here")
        pid = mount.process.pid
        message = f"qcowfs: {image}: in use: pid {pid} ({program(pid)}) has it open for 'write'; {HOW}"
        assert (result.returncode, result.stderr) == (5, message)


def test_a_writable_mount_beside_a_read_only_one_is_refused(image: Path, tmp_path: Path) -> None:
    with mounted(image) as mount:
        result = refusal(image, tmp_path / "here", writable=True)
        pid = mount.process.pid
        message = f"qcowfs: {image}: in use: pid {pid} ({program(pid)}) denies others 'write'; {HOW}"
        assert (result.returncode, result.stderr) == (5, message)


def test_force_share_reads_beside_a_writable_mount_and_is_read_only(image: Path) -> None:
    with mounted(image, writable=True), mounted(image, "--force-share", writable=True) as other:
        assert other.disk.read_bytes()[:2] == b"\3\3"
        with pytest.raises(OSError, match="Read-only file system"):
            other.disk.open("r+b")


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_what_lies_below_a_writable_mount_can_be_read_but_not_written(kind: str, tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.raw", MIB, "base")
    if kind == "qcow2":
        base = create(tmp_path / "base.qcow2", MIB)
    overlay = create(tmp_path / "overlay.qcow2", MIB, "-b", base, "-F", kind)
    write = ("qemu-io", "-f", kind, "-c", "write 0 1k", base)
    with mounted(overlay, writable=True) as mount:
        result = attempt(*write)
        assert (result.returncode, 'Failed to get "write" lock' in result.stderr) == (1, True)
        run("qemu-io", "-r", "-f", kind, "-c", "read 0 1k", base)
        if kind == "qcow2":
            with mounted(base) as below:
                assert below.disk.read_bytes() == mount.disk.read_bytes()
    run(*write)


def test_the_data_file_of_a_writable_mount_is_held_as_by_a_writer(tmp_path: Path) -> None:
    data = tmp_path / "data"
    image = create(tmp_path / "image.qcow2", MIB, data_file=data, data_file_raw="on")
    overlay = create(tmp_path / "overlay.qcow2", MIB, "-b", data, "-F", "raw")
    with mounted(image, "--data-file", data, writable=True) as mount:
        result = refusal(overlay, tmp_path / "here")
        pid = mount.process.pid
        message = f"qcowfs: {data}: in use: pid {pid} ({program(pid)}) has it open for 'write'; {HOW}"
        assert (result.returncode, result.stderr) == (5, message)
    with mounted(overlay) as mount:
        assert not any(mount.disk.read_bytes())
