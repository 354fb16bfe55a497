"""Interrupts (Ctrl-C) of a command that blocks: noted when they come, raised where it can be stopped.

Owns the handler of SIGINT meanwhile. An exception in the middle of anything would leave locks behind.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted = False


@contextmanager
def interrupts_noted() -> Iterator[None]:
    """Note interrupts that Python would raise at once; not outside the main thread, which gets them."""
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    _set_noted(yes=False)
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Let an interrupt end a wait for somebody who may never come, as if nobody noted it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not _note
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        raise_interrupt()
        yield
    finally:
        signal.signal(signal.SIGINT, _note)


def _note(_number: int, _frame: FrameType | None) -> None:
    _set_noted(yes=True)


def _set_noted(*, yes: bool) -> None:
    """One assignment: a lock would be held already where one interrupt comes within another."""
    global _noted  # noqa: PLW0603 - signals belong to the process
    _noted = yes


def raise_interrupt() -> None:
    """Raise `KeyboardInterrupt`, once, if there was one. For any thread."""
    if _noted:
        _set_noted(yes=False)
        raise KeyboardInterrupt
