"""Making a new, empty image: its header, refcounts and tables, and space set aside.

Owns what is written and in which pieces. Must not know option texts or how an image is opened.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcowfs.creation.form import Creation
from qcowfs.creation.layout import Layout
from qcowfs.errors import UsageError
from qcowfs.format.entries import COPIED, ZERO
from qcowfs.format.header import Header
from qcowfs.format.words import TABLE_WORDS, Words
from qcowfs.geometry import SECTOR_SIZE, TABLE_ENTRY_SIZE, Geometry, HostOffset
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.newfile import new_file
from qcowfs.host.waiting import run_in_thread

if TYPE_CHECKING:
    from qcowfs.codecs.luks_keys import LuksVolume

Report = Callable[[int, int], None]
"""Called now and then with the bytes done and all bytes there are to do."""

_PIECE = 1 << 20
_ALL_ALLOCATED = 0xFFFF_FFFF


def round_up_to_sectors(size: int) -> int:
    """The size of a disk that holds `size` bytes, as disks are whole sectors."""
    return -(-size // SECTOR_SIZE) * SECTOR_SIZE


async def create_image(
    path: Path, form: Creation, size: int, *, force: bool = False, report: Report | None = None,
    passphrase: bytes | None = None,
) -> None:  # fmt: skip
    """Make the image `path` with an empty disk of `size` bytes, rounded up to sectors.

    It appears when it is whole. With `force` it replaces an image of that name; so does its data file. If the
    form is encrypted, `passphrase` opens it.
    Raises `QcowError` with one line, or `OSError` as the host does.
    """
    size = round_up_to_sectors(size)
    header = form.header(size)
    tables, external = form.preallocation != "off", form.data_file is not None
    layout = Layout.plan(
        form.geometry, size, tables=tables, data=tables and not external, luks_clusters=form.luks_clusters
    )
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(new_file(path, force=force))
        await store_luks_area(file, form, passphrase)
        await _write_metadata(file, form, header, layout)
        await file.truncate(layout.end)
        if form.data_file is not None:
            data = await stack.enter_async_context(new_file(Path(form.data_file), force=force))
            await data.truncate(size)
            await _set_aside(data, form.preallocation, 0, size, report)
        else:
            await _set_aside(file, form.preallocation, layout.data, layout.end - layout.data, report)


async def _write_metadata(file: OsHostFile, form: Creation, header: Header, layout: Layout) -> None:
    header = place(header, layout)
    await file.write_from([(0, header.pack())])
    for offset, data in refcount_pieces(layout):
        await file.write_from([(offset, data)])
    if layout.l2_tables:
        for offset, data in _table_pieces(form, layout, header.size):
            await file.write_from([(offset, data)])


async def store_luks_area(file: OsHostFile, form: Creation, passphrase: bytes | None) -> LuksVolume | None:
    """Write a new LUKS area where the header names it, if the form has one.

    Raises `UsageError` without a passphrase.
    """
    if form.encryption is None:
        return None
    if not passphrase:
        raise UsageError("an encrypted image needs a passphrase that is not empty")
    volume = await run_in_thread(form.encryption.make_volume, passphrase)
    await file.write_from([(form.luks_offset, volume.area)])
    return volume


def place(header: Header, layout: Layout) -> Header:
    """The header with its tables where the layout has them."""
    return replace(
        header,
        l1_table_offset=layout.l1_table,
        refcount_table_offset=layout.refcount_table,
        refcount_table_clusters=layout.refcounts.table_clusters,
    )


def refcount_pieces(layout: Layout) -> Iterator[tuple[HostOffset, bytes]]:
    """The refcount table and blocks which say that every cluster of the image is used once."""
    geometry, blocks = layout.geometry, layout.refcounts.blocks
    yield layout.refcount_table, table_of(layout.refcount_blocks, geometry.cluster_size, blocks)
    per_block = geometry.refcounts_per_block
    full, rest = divmod(geometry.clusters_for(layout.end), per_block)
    whole = _ones(geometry, per_block)
    for index in range(full):
        yield layout.refcount_blocks + index * geometry.cluster_size, whole
    if rest:
        yield layout.refcount_blocks + full * geometry.cluster_size, _ones(geometry, rest)


def _ones(geometry: Geometry, count: int) -> bytes:
    """A refcount block whose first `count` entries are 1."""
    words = Words(1 << geometry.refcount_order)
    values = words.unpack(bytes(geometry.cluster_size))
    values[:count] = array(values.typecode, [1]) * count
    return words.pack(values)


def table_of(start: HostOffset, step: int, count: int, flags: int = 0) -> bytes:
    """`count` table entries: `start`, `start + step` and so on, each with the flags."""
    first = start | flags
    return TABLE_WORDS.pack(array("Q", range(first, first + count * step, step)))


def _table_pieces(form: Creation, layout: Layout, size: int) -> Iterator[tuple[HostOffset, bytes]]:
    """The L1 table, and L2 tables that give every guest cluster its place."""
    geometry = layout.geometry
    cluster = geometry.cluster_size
    yield layout.l1_table, table_of(layout.l2_table, cluster, layout.l2_tables, COPIED)
    clusters = geometry.clusters_for(size)
    data = 0 if form.data_file is not None else layout.data
    unwritten = form.encryption is not None and not geometry.extended_l2  # would decrypt to noise
    flags = COPIED | ZERO if unwritten else COPIED
    at_once = _PIECE // TABLE_ENTRY_SIZE
    for first in range(0, clusters, at_once):
        count = min(at_once, clusters - first)
        entries = table_of(data + first * cluster, cluster, count, flags)
        if geometry.extended_l2:
            entries = _with_bitmaps(entries, _ALL_ALLOCATED if form.data_file_raw else 0)
        yield layout.l2_table + first * geometry.l2_entry_size, entries


def _with_bitmaps(entries: bytes, bitmap: int) -> bytes:
    """Each entry followed by a subcluster bitmap."""
    words = array("Q", bytes(2 * len(entries)))
    words[0::2] = array("Q", entries)
    words[1::2] = array("Q", bitmap.to_bytes(8, "big")) * (len(entries) // 8)
    return words.tobytes()


async def _set_aside(
    file: OsHostFile, preallocation: str, start: HostOffset, length: int, report: Report | None
) -> None:
    """Have the host keep space for a range: promised by it, or written as zeros."""
    if preallocation == "falloc" and length:
        await file.allocate(start, length)
    if preallocation == "full":
        zeros = bytes(_PIECE)
        for done in range(0, length, _PIECE):
            part = memoryview(zeros)[: length - done]
            await file.write_from([(start + done, part)])
            if report is not None:
                report(done + len(part), length)
