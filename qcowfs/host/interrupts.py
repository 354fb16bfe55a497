"""Interrupts (Ctrl-C) of a command that blocks: noted when they come, raised where it can be stopped.

Owns the handler of SIGINT meanwhile. An exception in the middle of anything would leave locks behind.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
_noted = False


@contextmanager
def interrupts_noted() -> Iterator[None]:
    """Note interrupts that Python would raise at once; not outside the main thread, which gets them."""
    with _handled(_note, instead_of=signal.default_int_handler) as ours:
        if ours:
            _set_noted(yes=False)
        yield


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Let an interrupt end a wait for somebody who may never come, as if nobody noted it."""
    with _handled(signal.default_int_handler, instead_of=_note) as ours:
        if ours:
            raise_interrupt()
        yield


@contextmanager
def _handled(handler: Handler, *, instead_of: Handler) -> Iterator[bool]:
    """Handle interrupts that way, if the other is how they are handled now; whether that is so."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not instead_of:
        yield False
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield True
    finally:
        signal.signal(signal.SIGINT, instead_of)


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
