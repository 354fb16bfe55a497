"""Leaving the terminal: the daemon runs in a child, the command returns when the mount is live.

Owns the fork, the report from child to parent and what becomes of the standard files. Must not know what the
daemon does. Nothing here may run once threads exist.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Callable

Ready = Callable[[str], None]

_DEVICE_NULL = "/dev/null"


def run_in_background(daemon: Callable[[Ready], int]) -> int:
    """Run `daemon` in a child; return its exit code if it ends before it calls ready, else 0.

    The text given to ready is printed here. Errors of a daemon that is not ready yet go to the
    terminal by the child's own standard error.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(_run_child(daemon, writer))
    os.close(writer)
    try:
        with os.fdopen(reader, "r") as pipe:
            text = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGTERM)
        raise
    if text:
        print(text, flush=True)
        return 0
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code > 0 else 1


def _run_child(daemon: Callable[[Ready], int], writer: int) -> int:
    """Stay in the terminal's session until the mount is live: a passphrase may have to be asked for."""

    def ready(text: str) -> None:
        _leave_terminal()
        with os.fdopen(writer, "w", errors="backslashreplace") as pipe:
            pipe.write(text)

    code = daemon(ready)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _leave_terminal() -> None:
    """Give up the standard files, but keep a standard error that nobody waits to see closed."""
    os.setsid()
    os.chdir("/")
    null = os.open(_DEVICE_NULL, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    mode = os.fstat(2).st_mode
    if not (stat.S_ISREG(mode) or os.isatty(2)):
        os.dup2(null, 2)
    os.close(null)
