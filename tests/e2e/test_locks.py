"""QEMU's locks: readers share an image, writers and mounts exclude each other, also for backing files."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.mounts import end, mounted, refusal
from tests.e2e.tools import MIB, Word, as_raw, assert_same, attempt, create, qemu_img, qemu_io, raw_file, run

WRITER, READER = ("qemu-io", "-f", "qcow2"), ("qemu-io", "-f", "qcow2", "-r")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_io(image, "write -q -P 3 0 64k")
    return image


@contextmanager
def held(image: Path, *command: Word) -> Iterator[subprocess.Popen[str]]:
    """A qemu-io that has the image open."""
    words = [str(word) for word in (*command, image)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        tell(process, "read 0 512")
        yield process
    finally:
        process.communicate("quit\n", timeout=60)


def tell(process: subprocess.Popen[str], command: str) -> None:
    """Give qemu-io a command, and wait for what it says of it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{command}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert "bytes at offset" in line, line
    process.stdout.readline()  # the speed


def test_readers_and_mounts_share_an_image(image: Path, tmp_path: Path) -> None:
    with held(image, *READER), mounted(image) as mount:
        assert qemu_img("convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "raw") == ""
        assert_same(mount.disk, tmp_path / "raw")
        assert qemu_img("info", image).startswith("image: ")
        assert qemu_img("snapshot", "-l", image) == ""


def test_a_mount_beside_a_writer_is_refused_with_the_name_of_the_writer(image: Path, tmp_path: Path) -> None:
    with held(image, *WRITER) as writer:
        result = refusal(image, tmp_path / "here")
        assert result.returncode == 5
        assert result.stderr == (
            f"qcowfs: {image}: in use: pid {writer.pid} (qemu-io) has it open for 'write'; "
            "stop it first, or read beside it with --force-share\n"
        )
    with mounted(image) as mount:
        assert mount.disk.read_bytes()[:2] == b"\3\3"


def test_a_writer_whose_name_is_cut_within_a_letter_is_named_all_the_same(
    image: Path, tmp_path: Path
) -> None:
    """The kernel keeps 15 bytes of a program's name."""
    program = shutil.which("qemu-io")
    assert program is not None
    copy = tmp_path / "fourteen-bytesé"
    shutil.copy(program, copy)
    with held(image, copy, "-f", "qcow2") as writer:
        result = refusal(image, tmp_path / "here")
    assert result.returncode == 5
    assert f"{image}: in use: pid {writer.pid} (fourteen-bytes" in result.stderr


def test_a_storage_daemon_that_writes_is_named_too(image: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    nodes = [f"driver=file,node-name=f,filename={image}", "driver=qcow2,node-name=q,file=f"]
    socket = f"addr.type=unix,addr.path={tmp_path}/nbd"
    export = "type=nbd,id=e,node-name=q,writable=on"
    words = [word for node in nodes for word in ("--blockdev", node)]
    words += ["--nbd-server", socket, "--export", export, "--pidfile", str(pid_file), "--daemonize"]
    run("qemu-storage-daemon", *words)
    pid = pid_file.read_text().strip()
    try:
        result = refusal(image, tmp_path / "here")
    finally:
        end(int(pid), signal.SIGTERM)
    assert result.returncode == 5
    assert f"{image}: in use: pid {pid} (qemu-storage-d" in result.stderr


def test_force_share_reads_beside_a_writer(image: Path) -> None:
    with held(image, *WRITER) as writer, mounted(image, "--force-share") as mount:
        assert mount.disk.read_bytes()[:2] == b"\3\3"
        tell(writer, "write -P 9 0 64k")
        with pytest.raises(AssertionError, match="Failed to get shared"):
            qemu_img("info", image)


def test_a_mount_that_shares_does_not_stop_a_writer(image: Path) -> None:
    with mounted(image, "-U") as mount:
        qemu_io(image, "write -q 64k 64k")
        assert mount.disk.stat().st_size == MIB


@pytest.mark.parametrize(
    "command",
    [
        ["qemu-io", "-c", "write 0 1k"],
        ["qemu-img", "snapshot", "-c", "name"],
        ["qemu-img", "resize", "-q", "{image}", "2M"],
        ["qemu-img", "check", "-r", "all"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_no_writer_gets_a_mounted_image(command: list[str], image: Path) -> None:
    words = [word.format(image=image) for word in command]
    target = [] if str(image) in words else [image]
    with mounted(image) as mount:
        before = image.read_bytes()
        result = attempt(*words, *target)
        assert result.returncode != 0
        assert 'Failed to get "write" lock' in result.stderr + result.stdout
        assert image.read_bytes() == before
        mount.unmount()
    run(*words, *target)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_no_writer_gets_a_backing_file_of_a_mounted_image(kind: str, tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.raw", MIB, "base")
    if kind == "qcow2":
        base = create(tmp_path / "base.qcow2", MIB)
    overlay = create(tmp_path / "overlay.qcow2", MIB, "-b", base, "-F", kind)
    command = ("qemu-io", "-f", kind, "-c", "write 0 1k", base)
    with mounted(overlay):
        result = attempt(*command)
        assert (result.returncode, 'Failed to get "write" lock' in result.stderr) == (1, True)
    run(*command)


def test_no_writer_gets_the_data_file_of_a_mounted_image(tmp_path: Path) -> None:
    data = tmp_path / "data"
    image = create(tmp_path / "image.qcow2", MIB, data_file=data, data_file_raw="on")
    command = ("qemu-io", "-f", "raw", "-c", "write 0 1k", data)
    with mounted(image, "--data-file", data):
        result = attempt(*command)
        assert (result.returncode, 'Failed to get "write" lock' in result.stderr) == (1, True)
    run(*command)


def test_a_mount_over_a_backing_file_that_is_written_is_refused(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    overlay = create(tmp_path / "overlay.qcow2", MIB, "-b", base, "-F", "qcow2")
    with held(base, *WRITER) as writer:
        result = refusal(overlay, tmp_path / "here")
        assert result.returncode == 5
        assert result.stderr == (
            f"qcowfs: {base}: in use: pid {writer.pid} (qemu-io) has it open for 'write'; "
            "stop it first, or read beside it with --force-share\n"
        )
    with mounted(overlay) as mount:
        assert not any(mount.disk.read_bytes())


def test_a_backing_file_may_be_shared_by_mounts_of_several_overlays(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.raw", MIB, "base")
    first = create(tmp_path / "first.qcow2", MIB, "-b", base, "-F", "raw")
    second = tmp_path / "second.qcow2"
    shutil.copy(first, second)
    with mounted(first) as one, mounted(second) as other:
        assert_same(one.disk, as_raw(second, tmp_path / "raw"))
        assert_same(other.disk, base)
        qemu_img("info", "--backing-chain", first)
