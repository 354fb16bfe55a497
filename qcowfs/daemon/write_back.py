"""What a daemon that others write through owes the host: timely write-back, and no deadlock for memory.

Owns when metadata is written back without being asked. Must not know the order in which that happens.
"""

from __future__ import annotations

import logging
import os

import trio

from qcowfs.disk.live import DiskWriter
from qcowfs.host.syscalls import set_io_flusher

log = logging.getLogger(__name__)

CHECK_EVERY = 1.0
LONGEST_DIRTY = 30.0


async def write_back_when_idle(writer: DiskWriter) -> None:
    """Write dirty metadata back once nothing was written for a while, or it has waited too long.

    A failure is logged once. Where the host refused a write the next try may succeed; where a sync failed
    none does, and every fsync of a user tells it again.
    """
    failing = False
    dirty_for, seen = 0.0, 0
    while True:
        await trio.sleep(CHECK_EVERY)
        idle, seen = writer.writes == seen, writer.writes
        dirty_for = dirty_for + CHECK_EVERY if writer.is_dirty else 0.0
        if not writer.is_dirty or not (idle or dirty_for >= LONGEST_DIRTY):
            continue
        try:
            await writer.flush()
            failing, dirty_for = False, 0.0
        except OSError as error:
            if not failing:
                log.error("cannot write back: %s", error)  # noqa: TRY400 - one line
            failing = True


def serve_under_memory_pressure() -> None:
    """Tell the kernel that memory is freed by this process's writes, so it must not wait for itself.

    Needs CAP_SYS_RESOURCE; without it the mount works all the same.
    """
    refusal = set_io_flusher()
    if refusal:
        log.debug("not marked as an I/O flusher: %s", os.strerror(refusal))
