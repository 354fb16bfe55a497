"""Changes that may run beside each other, and now and then one that must run alone.

Owns who waits for whom. Must not know what changes. Whoever wants to be alone keeps new ones out and waits
until those under way have ended.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Gate:
    """Lets many pass at a time, or one alone."""

    def __init__(self) -> None:
        """Start open."""
        self._passing = 0
        self._alone = trio.Lock()
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def is_open(self) -> bool:
        """Whether one may pass without waiting."""
        return not self._alone.locked()

    async def enter(self) -> None:
        """Pass beside others, once nobody is or wants to be alone; `leave` has to follow."""
        while self._alone.locked():
            await self._changed.park()
        self._passing += 1

    def leave(self) -> None:
        """End what `enter` began."""
        self._passing -= 1
        if not self._passing and self._alone.locked():
            self._changed.unpark_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Pass while nobody else does."""
        async with self._alone:
            try:
                while self._passing:
                    await self._changed.park()
                yield
            finally:
                self._changed.unpark_all()
