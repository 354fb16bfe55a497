"""Mounts for tests: `mounted` starts a daemon, yields what it shows, and always ends it again.

A mount whose daemon logged a warning or an error that the test did not take fails the test.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from tests.e2e.tools import QCOWFS, TIMEOUT, Result, Word, attempt, qcowfs, run

FS_TYPE = b"fuse.qcowfs"
_numbers = count(1)


@dataclass
class Mount:
    """A live mount; `process` is its daemon, which runs in the foreground."""

    image: Path
    folder: Path
    log_file: Path
    errors: Path
    process: subprocess.Popen[str]
    taken: int = field(default=0)

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    @property
    def snapshots(self) -> Path:
        return self.folder / "snapshots"

    def snapshot(self, name: str) -> Path:
        return self.snapshots / f"{name}.raw"

    def take_complaints(self) -> list[str]:
        """Texts of warnings and errors since the last call; what nobody takes fails the test."""
        lines = self._complaints()
        new, self.taken = lines[self.taken :], len(lines)
        return new

    def _complaints(self) -> list[str]:
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        return [" ".join(line.split(" ")[2:]) for line in lines if not _is_harmless(line)]

    def wait(self) -> int:
        """The daemon's exit code; it must end soon."""
        return self.process.wait(TIMEOUT)

    def unmount(self) -> None:
        """Unmount with the system's own tool and wait for the daemon."""
        run("umount", self.folder)
        assert self.wait() == 0


def _is_harmless(line: str) -> bool:
    words = line.split(" ")
    return len(words) > 2 and words[2] in ("INFO", "DEBUG")


@contextmanager
def mounted(
    image: Path,
    *options: Word,
    writable: bool = False,
    at: Path | None = None,
    beside: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Mount]:
    """Mount the image for the length of the block; afterwards the daemon has ended in good order.

    The folder to mount on is `at`, by default a new one in the folder `beside`, by default the image's.
    """
    words = _with_access(options, writable=writable)
    mount = start(image, *words, beside=beside or image.parent, at=at, env=env)
    try:
        assert first_line(mount.process), mount.errors.read_text()
        yield mount
    finally:
        put_down(mount)
    assert mount.process.returncode == 0, mount.errors.read_text()
    assert mount.take_complaints() == []


def _with_access(options: tuple[Word, ...], *, writable: bool) -> tuple[Word, ...]:
    """The options for a mount; it may write only where that is asked for."""
    return options if writable else ("--read-only", *options)


def start(image: Path, *options: Word, beside: Path, at: Path | None, env: Mapping[str, str] | None) -> Mount:
    """Start a daemon in the foreground without waiting for it."""
    stem = beside / f"mount-{next(_numbers)}"
    folder = at or stem
    folder.mkdir(exist_ok=True)
    log_file, errors = stem.with_suffix(".log"), stem.with_suffix(".errors")
    words = ("mount", image, folder, "--foreground", "--log-file", log_file, *options)
    with errors.open("w") as sink:
        process = subprocess.Popen(
            [*QCOWFS, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            errors="surrogateescape",
            env=env,
        )
    return Mount(image, folder, log_file, errors, process)


def first_line(process: subprocess.Popen[str]) -> str:
    """The first line that the process prints, empty if it ends without one."""
    output: IO[str] | None = process.stdout
    assert output is not None
    return output.readline()


def put_down(mount: Mount) -> None:
    """End a mount in any state: unmount it, by force if need be, and wait for its daemon."""
    if is_mounted(mount.folder) and attempt("umount", mount.folder).returncode:
        attempt("umount", "-l", mount.folder)
    try:
        mount.process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        mount.process.kill()
        mount.process.wait()
    finally:
        if mount.process.stdout is not None:
            mount.process.stdout.close()


def mount_points(below: Path) -> list[Path]:
    """Folders under `below` where an image is mounted, the newest mount first."""
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    shown = [_unescaped(line.split(b" ")[4]) for line in lines if b" - %s " % FS_TYPE in line]
    return [folder for folder in reversed(shown) if folder.is_relative_to(below)]


def _unescaped(field: bytes) -> Path:
    r"""A path of the kernel's table of mounts, which writes a space as \040."""
    return Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)))


def is_mounted(folder: Path) -> bool:
    return folder in mount_points(folder)


def loop_devices(below: Path) -> list[str]:
    """Loop devices over files under `below`."""
    found = Path("/sys/block").glob("loop*/loop/backing_file")
    return [
        f"/dev/{f.parent.parent.name}"
        for f in found
        if f.read_bytes().startswith(b"%s/" % os.fsencode(below))
    ]


def refusal(image: Path, folder: Path, *options: Word, writable: bool = False) -> Result:
    """The result of a mount that must fail."""
    folder.mkdir(exist_ok=True)
    result = qcowfs("mount", image, folder, *_with_access(options, writable=writable))
    if result.returncode == 0:
        run("umount", folder)
    assert result.returncode != 0, f"{image} was mounted"
    assert not is_mounted(folder)
    return result


@contextmanager
def loop_mounted(disk: Path, folder: Path, *, writable: bool = False) -> Iterator[Path]:
    """The file system on a raw disk."""
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "loop,rw" if writable else "loop,ro", disk, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@dataclass
class Daemon:
    """A daemon in the background; `said` is what its command printed, `process` a pidfd."""

    folder: Path
    said: str
    pid: int
    process: int

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    def wait(self) -> None:
        """Wait for the daemon's end, which must be near."""
        assert select.select([self.process], [], [], TIMEOUT)[0], f"the daemon {self.pid} lives on"

    def has_ended(self) -> bool:
        return bool(select.select([self.process], [], [], 0)[0])


def daemon_of(folder: Path) -> int:
    """The process that serves a mount, as the file tells that no listing shows."""
    first, _, _ = (folder / ".qcowfs").read_bytes().partition(b"\n")
    return int(first.removeprefix(b"pid="))


@contextmanager
def in_background(folder: Path, *command: Word, **options: Any) -> Iterator[Daemon]:  # noqa: ANN401
    """Run a command that mounts an image on the folder and returns; the mount ends with the block."""
    folder.mkdir(exist_ok=True)
    said = run(*command, **options).stdout
    pid = daemon_of(folder)
    daemon = Daemon(folder, said, pid, os.pidfd_open(pid))
    try:
        yield daemon
    finally:
        if is_mounted(folder) and attempt("umount", folder).returncode:
            attempt("umount", "-l", folder)
        ended = select.select([daemon.process], [], [], TIMEOUT)[0]
        if not ended:
            signal.pidfd_send_signal(daemon.process, signal.SIGKILL)
        os.close(daemon.process)
    assert ended, f"the daemon {pid} lived on"


def end(pid: int, number: signal.Signals) -> None:
    """Send a process the signal that ends it, and wait until it has."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, number)
        assert select.select([process], [], [], TIMEOUT)[0], f"process {pid} lives on"
    finally:
        os.close(process)
