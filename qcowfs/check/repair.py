"""Repairing an image: what would be done and lost is told first, then done in an order that survives crashes.

Owns the order of a repair and what it promises. Must not know how a table is mended or counted. Lost data is
never turned into zeros unless the user says so: the entries that name it stay, so that reads go on failing,
and clusters that nothing names stay counted while anything is lost, since they may hold it. While entries and
counts are repaired, a version 3 image bears the dirty bit; dirty and corrupt bit go when a second check finds
no errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qcowfs.check import mend
from qcowfs.check.arrays import load_bytes
from qcowfs.check.checker import Inspection, inspect
from qcowfs.check.findings import Cure, Kind, Report
from qcowfs.check.passes import Passes, Tell
from qcowfs.check.recount import Recount
from qcowfs.check.retable import mend_snapshots
from qcowfs.check.subject import Subject
from qcowfs.format import extensions as ext
from qcowfs.format.features import Autoclear, Incompatible
from qcowfs.format.header import Header
from qcowfs.geometry import SECTOR_SIZE
from qcowfs.host.hostfile import HostFile

INCOMPATIBLE_FIELD, AUTOCLEAR_FIELD = 72, 88
CHANGED_FIELDS, CHANGED_FIELDS_OF_V2 = (48, 104), (48, 72)
"""Fields that a repair may have changed since the header was read: they are kept as they are in the file."""
_MARKS = (Incompatible.DIRTY | Incompatible.CORRUPT).value
_MOST_PASSES = {False: 8, True: 14}
"""Walks over all tables that a repair may take, without and with inflating."""


@dataclass(frozen=True)
class Wishes:
    """What a repair may do: give back leaks; with `errors` mend all else that loses nothing.

    `drop_lost` also gives up table entries whose data cannot be had, which then reads as zeros. `data`
    takes compressed clusters that do not inflate for such.
    """

    errors: bool
    drop_lost: bool = False
    data: bool = False


def plan(found: Inspection, wishes: Wishes) -> Iterator[str]:
    """A line for each thing that the repair would do, would lose, or leaves as it is."""
    subject = found.subject
    yield from _losses(subject.report, wishes)
    yield from _changes(subject, wishes)


def _losses(report: Report, wishes: Wishes) -> Iterator[str]:
    lost = [finding for finding in report.findings if finding.kind is Kind.LOST]
    drops = wishes.errors and wishes.drop_lost
    for finding in (finding for finding in report.findings if finding.whole and drops):
        yield f"will lose for good {finding.whole}: {finding.text}"
    for finding in lost:
        if finding.whole and drops:
            continue
        if drops and finding.place is not None:
            yield f"will lose for good, and read as zeros or from the backing file: {finding.text}"
        else:
            yield f"stays as it is, so that reads go on failing: {finding.text}"
    more = report.totals[Kind.LOST] - len(lost)
    if more:
        yield f"... and {more} more places of lost data"


def _changes(subject: Subject, wishes: Wishes) -> Iterator[str]:
    report = subject.report
    if report.totals[Kind.LEAK]:
        yield _about_leaks(report, wishes)
    if subject.are_bitmaps_broken and wishes.drop_lost:
        yield "will give up the bitmaps, which are damaged"
    if report.totals[Kind.LEAK] and _has_stale_bitmaps(subject):
        yield "will give up the bitmaps, which are out of date and which no program may use any more"
    if not wishes.errors:
        return
    for cure, number in report.cures.items():
        if cure in mend.LOSSLESS and number:
            yield f"will {cure.value} {number} table entries"
    if _raises(subject):
        yield "will put the refcounts right"
    if any(report.cures[cure] for cure in mend.FLAGS):
        yield "will let each COPIED flag agree with its refcount"
    if subject.header.incompatible & _MARKS:
        yield "will clear the dirty and the corrupt bit, if a second check finds no errors"


def _about_leaks(report: Report, wishes: Wishes) -> str:
    leaks = report.totals[Kind.LEAK]
    if _may_free(report):
        return f"will give back {leaks} leaked clusters"
    if wishes.drop_lost:
        return "will give back what nothing names then, unless something stays lost"
    return f"keeps {leaks} clusters that nothing names: they may hold what is lost"


def _raises(subject: Subject) -> bool:
    recount = Recount(subject, may_raise=True, may_free=False)
    wanted = recount.wanted()
    return bool((wanted != subject.stored).any()) or recount.needs_new_structure(wanted)


def _may_free(report: Report) -> bool:
    """Whether clusters that nothing names are surely free: not while something is lost."""
    return not (report.hidden or report.totals[Kind.LOST])


async def repair(file: HostFile, found: Inspection, wishes: Wishes, tell: Tell | None = None) -> Report:
    """Do what the wishes allow; the report of a second check. `tell` hears how far it is.

    Raises `CorruptImage` where the counts cannot be stored, `OSError` as the host does; then the image is
    as damaged as before, or less, and a version 3 image may bear the dirty bit.
    """
    passes = found.subject.passes = Passes(tell, _MOST_PASSES[wishes.data])
    report = await _repair(file, found, wishes)
    passes.end()
    return report


async def _repair(file: HostFile, found: Inspection, wishes: Wishes) -> Report:
    subject = found.subject
    if subject.report.is_clean and not (wishes.errors and subject.header.incompatible & _MARKS):
        return subject.report
    if not wishes.errors:
        await _give_back(file, subject, wishes)
        return (await inspect(file, data=wishes.data, passes=subject.passes)).subject.report
    if not wishes.drop_lost:
        Recount(subject, may_raise=True, may_free=_may_free(subject.report)).refuse_growth(file)
    await _mark(file, subject.header, subject.header.incompatible | Incompatible.DIRTY)
    found = await _mend_all(file, found, wishes)
    report = found.subject.report
    sound = not report.corruptions
    marks = subject.header.incompatible & ~_MARKS if sound else subject.header.incompatible
    await _mark(file, subject.header, marks)
    return report


async def _mend_all(file: HostFile, found: Inspection, wishes: Wishes) -> Inspection:
    """Entries that lose nothing, or all; then what the header names; then counts; then flags."""
    passes = found.subject.passes
    cures = mend.LOSSLESS | ({Cure.DROP} if wishes.drop_lost else set())
    if await mend.mend_tables(file, found, cures, data=wishes.data):
        found = await inspect(file, data=wishes.data, passes=passes)
    if await _give_up_bitmaps(file, found.subject, wishes):  # before the file grows to where they were
        found = await inspect(file, data=wishes.data, passes=passes)
    if await mend_snapshots(file, found.subject, drop_lost=wishes.drop_lost):
        found = await inspect(file, data=wishes.data, passes=passes)
    await _give_back(file, found.subject, wishes)
    found = await inspect(file, data=wishes.data, passes=passes)
    if found.subject.report.totals[Kind.LEAK] and _may_free(found.subject.report):
        await _give_back(file, found.subject, wishes)  # nothing is lost any more
        found = await inspect(file, passes=passes)
    if await mend.mend_tables(file, found, mend.FLAGS, data=False):
        found = await inspect(file, passes=passes)
    return await inspect(file, data=True, passes=passes) if wishes.data else found


async def _give_back(file: HostFile, subject: Subject, wishes: Wishes) -> None:
    """Put the counts right as far as the wishes go."""
    may_free = _may_free(subject.report)
    if may_free and subject.report.totals[Kind.LEAK]:
        await _drop_stale_bitmaps(file, subject)
    await Recount(subject, wishes.errors, may_free).write(file)


async def _mark(file: HostFile, header: Header, bits: int) -> None:
    """Write the incompatible features, which version 2 has not."""
    if header.version >= 3:
        await file.write_from([(INCOMPATIBLE_FIELD, bits.to_bytes(8, "big"))])
        await file.sync()


# -- what the header names


def _has_stale_bitmaps(subject: Subject) -> bool:
    named = subject.header.extension(ext.BITMAPS) is not None
    return named and not subject.header.autoclear & Autoclear.BITMAPS


async def _drop_stale_bitmaps(file: HostFile, subject: Subject) -> None:
    """Take the bitmaps' extension out of the header, before their clusters become free."""
    header = subject.header
    if not _has_stale_bitmaps(subject):
        return
    kept = tuple(e for e in header.extensions if e.kind != ext.BITMAPS)
    old, new = header.pack(), replace(header, extensions=kept).pack()
    current = await load_bytes(file, 0, subject.geometry.cluster_size)
    fields = slice(*(CHANGED_FIELDS if header.version >= 3 else CHANGED_FIELDS_OF_V2))
    new = new[: fields.start] + current[fields] + new[fields.stop :]
    size = -(-max(len(old), len(new)) // SECTOR_SIZE) * SECTOR_SIZE
    await file.write_from([(0, new.ljust(size, b"\0"))])
    await file.sync()


async def _give_up_bitmaps(file: HostFile, subject: Subject, wishes: Wishes) -> bool:
    """Take back the promise of bitmaps where there are none, or with `drop_lost` damaged ones."""
    header = subject.header
    missing = header.extension(ext.BITMAPS) is None
    given_up = missing or (subject.are_bitmaps_broken and wishes.drop_lost)
    if not header.autoclear & Autoclear.BITMAPS or not given_up:
        return False
    bits = header.autoclear & ~Autoclear.BITMAPS.value
    await file.write_from([(AUTOCLEAR_FIELD, bits.to_bytes(8, "big"))])
    await file.sync()
    return True
