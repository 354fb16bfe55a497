"""`Image`: a qcow2 image open for reading, with its backing chain, and the views of it.

Owns opening: header, limits, locks, data file, backing chain, snapshots. Must not know FUSE or the
command line.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qcowfs.data import inflate
from qcowfs.data.backing import (
    MAX_CHAIN_DEPTH,
    BackingPolicy,
    BackingReference,
    GuestReader,
    OpenHost,
    RawBacking,
    open_for_reading,
    open_for_writing,
    probe_format,
)
from qcowfs.data.guest_data import DataPort
from qcowfs.data.inflate import InflatedClusters, InflatedStore
from qcowfs.data.views import Damage, ImageView, Sources
from qcowfs.disk.keys import Keys
from qcowfs.disk.parts import DetectZeroes, Parts
from qcowfs.disk.unlocking import open_guest_data
from qcowfs.errors import (
    BackingFileError,
    CorruptImage,
    QcowError,
    UnsupportedFeature,
    UsageError,
)
from qcowfs.format.extensions import DATA_FILE_NAME
from qcowfs.format.header import V2_LENGTH, Header
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.format.words import TABLE_WORDS
from qcowfs.geometry import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, Geometry
from qcowfs.host import locks
from qcowfs.host.hostfile import HostFile, OsHostFile
from qcowfs.metadata import cache
from qcowfs.metadata.cache import SliceStore, TableCache
from qcowfs.metadata.mapping import Mapping
from qcowfs.metadata.snapshots import load_snapshots
from qcowfs.metadata.usage import Usage
from qcowfs.text import printable, quoted

if TYPE_CHECKING:
    from qcowfs.disk.live import DiskWriter

log = logging.getLogger(__name__)

T = TypeVar("T")
_CLUSTER_BITS_AT = 20


@dataclass(frozen=True)
class OpenOptions:
    """How an image is opened; sizes in bytes.

    `data_file` is the path that the user permits as external data file. `lost_data_as_zeros` makes
    damage read as zeros. `force_share` reads beside a writer. `table_cache` bounds the metadata tables
    in memory over the whole chain, `inflated_cache` the inflated clusters. A `writable` image takes
    the locks of a writer; what lies below it is only read. `detect_zeroes` tells what becomes of writes
    of zeros, `keys` are those of encrypted images. `is_below` is for what an overlay stands on.
    """

    backing: BackingPolicy = field(default_factory=BackingPolicy)
    data_file: Path | None = None
    lost_data_as_zeros: bool = False
    force_share: bool = False
    table_cache: int = cache.DEFAULT_CACHE_BYTES
    inflated_cache: int = inflate.DEFAULT_CACHE_BYTES
    open_host: OpenHost = open_for_reading
    writable: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    open_writable: OpenHost = open_for_writing
    keys: Keys = field(default_factory=Keys)
    is_below: bool = False


@dataclass
class _Chain:
    """What the images of one backing chain share while they are opened."""

    options: OpenOptions
    slices: SliceStore
    inflated: InflatedStore
    seen: set[tuple[int, int]] = field(default_factory=set)


class Image:
    """An open image; `active` is the live disk. Close it to free the files and locks."""

    def __init__(self, label: str, file: HostFile, header: Header) -> None:
        """For `open` only: an image whose header is known and whose files are still to come."""
        self.label = label
        self.file = file
        self.header = header
        self.geometry: Geometry = header.geometry
        self.snapshots: list[Snapshot] = []
        self.backing: GuestReader | None = None
        self.data_file = file
        self._data: DataPort
        self._l1_tables: TableCache
        self._l2_tables: TableCache
        self._slices: SliceStore
        self.writer: DiskWriter | None = None
        self._detect_zeroes = DetectZeroes.OFF
        self._sources: Sources
        self.active: ImageView

    @classmethod
    async def open(cls, path: Path, options: OpenOptions | None = None) -> Image:
        """Open the image at `path` and everything below it, taking QEMU's reader locks.

        Raises `QcowError` with one line that names the image and what is wrong, or `OSError` as the
        host does.
        """
        options = options or OpenOptions()
        slices = SliceStore(options.table_cache, cache.LEAST_SLICES)
        chain = _Chain(options, slices, InflatedStore(options.inflated_cache))
        label = shown(path)
        image = await _open_file(_open_top(path, label, options), label, chain, top=True)
        if options.writable:
            from qcowfs.disk.live import make_writer

            try:
                image.writer = await make_writer(image.parts(), at_open=True)
            except BaseException:
                image.close()
                raise
        return image

    async def __aenter__(self) -> Image:
        """The image itself, closed by `aclose` when the block ends."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write everything back and close the files."""
        await self.aclose()

    @property
    def size(self) -> int:
        """Bytes of the live disk."""
        return self.active.size

    def snapshot_view(self, snapshot: Snapshot) -> ImageView:
        """A view of an internal snapshot; without a size of its own it has the active one.

        Raises `CorruptImage` where the snapshot's L1 table breaks a limit.
        """
        size = self.active.size if snapshot.disk_size is None else snapshot.disk_size
        label = f"{self.label}, snapshot {quoted(snapshot.name)}"
        self._named(lambda: snapshot.check(self.geometry, size))
        return self._view(snapshot.l1_table_offset, snapshot.l1_size, size, label)

    def parts(self) -> Parts:
        """What writing needs of the image."""
        return Parts(
            self.label, self.header, self.file, self.data_file, self._data, self.snapshots, self.active,
            self._l1_tables, self._l2_tables, self._slices, self._sources.epochs,
            has_backing=self.backing is not None, detect_zeroes=self._detect_zeroes,
        )  # fmt: skip

    async def follow(self, writer: DiskWriter, freed: list[range]) -> None:
        """Go on with the state that the header names now; `freed` host clusters are used no more.

        For `states` only, while the image's writer is alone.
        """
        from qcowfs.disk.live import make_writer

        self.header = await read_header(self.file, self.label)
        self.snapshots = await load_snapshots(self.file, self.header)
        self._make_caches()
        header = self.header
        self.active.follow(
            self._view(header.l1_table_offset, header.l1_size, header.virtual_size, self.label)
        )
        writer.take_over(await make_writer(self.parts()), freed)

    async def aclose(self) -> None:
        """Write everything back, then close every file of the chain.

        Raises `OSError` as the host does; the files are closed all the same.
        """
        try:
            if self.writer is not None:
                await self.writer.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Close every file of the chain; what was not flushed is lost."""
        if self.backing is not None:
            self.backing.close()
        if self.data_file is not self.file:
            self.data_file.close()
        self.file.close()

    # -- the reader's side, as a backing file of another image

    async def read_into(self, guest: int, buffer: memoryview) -> None:
        """Read the live disk: see `ImageView.read_into`."""
        await self.active.read_into(guest, buffer)

    async def find_next(self, guest: int, end: int, *, data: bool) -> int | None:
        """Where data, or a hole, of the live disk begins; see `ImageView.find_next`."""
        return await self.active.find_next(guest, end, data=data)

    async def allocated_bytes(self) -> int:
        """How much space the live disk takes: see `ImageView.allocated_bytes`."""
        return await self.active.allocated_bytes()

    # -- opening

    async def load(self, chain: _Chain, *, top: bool) -> None:
        """For `open` only: check the header, then open the data file and the backing chain."""
        self._named(self.header.check_supported)
        if not (top and chain.options.writable):  # a writer refuses such an image by one line
            self._warn_about_state()
        if self.header.nb_snapshots:
            try:
                self.snapshots = await load_snapshots(self.file, self.header)
            except CorruptImage as error:
                raise CorruptImage(f"{self.label}: {error}") from None
        self._detect_zeroes = chain.options.detect_zeroes
        self._open_data_file(chain.options, top=top)
        self._data = await open_guest_data(
            self.header, self.label, self.file, self.data_file, chain.options.keys
        )
        self._slices = chain.slices
        self._make_caches()
        if self.header.backing_name is not None:
            self.backing = await _open_backing(self, chain)
        self._sources = Sources(
            geometry=self.geometry,
            data=self._data,
            inflated=InflatedClusters(self.file, self.geometry, self.header.compression_type, chain.inflated),
            backing=self.backing,
            damage=Damage(self.label, as_zeros=chain.options.lost_data_as_zeros),
        )
        header = self.header
        self.active = self._view(header.l1_table_offset, header.l1_size, header.virtual_size, self.label)

    def _make_caches(self) -> None:
        self._l1_tables = TableCache(self.file, self.geometry, self._slices, TABLE_WORDS)
        self._l2_tables = TableCache(self.file, self.geometry, self._slices, TABLE_WORDS)

    def _view(self, l1_table_offset: int, l1_size: int, size: int, label: str) -> ImageView:
        geometry = self.geometry
        mapping = Mapping(
            self._l1_tables, self._l2_tables, geometry, l1_table_offset, l1_size,
            version=self.header.version, has_data_file=self.header.has_data_file,
        )  # fmt: skip
        entries = min(l1_size, geometry.l1_entries_for(size))
        usage = Usage(self.file, geometry, l1_table_offset, entries)
        return ImageView(mapping, usage, size, label, self._sources)

    def _warn_about_state(self) -> None:
        if self.header.dirty:
            log.warning("%s: is marked dirty (not closed cleanly); reading it is safe", self.label)
        if self.header.corrupt:
            log.warning("%s: is marked corrupt; reads go on, check it with qcowfs check", self.label)

    def _open_data_file(self, options: OpenOptions, *, top: bool) -> None:
        path = options.data_file if top else None
        if path is None and self.header.has_data_file:
            name = self.header.extension(DATA_FILE_NAME)
            named = "" if name is None else f" (its header names {quoted(name)})"
            told = f"{self.label}: keeps its data in an external data file{named}, which "
            if top and not options.is_below:
                raise UnsupportedFeature(f"{told}is opened only where you name it: --data-file PATH")
            raise UnsupportedFeature(
                f"{told}nothing below an overlay can have; make one file of it first: "
                "qcowfs convert --data-file PATH"
            )
        if path is None:
            return
        if not self.header.has_data_file:
            raise UsageError(f"{self.label}: has no external data file; leave --data-file out")
        try:
            self.data_file = _opener(options)(path)
        except OSError as error:
            raise BackingFileError(f"{self.label}: external data file {path}: {error.strerror}") from None
        lock(self.data_file, options, top=True)

    def _named(self, check: Callable[[], T]) -> T:
        return named(self.label, check)


def _open_top(path: Path, label: str, options: OpenOptions) -> HostFile:
    try:
        return _opener(options)(path)
    except OSError as error:
        if options.writable and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UsageError(f"{label}: {error.strerror} for writing; --read-only needs less") from None
        raise


def _opener(options: OpenOptions) -> OpenHost:
    return options.open_writable if options.writable else options.open_host


def named(label: str, check: Callable[[], T]) -> T:
    """Run a check; the image's label is put before the text of a `QcowError` that it raises."""
    try:
        return check()
    except QcowError as error:
        raise type(error)(f"{label}: {error}") from None


async def read_header(file: HostFile, label: str) -> Header:
    """The header of the image in `file`; raises `QcowError` that names `label`."""
    size = file.facts().size
    start = bytearray(min(size, V2_LENGTH))
    await file.read_into([(0, memoryview(start))])
    bits = int.from_bytes(start[_CLUSTER_BITS_AT : _CLUSTER_BITS_AT + 4], "big")
    cluster = bytearray(min(size, 1 << min(max(bits, MIN_CLUSTER_BITS), MAX_CLUSTER_BITS)))
    await file.read_into([(0, memoryview(cluster))])
    return named(label, lambda: Header.unpack(bytes(cluster)))


async def _open_file(file: HostFile, label: str, chain: _Chain, *, top: bool = False) -> Image:
    """Make an `Image` of an open file, which is closed if anything fails."""
    image = None
    try:
        lock(file, chain.options, top=top)
        chain.seen.add(file.facts().identity)
        image = Image(label, file, await read_header(file, label))
        await image.load(chain, top=top)
    except BaseException:
        (image or file).close()
        raise
    return image


async def _open_backing(image: Image, chain: _Chain) -> GuestReader:
    """What the image's header names as backing file, opened if the policy permits."""
    header, policy = image.header, chain.options.backing
    name = header.backing_name or b""
    folder_of = Path(image.file.name)
    reference = BackingReference(image.label, folder_of, name, header.backing_format)
    path = reference.locate(policy)
    if len(chain.seen) > MAX_CHAIN_DEPTH:
        reference.refuse(f"the backing chain is deeper than {MAX_CHAIN_DEPTH} images")
    file = reference.open(path, chain.options.open_host)
    label = f"{printable(os.fsencode(path))} (backing file of {printable(os.fsencode(image.file.name))})"
    try:
        if file.facts().identity in chain.seen:
            reference.refuse(f"the backing file {path} is already part of the chain: a loop")
        found = reference.format or await probe_format(file)
        if found not in ("qcow2", "raw"):
            reference.refuse(f"wants the backing file {path}, which is a {found} image")
    except BaseException:
        file.close()
        raise
    if found == "qcow2":
        return await _open_file(file, label, chain)
    return _open_raw(file, label, chain)


def _open_raw(file: HostFile, label: str, chain: _Chain) -> RawBacking:
    try:
        lock(file, chain.options)
    except BaseException:
        file.close()
        raise
    chain.seen.add(file.facts().identity)
    chain.options.keys.note(file.name, encrypted=False)
    return RawBacking(file, label)


def shown(path: Path) -> str:
    """How messages call a path."""
    return printable(os.fsencode(path))


def lock(file: HostFile, options: OpenOptions, *, top: bool = False) -> None:
    """Take the locks that the options ask for; raises `ImageInUse`."""
    if isinstance(file, OsHostFile):
        reader = locks.SHARED_READER if options.force_share else locks.READER
        mode = locks.WRITER if options.writable and top else reader
        locks.acquire(file.fd, file.name, mode)
