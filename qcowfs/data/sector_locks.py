"""Ranges of a data file that are read or written whole, or not at all.

Owns who waits for whom: readers of the same bytes go together, a writer goes alone. Must not know what the
bytes are. The host lets a read see half of a write; half of an encrypted sector is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qcowfs.host.waiting import Event, new_event

Range = tuple[int, int]
"""Where bytes start and end."""


@dataclass(eq=False)
class Use:
    """Ranges that somebody uses or waits for."""

    ranges: Sequence[Range]
    shared: bool
    over: Event = field(default_factory=new_event)

    def excludes(self, ranges: Sequence[Range], *, shared: bool) -> bool:
        """Whether another use of these ranges has to wait for the end of this one."""
        if shared and self.shared:
            return False
        return any(start < e and s < end for start, end in ranges for s, e in self.ranges)


class SectorLocks:
    """Uses in the order in which they were asked for; each waits for earlier ones that exclude it."""

    def __init__(self) -> None:
        """Start with none."""
        self._uses: list[Use] = []

    def is_free(self, start: int, end: int, *, shared: bool) -> bool:
        """Whether bytes could be used at once, by the caller who then does not wait before it is over."""
        return not self._uses or not any(use.excludes([(start, end)], shared=shared) for use in self._uses)

    async def hold(self, ranges: Sequence[Range], *, shared: bool) -> Use:
        """Hold all of the ranges, after everybody who came before and is in the way.

        Nobody may ask for more while holding some: waiting only for those who came before, nobody waits in
        a circle.
        """
        use = Use(ranges, shared)
        earlier = [other for other in self._uses if other.excludes(ranges, shared=shared)]
        self._uses.append(use)
        try:
            for other in earlier:
                await other.over.wait()
        except BaseException:
            self.release(use)
            raise
        return use

    def release(self, use: Use) -> None:
        """Let go of what was held together."""
        self._uses.remove(use)
        use.over.set()
