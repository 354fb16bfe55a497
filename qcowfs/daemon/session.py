"""The life of a mount: open the image, mount, serve until unmounted, free everything.

Owns the order of these steps, signals, and the kernel's settings for the mount. Must not know requests or
the command line.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pyfuse3
import trio

from qcowfs.daemon import eager, mountpoint, shim
from qcowfs.daemon.changes import ChangingOperations
from qcowfs.daemon.control import Control, sync_pages
from qcowfs.daemon.direct import DirectOperations
from qcowfs.daemon.notify import notify_systemd
from qcowfs.daemon.operations import Ownership
from qcowfs.daemon.tree import DISK_NAME, Tree
from qcowfs.daemon.write_back import serve_under_memory_pressure, write_back_when_idle
from qcowfs.disk.image import Image, OpenOptions
from qcowfs.errors import MountError, QcowError
from qcowfs.host.syscalls import keep_freed_memory
from qcowfs.host.waiting import run_in_thread

log = logging.getLogger(__name__)

DEFAULT_READ_AHEAD = 4 << 20
MAX_BACKGROUND = 64
_MIN_TASKS = 32
_KEPT_MEMORY = 4 << 20
"""Bytes: what inflating a request of the largest size takes, several times over."""


@dataclass(frozen=True)
class MountOptions:
    """How the image is shown; `read_ahead` in bytes, raised only where the kernel permits."""

    ownership: Ownership
    allow_other: bool = False
    read_ahead: int = DEFAULT_READ_AHEAD
    open: OpenOptions = field(default_factory=OpenOptions)


async def serve(path: Path, mount_point: Path, options: MountOptions, ready: Callable[[], None]) -> None:
    """Mount the image and serve it until it is unmounted or a signal asks to end.

    `ready` is called once the mount answers and the locks are held. Raises `QcowError`.
    """
    mountpoint.check_fuse(allow_other=options.allow_other)
    mountpoint.prepare(mount_point)
    keep_freed_memory(_KEPT_MEMORY)
    if options.open.writable:
        serve_under_memory_pressure()
    image = await Image.open(path, options.open)
    try:
        options.open.keys.check_use()
        facts = {b"pid": b"%d" % os.getpid(), b"image": os.fsencode(path)}
        tree = Tree(image, b"".join(name + b"=" + value + b"\n" for name, value in facts.items()))
        await _serve_mounted(Control(image, tree, mount_point), facts, path, mount_point, options, ready)
    finally:
        with trio.CancelScope(shield=True):
            await _close(image)
        notify_systemd(STATUS=f"{image.label} is closed")


async def _close(image: Image) -> None:
    try:
        await image.aclose()
    except (QcowError, OSError) as error:
        log.error("%s: could not be written back: %s", image.label, error)  # noqa: TRY400 - one line
        raise


async def rehearse(path: Path, mount_point: Path, options: MountOptions) -> None:
    """Everything that can be checked without mounting. Raises `QcowError`."""
    mountpoint.check_fuse(allow_other=options.allow_other)
    mountpoint.prepare(mount_point)
    (await Image.open(path, options.open)).close()
    options.open.keys.check_use()


async def _serve_mounted(
    control: Control,
    facts: dict[bytes, bytes],
    path: Path,
    mount_point: Path,
    options: MountOptions,
    ready: Callable[[], None],
) -> None:
    eager.install()
    async with trio.open_nursery() as nursery:
        with ExitStack() as at_end:
            at_end.callback(nursery.cancel_scope.cancel)
            async with trio.open_nursery() as requests:  # they are answered before the session is gone
                operations = _operations(control, options.ownership, facts, requests)
                _init(operations, path, mount_point, options)
                at_end.callback(pyfuse3.close, unmount=True)
                _start_others(nursery, control.tree, mount_point, options, path, ready)
                try:
                    await pyfuse3.main(min_tasks=_MIN_TASKS)
                finally:
                    requests.cancel_scope.cancel()


def _start_others(
    nursery: trio.Nursery, tree: Tree, mount_point: Path, options: MountOptions, path: Path,
    ready: Callable[[], None],
) -> None:  # fmt: skip
    """What runs beside the requests."""
    nursery.start_soon(_end_on_signals, mount_point)
    nursery.start_soon(_come_alive, mount_point, options, path, ready)
    nursery.start_soon(_count_allocated, tree)
    if tree.disk.writer is not None:
        nursery.start_soon(write_back_when_idle, tree.disk.writer)


def _init(operations: ChangingOperations, path: Path, mount_point: Path, options: MountOptions) -> None:
    try:
        pyfuse3.init(operations, str(mount_point), _fuse_options(path, options))
    except RuntimeError as error:
        raise MountError(f"mount point {mount_point}: the kernel refused the mount ({error})") from None


def _operations(
    control: Control, ownership: Ownership, facts: dict[bytes, bytes], nursery: trio.Nursery
) -> ChangingOperations:
    if shim.session is not None:
        return DirectOperations(control, ownership, facts, nursery, shim.session)
    log.warning("without the compiled session: no fallocate, discard or SEEK_HOLE, and slower; see README")
    return ChangingOperations(control, ownership, facts)


def _fuse_options(path: Path, options: MountOptions) -> set[str]:
    chosen = {
        "default_permissions", "nosuid", "nodev", "subtype=qcowfs",
        f"fsname={_option_text(str(path))}",
    }  # fmt: skip
    if not options.open.writable:
        chosen.add("ro")
    if options.allow_other:
        chosen.add("allow_other")
    return chosen


def _option_text(text: str) -> str:
    r"""A path as the value of a mount option: `,` and `\` are escaped, other bytes become ?."""
    plain = text.encode("ascii", "replace").decode()
    return plain.replace("\\", "\\\\").replace(",", "\\,")


async def _end_on_signals(mount_point: Path) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("ending on %s", signal.Signals(number).name)
            notify_systemd(STOPPING="1")
            try:
                await run_in_thread(sync_pages, mount_point / os.fsdecode(DISK_NAME))
            except OSError as error:
                log.error("%s: cannot write back cached pages: %s", mount_point, error)  # noqa: TRY400
            pyfuse3.terminate()


async def _come_alive(
    mount_point: Path, options: MountOptions, path: Path, ready: Callable[[], None]
) -> None:
    """Wait until the mount answers, tune it, then tell everyone."""
    device = await run_in_thread(_device_of, mount_point)
    await run_in_thread(_tune, device, options.read_ahead)
    ready()
    notify_systemd(READY="1", STATUS=f"{path} is mounted on {mount_point}", MAINPID=str(os.getpid()))


def _device_of(mount_point: Path) -> int:
    return (mount_point / os.fsdecode(DISK_NAME)).stat().st_dev


def _tune(device: int, read_ahead: int) -> None:
    """Raise read-ahead and the number of requests under way; only root may."""
    major, minor = os.major(device), os.minor(device)
    settings = {
        Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb"): read_ahead >> 10,
        Path(f"/sys/fs/fuse/connections/{minor}/max_background"): MAX_BACKGROUND,
        Path(f"/sys/fs/fuse/connections/{minor}/congestion_threshold"): MAX_BACKGROUND * 3 // 4,
    }
    for file, value in settings.items():
        try:
            file.write_text(str(value))
        except OSError as error:
            log.debug("%s stays as it is: %s", file, error.strerror)


async def _count_allocated(tree: Tree) -> None:
    """Count what large disks allocate in the background; until then they show as full."""
    for node in tree.files():
        if node.view.counts_quickly:
            continue
        try:
            await node.count_allocated()
        except (QcowError, OSError) as error:
            log.warning("%s: cannot count allocated clusters: %s", node.view.label, error)
