"""What a check finds: findings that name guest offset, host offset and table entry, and a bounded report.

Owns how findings are counted and worded. Must not know how anything is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

MOST_LISTED = 1000
"""Findings of one kind that a report lists one by one; the others are only counted."""


class Kind(Enum):
    """With what a finding ends: `LOST` guest data, an `ERROR` that may come to that, a `LEAK` of space."""

    ERROR = "error"
    LOST = "lost"
    LEAK = "leak"


class Cure(Enum):
    """What mends a table entry; `DROP` gives up what is lost, the others lose nothing.

    Refcounts can be had from the references, so what they lie on is never given up for them.
    """

    CLEAR_RESERVED = "clear the reserved bits of"
    CLEAR_COPIED = "clear the COPIED flag of"
    SET_COPIED = "set the COPIED flag of"
    CLEAR_BITMAP = "clear the needless subcluster bitmap of"
    PLAIN_ZERO = "take the impossible cluster from, which reads as zeros as before,"
    CLIP = "shorten the stored length of"
    MOVE_COUNTS = "put the refcounts away from what is named by"
    DROP = "give up"


@dataclass(frozen=True)
class Finding:
    """One broken rule; offsets in bytes, None where they do not apply.

    `owner` is the disk or table that it belongs to, `place` the host offset of the table entry and `entry`
    what that holds. `count` is the number of clusters or entries in a row that the finding stands for.
    `whole` names what must be given up as a whole to mend it, if there is such a thing.
    """

    kind: Kind
    rule: str
    owner: str = ""
    guest: int | None = None
    host: int | None = None
    place: int | None = None
    entry: int | None = None
    count: int = 1
    whole: str = ""

    @property
    def text(self) -> str:
        """One line without the kind."""
        parts = [self.owner] if self.owner else []
        if self.guest is not None:
            parts.append(f"guest offset {self.guest:#x}")
        if self.host is not None:
            parts.append(f"host offset {self.host:#x}")
        if self.place is not None:
            value = "" if self.entry is None else f" ({self.entry:#x})"
            parts.append(f"entry at {self.place:#x}{value}")
        more = f", and the next {self.count - 1} clusters" if self.count > 1 else ""
        return f"{', '.join(parts)}{more}: {self.rule}" if parts else self.rule


@dataclass
class Allocation:
    """How the live disk's clusters lie, counted as qemu-img does."""

    total: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


@dataclass
class Report:
    """The findings of a check, at most `MOST_LISTED` of each kind, and the exact number of each kind.

    `cures` counts the table entries that each cure would mend. `hidden` tells that a table could not be
    read, so that clusters which look like leaks may be in use.
    """

    findings: list[Finding] = field(default_factory=list)
    totals: Counter[Kind] = field(default_factory=Counter)
    cures: Counter[Cure] = field(default_factory=Counter)
    hidden: bool = False
    allocation: Allocation = field(default_factory=Allocation)
    image_end: int = 0
    _listed: Counter[Kind] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        """Note a finding."""
        self.add_many(finding.kind, [finding], finding.count)

    def add_many(self, kind: Kind, some: Iterable[Finding], total: int) -> None:
        """Note `total` findings of one kind; as many of them as are given and fit are listed."""
        self.totals[kind] += total
        for finding in some:
            if self._listed[kind] == MOST_LISTED:
                break
            self._listed[kind] += 1
            self.findings.append(finding)

    def room(self, kind: Kind) -> int:
        """How many more findings of a kind would be listed."""
        return MOST_LISTED - self._listed[kind]

    @property
    def errors(self) -> list[str]:
        """A line for each listed finding that is more than a leak."""
        return [f.text for f in self.findings if f.kind is not Kind.LEAK]

    @property
    def leaks(self) -> list[str]:
        """A line for each listed leak."""
        return [f.text for f in self.findings if f.kind is Kind.LEAK]

    @property
    def corruptions(self) -> int:
        """How many errors and losses there are."""
        return self.totals[Kind.ERROR] + self.totals[Kind.LOST]

    @property
    def is_clean(self) -> bool:
        """Neither errors nor leaks."""
        return not self.totals.total()
