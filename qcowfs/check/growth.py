"""Whether the file may grow: what entries name behind its end is lost, and must not come to hold other bytes.

Owns where the lowest such place is, and what is appended short of it. Must not know what is appended. As the
file grows over a lost cluster, that would read as zeros or as metadata, and no check could tell.
"""

from __future__ import annotations

import numpy as np

from qcowfs.check.arrays import load_bytes
from qcowfs.check.entries import Entries
from qcowfs.check.subject import Subject
from qcowfs.check.trees import Batch
from qcowfs.codecs.compression import inflater
from qcowfs.errors import CorruptImage, UsageError
from qcowfs.host.hostfile import HostFile


def place_behind_end(file: HostFile, subject: Subject, clusters: int) -> int:
    """The host cluster from which on so many may be appended; nothing names any of them.

    Raises `UsageError` where the file cannot grow, `CorruptImage` where it must not.
    """
    if not file.facts().regular:
        raise UsageError(
            f"{file.name}: needs {clusters} clusters behind its end, which a device has not; "
            "copy the image to a file first"
        )
    first = subject.clusters + int(subject.references[subject.clusters] > 0)  # what is packed may end there
    if subject.first_gone < first + clusters:
        raise CorruptImage(
            f"{file.name}: needs {clusters} new clusters behind the end of the file, and what was lost "
            f"there would read as other bytes ({subject.who_is_gone}); put the missing end of the file back, "
            "or give up what is lost with --drop-lost --data"
        )
    return first


async def note_gone(subject: Subject, batch: Batch, entries: Entries) -> None:
    """Note the lowest place behind the end of the file where entries have lost data."""
    if subject.header.has_data_file:
        return
    gone = entries.standard.first_past_end()
    if gone is not None:
        _note(subject, batch, entries, *gone)
    if entries.standard is not entries:
        await _note_packed(subject, batch, entries)


async def _note_packed(subject: Subject, batch: Batch, entries: Entries) -> None:
    """Note compressed clusters that begin behind the end, and those that it cuts within their stream."""
    packed, end = entries.packed, subject.file.facts().size
    offsets, lengths = packed.stored_ranges
    reaching = np.flatnonzero(offsets + lengths > end)
    for at in reaching[np.argsort(offsets[reaching], kind="stable")].tolist():
        start, cluster = int(offsets[at]), int(offsets[at]) >> subject.bits
        if cluster >= subject.clusters:
            _note(subject, batch, entries, cluster, int(packed.indices[at]))
            return
        if not await _is_whole(subject, start, end - start):
            _note(subject, batch, entries, subject.clusters, int(packed.indices[at]))
            return


async def _is_whole(subject: Subject, start: int, length: int) -> bool:
    """Whether what is left of a compressed cluster is all that there was."""
    stored = await load_bytes(subject.file, start, max(0, length))
    try:
        inflater(subject.header.compression_type)(stored, subject.geometry.cluster_size)
    except CorruptImage:
        return False
    return True


def _note(subject: Subject, batch: Batch, entries: Entries, cluster: int, index: int) -> None:
    guest = int(entries.guest_offsets(np.array([index]))[0])
    subject.note_gone(cluster, f"{batch.tree.label}, guest offset {guest:#x}")
