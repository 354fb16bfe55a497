"""How far a check or a repair is: passes over all L2 tables, told in bytes done and bytes there are to do.

Owns the arithmetic. Must not know what a pass does or who listens. Each pass counts as much as the first one,
so that the sum is known from the beginning; passes that turn out needless are skipped at the end.
"""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[int, int], None]
"""Called with the bytes done and all bytes there are to do."""


class Passes:
    """At most `most` passes, told to `tell` if anybody listens."""

    def __init__(self, tell: Tell | None = None, most: int = 1) -> None:
        """Nothing is done yet."""
        self._tell = tell
        self._most = most
        self._begun = 0
        self._unit = 0
        self._size = 1
        self._done = 0

    def begin(self, size: int) -> None:
        """Begin a pass over tables of `size` bytes in all."""
        self._unit = self._unit or max(1, size)
        self._size, self._done = max(1, size), 0
        self._begun += 1

    def advance(self, size: int) -> None:
        """Note that so much more of the pass is done."""
        self._done += size
        self.glance(0)

    def glance(self, size: int) -> None:
        """Tell that of what is to be advanced over next, so much is done."""
        if self._tell is not None:
            within = min(self._unit, self._unit * (self._done + size) // self._size)
            total = self._unit * self._most
            self._tell(min(total, self._unit * (self._begun - 1) + within), total)

    def end(self) -> None:
        """Tell that nothing is left to do."""
        if self._tell is not None:
            total = max(1, self._unit) * self._most
            self._tell(total, total)
