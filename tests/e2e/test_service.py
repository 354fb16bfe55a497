"""Running as a service: telling systemd, log levels for the journal, the log file."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import in_background, is_mounted, mounted, refusal
from tests.e2e.tools import MIB, QCOWFS, create, host_offset, l2_entry_at, poke_word, qemu_io


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket such as systemd listens on for a service's messages."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        yield listener


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_io(image, "write -q -P 1 0 1M")
    return image


def received(listener: socket.socket) -> dict[str, str]:
    lines = listener.recv(4096).decode().splitlines()
    return dict(line.split("=", 1) for line in lines)


def break_entry(image: Path, guest: int) -> str:
    """Make the entry of a guest cluster unaligned; returns the log's text for it."""
    place, host = l2_entry_at(image, guest), host_offset(image, guest) + 512
    poke_word(image, place, host)
    return (
        f"{image}: guest offset {guest:#x}, host offset {place:#x}: "
        f"L2 entry: cluster offset {host:#x} is not cluster aligned; reads fail"
    )


def test_systemd_hears_of_a_mount_once_it_is_live_and_again_at_its_end(
    image: Path, systemd: socket.socket
) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": systemd.getsockname()}
    with mounted(image, env=environment) as mount:
        message = received(systemd)
        assert mount.disk.read_bytes()[:3] == b"\1\1\1"
        assert message == {
            "READY": "1",
            "STATUS": f"{image} is mounted on {mount.folder}",
            "MAINPID": str(mount.process.pid),
        }
        mount.process.terminate()
        assert received(systemd) == {"STOPPING": "1"}
        assert mount.wait() == 0
    assert received(systemd) == {"STATUS": f"{image} is closed"}


def test_systemd_is_told_the_process_of_a_daemon_in_the_background(
    image: Path, systemd: socket.socket, tmp_path: Path
) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": systemd.getsockname()}
    folder = tmp_path / "here"
    folder.mkdir()
    with in_background(folder, *QCOWFS, "mount", image, folder, env=environment) as daemon:
        assert received(systemd)["MAINPID"] == str(daemon.pid)
        assert is_mounted(folder)


def test_an_abstract_socket_of_systemd_works_too(image: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0qcowfs-test-{os.getpid()}")
        listener.settimeout(20)
        environment = {**os.environ, "NOTIFY_SOCKET": f"@qcowfs-test-{os.getpid()}"}
        with mounted(image, env=environment):
            assert received(listener)["READY"] == "1"


def test_systemd_never_hears_that_a_refused_mount_is_ready(
    tmp_path: Path, systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    broken = create(tmp_path / "broken.qcow2", MIB)
    poke_word(broken, 40, 12345)
    assert refusal(broken, tmp_path / "here", "--foreground").returncode == 4
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)


@pytest.mark.parametrize("journal", [False, True], ids=["terminal", "journal"])
def test_log_lines_for_the_journal_start_with_their_level(journal: bool, image: Path) -> None:
    text = break_entry(image, 0x10000)
    environment = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    with mounted(image, env=environment | ({"JOURNAL_STREAM": "8:1"} if journal else {})) as mount:
        with pytest.raises(OSError, match="Input/output error"):
            mount.disk.read_bytes()
        mount.process.terminate()
        assert mount.wait() == 0
        assert mount.take_complaints() == [f"ERROR {text}"]
    error, info = ("<3>", "<6>") if journal else ("qcowfs: ", "qcowfs: ")
    assert mount.errors.read_text() == f"{error}{text}\n{info}ending on SIGTERM\n"


def test_a_daemon_in_the_background_appends_damage_to_the_log_file(image: Path, tmp_path: Path) -> None:
    texts = [break_entry(image, guest) for guest in (0, 0xF0000)]
    folder, log = tmp_path / "here", tmp_path / "log"
    log.write_text("a line from before\n")
    folder.mkdir()
    with in_background(folder, *QCOWFS, "mount", image, folder, "--log-file", log) as daemon:
        fd = os.open(daemon.disk, os.O_RDONLY | os.O_DIRECT)
        for offset in (0, 100, 0xF0000, 0):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(fd, 10, offset)
        os.close(fd)
    first, *lines = log.read_text().splitlines()
    assert first == "a line from before"
    assert [line.split(" ", 2)[2] for line in lines] == [f"ERROR {text}" for text in texts]


def test_an_image_whose_name_is_no_text_is_logged_and_told_of_too(
    image: Path, systemd: socket.socket, tmp_path: Path
) -> None:
    break_entry(image, 0x10000)
    odd = image.rename(tmp_path / os.fsdecode(b"\xff\xfe"))
    environment = {**os.environ, "NOTIFY_SOCKET": systemd.getsockname()}
    with mounted(odd, env=environment) as mount:
        assert received(systemd)["READY"] == "1"
        with pytest.raises(OSError, match="Input/output error"):
            mount.disk.read_bytes()
        (line,) = mount.take_complaints()
        assert ": guest offset 0x10000, host offset " in line
    assert "Traceback" not in mount.errors.read_text()


def test_debug_logs_more(image: Path) -> None:
    with mounted(image, "--debug") as mount:
        mount.disk.read_bytes()
    assert " DEBUG " in mount.log_file.read_text()
