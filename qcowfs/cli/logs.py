"""Where the log goes: standard error, the journal by way of it, the system log, or a file.

Owns handlers and formats. Must not know what is logged.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

_SYSTEM_LOG = Path("/dev/log")
_JOURNAL_LEVELS = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}


class JournalFormatter(logging.Formatter):
    """Lines that start with `<N>`, by which the journal knows the level."""

    def format(self, record: logging.LogRecord) -> str:
        """The text with the level's prefix on its first line."""
        return f"<{_JOURNAL_LEVELS.get(record.levelno, 7)}>{super().format(record)}"


def configure_short() -> None:
    """Send warnings to standard error: what a command that ends soon has to say beside its result."""
    configure()
    logging.getLogger().setLevel(logging.WARNING)


def configure(*, debug: bool = False, log_file: Path | None = None, background: bool = False) -> None:
    """Send the package's log to where its reader will look for it."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file is not None:
        handlers.append(logging.FileHandler(log_file))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    elif background and not _stays_open(2) and _SYSTEM_LOG.exists():
        from logging.handlers import SysLogHandler  # loads sockets, which no short command needs

        handlers.append(SysLogHandler(str(_SYSTEM_LOG)))
        handlers[1].setFormatter(logging.Formatter(f"qcowfs[{os.getpid()}]: %(message)s"))
    plain = logging.Formatter("qcowfs: %(message)s")
    handlers[0].setFormatter(JournalFormatter() if "JOURNAL_STREAM" in os.environ else plain)
    root = logging.getLogger()
    root.handlers = handlers
    root.setLevel(logging.DEBUG if debug else logging.INFO)


def _stays_open(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode) or os.isatty(fd)
