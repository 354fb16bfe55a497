"""The systemd unit: sound, hardened as far as a mount can be, and the daemon works within its limits."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.confine import allowed_calls, settings
from tests.e2e.mounts import is_mounted, mount_points
from tests.e2e.tools import MIB, TIMEOUT, as_raw, assert_same, attempt, create, qemu_io, run

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd" / "qcowfs@.service"
INSTALLED = "/usr/local/bin/qcowfs"
SCRIPT = str(Path(sys.executable).parent / "qcowfs")
EXPOSURE = 4.0
"""Systemd 252 rates the unit at 4.0; one without any hardening has 9.6."""

MAKES_A_MOUNT_NAMESPACE = (
    "BindPaths BindReadOnlyPaths DynamicUser ExecPaths ExtensionImages InaccessiblePaths MountAPIVFS"
    " MountFlags MountImages NoExecPaths PrivateDevices PrivateIPC PrivateMounts PrivateTmp PrivateUsers"
    " ProcSubset ProtectControlGroups ProtectHome ProtectKernelLogs ProtectKernelModules"
    " ProtectKernelTunables ProtectProc ProtectSystem ReadOnlyPaths ReadWritePaths RootDirectory RootImage"
    " TemporaryFileSystem"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "image.qcow2", MIB)
    qemu_io(image, "write -q -P 7 100000 300000")
    return image


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with the path of the command under test."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(INSTALLED, SCRIPT))
    return copy


def exec_start(image: Path, folder: Path, options: str = "") -> list[str]:
    """The words of ExecStart with the settings of an instance."""
    (line,) = settings(UNIT)["ExecStart"]
    values = {"$OPTIONS": shlex.split(options), "${IMAGE}": [str(image)], "${DIR}": [str(folder)]}
    words = [part for word in line.split() for part in values.get(word, [word])]
    assert words[0] == INSTALLED
    return [SCRIPT, *words[1:]]


def confined(*command: str) -> list[str]:
    """The command under the unit's capabilities, no_new_privs, memory rule and system call filter."""
    (names,) = settings(UNIT)["CapabilityBoundingSet"]
    bounds = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names.split())])
    assert settings(UNIT)["NoNewPrivileges"] == ["yes"]
    return [
        "setpriv", f"--bounding-set={bounds}", "--no-new-privs", "--",
        sys.executable, "-m", "tests.e2e.confine", str(UNIT), *command,
    ]  # fmt: skip


@contextmanager
def notified(command: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """Run a service as systemd does, with a socket for its notifications."""
    address = folder.parent / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind(str(address))
        notifications.settimeout(TIMEOUT)
        environment = os.environ | {"NOTIFY_SOCKET": str(address)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, text=True)
        try:
            yield process, notifications
        finally:
            process.kill()
            process.wait()
            if is_mounted(folder):
                attempt("umount", "-l", folder)


@contextmanager
def writing(image: Path) -> Iterator[subprocess.Popen[str]]:
    """A program of QEMU's that has the image open to write, and does nothing."""
    command = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("read 0 1\n")
        process.stdin.flush()
        process.stdout.readline()  # it answers once the image is open
        yield process
        process.stdin.close()


def next_state(notifications: socket.socket) -> dict[str, str]:
    lines = notifications.recv(4096).decode().splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_systemd_has_no_complaint_about_the_unit(unit: Path) -> None:
    result = attempt("systemd-analyze", "verify", unit)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_systemd_rates_the_unit_as_little_exposed(unit: Path) -> None:
    words = ("--offline=true", f"--threshold={EXPOSURE * 10:.0f}", "--no-pager")
    result = attempt("systemd-analyze", "security", *words, unit)
    assert result.returncode == 0, result.stdout


def test_nothing_in_the_unit_hides_the_mount_from_the_host() -> None:
    assert not set(settings(UNIT)) & set(MAKES_A_MOUNT_NAMESPACE.split())


def test_the_filter_lets_nothing_through_that_only_other_services_need() -> None:
    allowed = allowed_calls(settings(UNIT)["SystemCallFilter"])
    assert {"mount", "umount2", "preadv2", "execve"} <= allowed
    assert not {"ptrace", "init_module", "bpf", "chown", "reboot", "fsopen", "pivot_root"} & allowed


def test_the_daemon_serves_within_the_units_limits(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    with notified(confined(*exec_start(image, folder, "--mode 444")), folder) as (process, notifications):
        ready = next_state(notifications)
        assert ready == {
            "READY": "1",
            "STATUS": f"{image} is mounted on {folder}",
            "MAINPID": str(process.pid),
        }
        assert mount_points(folder) == [folder]
        assert (folder / "disk.raw").stat().st_mode & 0o777 == 0o444
        assert_same(folder / "disk.raw", as_raw(image, tmp_path / "raw"))
        process.send_signal(signal.SIGTERM)
        assert next_state(notifications) == {"STOPPING": "1"}
        assert process.wait(TIMEOUT) == 0
        assert not is_mounted(folder)
        qemu_io(image, "write -q -P 8 0 1k")


def test_the_daemon_ends_within_the_units_limits_when_a_user_unmounts(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    with notified(confined(*exec_start(image, folder)), folder) as (process, notifications):
        assert next_state(notifications)["READY"] == "1"
        run("umount", folder)
        assert process.wait(TIMEOUT) == 0


def test_a_conflict_is_named_within_the_units_limits(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    with writing(image) as writer:
        result = attempt(*confined(*exec_start(image, folder)), cwd=ROOT)
    assert result.returncode == 5
    assert result.stderr == (
        f"qcowfs: {image}: in use: pid {writer.pid} (qemu-io) has it open for 'write'; "
        "stop it first, or read beside it with --force-share\n"
    )
