"""Snapshots are made, dropped, renamed and gone back to, and the disk resized, on images of all shapes."""

from __future__ import annotations

import errno
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from qcowfs.check import check
from qcowfs.disk import states
from qcowfs.disk.image import Image, OpenOptions
from qcowfs.errors import CorruptImage, QcowError, ReadOnlyError, UnsupportedFeature, UsageError
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.host.hostfile import WriteRequest
from qcowfs.testing import MemoryHostFile
from tests.builders import BIT_DATA_FILE, DATA_FILE_NAME, ImageBuilder, extension, poke, snapshot_record
from tests.host_files import WaitingFile, open_file, poke_word, word, writer_of
from tests.memory import FOLDER, open_bytes, read
from tests.shapes import DISK, SECTOR, Shape, make, open_disk, qemu
from tests.states import Twin, clusters_in_use
from tests.test_bitmaps import made as made_with_bitmaps

SMALL, ODD = 200 << 10, 3 * SECTOR
SHAPES = {
    "plain": Shape(snapshot=True),
    "empty": Shape(filled=False, snapshot=True),
    "backing": Shape(base=300_001, snapshot=True),
    "long backing": Shape(base=1 << 20, snapshot=True),
    "version 2": Shape(version=2, snapshot=True),
    "clusters of 512": Shape(cluster_size=512, size=SMALL + ODD, snapshot=True),
    "2 MiB clusters": Shape(cluster_size=2 << 20, size=(5 << 20) + ODD, snapshot=True),
    "2 bits": Shape(cluster_size=1024, size=SMALL, refcount_bits=2, snapshot=True),
    "4 bits": Shape(cluster_size=2048, size=SMALL, refcount_bits=4, snapshot=True),
    "8 bits": Shape(cluster_size=8192, size=2 * SMALL, refcount_bits=8, snapshot=True),
    "32 bits": Shape(cluster_size=4096, size=SMALL, refcount_bits=32, snapshot=True),
    "64 bits": Shape(cluster_size=512, size=SMALL, refcount_bits=64, snapshot=True),
    "subclusters": Shape(extended_l2=True, cluster_size=16384, size=2 * SMALL + ODD, snapshot=True),
    "subclusters backing": Shape(extended_l2=True, base=600_000, size=768 << 10, snapshot=True),
}  # fmt: skip
every_shape = pytest.mark.parametrize("name", SHAPES)
MADE_BY_QEMU = b"1"


async def opened(name: str) -> Twin:
    return await Twin.open(make(SHAPES[name]))


async def scribble(twin: Twin, seed: int, count: int = 8) -> None:
    """Write and zero at random places."""
    rng = random.Random(seed)
    for _ in range(count):
        guest = rng.randrange(len(twin.live))
        length = min(len(twin.live) - guest, rng.choice([1, SECTOR, 3 * twin.made.shape.cluster_size]))
        if rng.random() < 0.7:
            await twin.write(guest, rng.randbytes(length))
        else:
            await twin.zero(guest, length, unmap=rng.random() < 0.5)


# -- each action on each shape


@every_shape
async def test_a_new_snapshot_keeps_what_the_disk_held(name: str, tmp_path: Path) -> None:
    twin = await opened(name)
    await twin.write(5, b"just before")
    made = await twin.create()
    await twin.assert_no_errors()
    await scribble(twin, 1)
    assert twin.image.snapshots[-1] == made
    await twin.close_before_qemu(tmp_path)


@every_shape
async def test_a_deleted_snapshot_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    twin = await opened(name)
    await scribble(twin, 2)
    await twin.delete(MADE_BY_QEMU)
    await twin.assert_no_errors()
    await scribble(twin, 3)
    assert twin.image.snapshots == []
    await twin.close_before_qemu(tmp_path)


@every_shape
async def test_the_disk_goes_back_to_a_snapshot(name: str, tmp_path: Path) -> None:
    twin = await opened(name)
    await scribble(twin, 4)
    await twin.revert(MADE_BY_QEMU)
    await twin.assert_no_errors()
    await twin.assert_equal()
    await scribble(twin, 5)
    await twin.close_before_qemu(tmp_path)


@every_shape
async def test_a_renamed_snapshot_keeps_all_but_its_name(name: str, tmp_path: Path) -> None:
    twin = await opened(name)
    before = twin.snapshot(MADE_BY_QEMU)
    after = await twin.rename(MADE_BY_QEMU, "größer".encode())
    assert after.name == "größer".encode()
    assert (after.id, after.date_ns, after.extra) == (before.id, before.date_ns, before.extra)
    await twin.close_before_qemu(tmp_path)
    assert "größer" in qemu("qemu-img", "snapshot", "-l", tmp_path / DISK)


@every_shape
@pytest.mark.parametrize("factor", [0.3, 2.4])
async def test_a_resized_disk_keeps_its_content_and_grows_by_zeros(
    name: str, factor: float, tmp_path: Path
) -> None:
    twin = await opened(name)
    if twin.made.shape.version == 2:
        await twin.delete(MADE_BY_QEMU)
    await scribble(twin, 6)
    old = len(twin.live)
    for size in (int(old * factor) // SECTOR * SECTOR, old + 5 * SECTOR):
        await twin.resize(size)
        await twin.assert_no_errors()
        await twin.assert_equal()
        await scribble(twin, size)
    await twin.close_before_qemu(tmp_path)


@every_shape
async def test_actions_in_any_order_keep_every_snapshot(name: str, tmp_path: Path) -> None:
    twin = await opened(name)
    made = await twin.create(b"second")
    await scribble(twin, 7)
    if twin.made.shape.version == 3:
        await twin.resize(len(twin.live) // 2 // SECTOR * SECTOR)
    await twin.revert(MADE_BY_QEMU)
    await twin.delete(MADE_BY_QEMU)
    await scribble(twin, 8)
    third = await twin.create(b"second")
    await twin.revert(made.id)
    await scribble(twin, 9)
    assert (made.id, third.id) == (b"2", b"3")
    await twin.assert_no_errors()
    await twin.close_before_qemu(tmp_path)


# -- details of one action


async def test_a_new_snapshot_has_the_record_that_qemu_would_write() -> None:
    twin = await opened("plain")
    first = time.time_ns()
    made = await twin.create(b"a name")
    assert first <= made.date_ns <= time.time_ns()
    assert (made.id, made.name, made.vm_state_size, made.vm_clock_nsec) == (b"2", b"a name", 0, 0)
    assert (made.disk_size, made.icount, len(made.extra)) == (len(twin.live), None, 24)
    await twin.close()


@pytest.mark.parametrize(("known", "following"), [(b"7", b"8"), (b"x", b"1"), (b"0", b"1")])
async def test_the_id_follows_the_largest_number(known: bytes, following: bytes) -> None:
    made = make(SHAPES["plain"])
    data = bytearray(made.files[DISK])
    record = word(data, 64)
    id_at = record + 40 + word(data, record + 36, 4)
    data[id_at : id_at + 1] = known
    twin = await Twin.open(made, bytes(data))
    assert (await twin.create()).id == following
    await twin.close()


@pytest.mark.parametrize(
    "name", [b"", b"before", b"\xff\n/..", b"n" * 65535], ids=["", "taken", "odd", "long"]
)
async def test_every_name_will_do(name: bytes) -> None:
    twin = await opened("clusters of 512")
    assert (await twin.create(name)).name == name
    assert (await twin.rename(MADE_BY_QEMU, name)).name == name
    assert [s.name for s in twin.image.snapshots] == [name, name]
    again = await Twin.open(twin.made, await twin.close())
    assert again.saved == twin.saved
    await again.close()


async def test_a_snapshot_of_an_unchanged_disk_takes_no_data_clusters() -> None:
    twin = await Twin.open(make(Shape(snapshot=False)))
    used = await clusters_in_use(twin.file)
    await twin.create()
    await writer_of(twin.image).finish()
    assert await clusters_in_use(twin.file) == used + 2  # its L1 table, and the snapshot table
    await twin.delete(b"1")
    await writer_of(twin.image).finish()
    assert await clusters_in_use(twin.file) == used
    await twin.close()


async def test_a_disk_of_no_bytes_has_snapshots_too(tmp_path: Path) -> None:
    twin = await Twin.open(make(Shape(size=0, filled=False)))
    await twin.create()
    await twin.revert(b"1")
    await twin.resize(1024)
    await twin.write(3, b"not nothing")
    await twin.create()
    await twin.revert(b"1")
    assert twin.live == b""
    await twin.delete(b"1")
    await twin.revert(b"2")
    await twin.close_before_qemu(tmp_path)


def counted(data: bytes, bits: int = 9) -> bytes:
    """An image of few clusters of 512 bytes, with a refcount block that counts each of them once."""
    image = bytearray(data.ljust(-(-len(data) >> bits) << bits, b"\0"))
    block = len(image)
    poke_word(image, 1 << bits, block)
    image += b"".join(int(n <= block >> bits).to_bytes(2, "big") for n in range(1 << bits - 1))
    return bytes(image)


@pytest.mark.parametrize("action", ["create", "resize"])
async def test_a_refcount_table_that_has_moved_since_is_the_one_that_counts(
    action: str, tmp_path: Path
) -> None:
    shape = Shape(cluster_size=512, size=2200 << 10, refcount_bits=64, bulk=1600 << 10, filled=False)
    twin = await Twin.open(make(shape))
    place = word(twin.file.data, 48)
    await twin.write(0, b"x" * len(twin.live))
    await writer_of(twin.image).flush()
    assert word(twin.file.data, 48) != place
    await (twin.create() if action == "create" else twin.resize(4 << 20))
    await twin.assert_no_errors()
    await scribble(twin, 14, 40)
    await twin.close_before_qemu(tmp_path)


# -- VM state


VM_SHAPE = Shape(cluster_size=512, size=320 << 10, snapshot=True, filled=False)
VM_DISK = 256 << 10


@pytest.fixture(scope="module")
def with_vm_state(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image whose snapshot keeps clusters beyond the disk's end, as QEMU stores a machine's memory.

    What was the end of a longer disk is called VM state by the record and lies beyond a shorter disk.
    """
    path = tmp_path_factory.mktemp("vm") / DISK
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", VM_SHAPE.options, path, str(VM_SHAPE.size))
    qemu("qemu-io", "-f", "qcow2", "-c", f"write -P 3 {VM_DISK - 9000} 50000", path)
    qemu("qemu-img", "snapshot", "-c", "with memory", path)
    qemu("qemu-io", "-f", "qcow2", "-c", f"write -P 4 {VM_DISK - 5000} 2000", path)
    data = bytearray(path.read_bytes())
    record = word(data, 64)
    poke(data, "size", VM_DISK)
    poke_word(data, record + 32, 41000, 4)
    poke_word(data, record + 40, 41000)
    poke_word(data, record + 48, VM_DISK)
    path.write_bytes(data)
    qemu("qemu-img", "check", path)
    assert "40 KiB" in qemu("qemu-img", "snapshot", "-l", path)
    return bytes(data)


async def vm_twin(data: bytes) -> Twin:
    twin = await Twin.open(make(VM_SHAPE), data)
    assert (len(twin.live), twin.image.snapshots[0].vm_state_size) == (VM_DISK, 41000)
    return twin


async def test_a_snapshot_with_vm_state_is_gone_back_to(with_vm_state: bytes, tmp_path: Path) -> None:
    twin = await vm_twin(with_vm_state)
    await twin.revert(b"1")
    await scribble(twin, 10)
    await twin.create(b"later")
    await twin.close_before_qemu(tmp_path)


async def test_vm_state_never_becomes_content_of_a_disk_that_grows(
    with_vm_state: bytes, tmp_path: Path
) -> None:
    twin = await vm_twin(with_vm_state)
    await twin.revert(b"1")
    await twin.resize(VM_SHAPE.size + 4096)
    assert twin.live[VM_DISK:].count(0) == len(twin.live) - VM_DISK
    await twin.close_before_qemu(tmp_path)


async def test_a_snapshot_with_vm_state_is_deleted_whole(with_vm_state: bytes, tmp_path: Path) -> None:
    twin = await vm_twin(with_vm_state)
    await twin.resize(VM_DISK // 2)
    await twin.delete(b"1")
    data = await twin.close()
    again = await Twin.open(twin.made, data)
    used = await clusters_in_use(again.file)
    assert used < 40
    await again.close_before_qemu(tmp_path)


# -- refusals


async def refused(
    twin: Twin, work: Callable[[], Awaitable[object]], kind: type[QcowError], text: str
) -> None:
    """The work is refused with that line, and neither the header nor any content has changed."""
    header = bytes(twin.file.data[:512])
    with pytest.raises(kind) as caught:
        await work()
    assert type(caught.value) is kind
    assert str(caught.value) == f"{twin.image.label}: {text}"
    assert bytes(twin.file.data[:512]) == header
    await twin.assert_equal()
    await twin.assert_no_errors()


async def test_a_snapshot_of_data_with_1_bit_refcounts_is_refused() -> None:
    twin = await Twin.open(make(Shape(cluster_size=512, size=SMALL, refcount_bits=1)))
    with pytest.raises(UsageError, match="refcounts of 1 bit"):
        await twin.create()
    await scribble(twin, 11)
    await twin.close()


async def test_an_empty_disk_with_1_bit_refcounts_has_snapshots(tmp_path: Path) -> None:
    twin = await Twin.open(make(Shape(cluster_size=512, size=SMALL, refcount_bits=1, filled=False)))
    await twin.create()
    await scribble(twin, 12)
    await twin.revert(b"1")
    await twin.delete(b"1")
    await twin.close_before_qemu(tmp_path)


async def test_one_snapshot_too_many_for_2_bit_refcounts_changes_nothing(tmp_path: Path) -> None:
    twin = await opened("2 bits")
    await twin.create()
    await twin.create()
    with pytest.raises(UsageError, match="more references than refcounts of 2 bits hold, at most 3"):
        await twin.create()
    await twin.assert_no_errors()
    await scribble(twin, 13)
    await twin.delete(b"2")
    await twin.create()
    await twin.close_before_qemu(tmp_path)


async def test_a_name_over_the_limit_is_refused() -> None:
    twin = await opened("plain")
    text = "a snapshot name of 65536 bytes, over 65535"
    await refused(twin, lambda: twin.create(b"n" * 65536), UsageError, text)
    await refused(twin, lambda: twin.rename(MADE_BY_QEMU, b"n" * 65536), UsageError, text)
    await twin.close()


@pytest.mark.parametrize("size", [0, -512, 1000, 513])
async def test_a_size_that_is_not_whole_sectors_is_refused(size: int) -> None:
    twin = await opened("plain")
    text = f"a size of {size} bytes: a disk has whole sectors of 512 bytes"
    await refused(twin, lambda: twin.resize(size), UsageError, text)
    await twin.close()


async def test_a_size_over_the_limit_of_the_l1_table_is_refused() -> None:
    twin = await opened("clusters of 512")
    most = (32 << 20) // 8 * 32768
    await refused(
        twin, lambda: twin.resize(most + 512), UsageError,
        f"a size of {most + 512} bytes needs an L1 table over the limit of {32 << 20} bytes",
    )  # fmt: skip
    await twin.close()


async def test_a_smaller_size_is_refused_unless_it_is_asked_for() -> None:
    twin = await opened("plain")
    size = len(twin.live)
    await refused(
        twin, lambda: states.resize(twin.image, size - 512), UsageError,
        f"{size - 512} bytes are less than the {size} that it has; --shrink cuts it",
    )  # fmt: skip
    await twin.close()


async def test_version_2_with_snapshots_keeps_its_size() -> None:
    twin = await opened("version 2")
    text = "version 2 with snapshots keeps one size for all; delete them or convert it"
    await refused(twin, lambda: twin.resize(1 << 20), UnsupportedFeature, text)
    await twin.delete(MADE_BY_QEMU)
    await twin.resize(1 << 20)
    await twin.close()


async def test_version_2_cannot_grow_over_a_longer_backing_file() -> None:
    twin = await Twin.open(make(Shape(version=2, base=1 << 20)))
    text = "version 2 has no zero clusters to hide a longer backing file with"
    await refused(twin, lambda: twin.resize(2 << 20), UnsupportedFeature, text)
    await twin.close()


async def test_an_image_open_for_reading_is_not_changed() -> None:
    image = await open_bytes(make(SHAPES["plain"]).files[DISK])
    with pytest.raises(ReadOnlyError, match="is open for reading only"):
        await states.create_snapshot(image, b"new")
    with pytest.raises(ReadOnlyError, match="is open for reading only"):
        await states.resize(image, 2 << 20)
    with pytest.raises(ReadOnlyError, match="is open for reading only"):
        await states.delete_snapshot(image, image.snapshots[0])
    image.close()


async def test_a_snapshot_that_is_no_more_is_refused() -> None:
    twin = await opened("plain")
    gone = twin.snapshot(MADE_BY_QEMU)
    await twin.delete(MADE_BY_QEMU)
    text = 'the snapshot "before" is no more'
    await refused(twin, lambda: states.delete_snapshot(twin.image, gone), UsageError, text)
    await refused(twin, lambda: states.revert(twin.image, gone), UsageError, text)
    await refused(twin, lambda: states.rename_snapshot(twin.image, gone, b"x"), UsageError, text)
    await twin.close()


async def test_an_external_data_file_has_no_snapshots_and_one_size() -> None:
    builder = ImageBuilder(1 << 16, extensions=extension(DATA_FILE_NAME, b"data"))
    builder.fields["incompatible"] = BIT_DATA_FILE
    builder.snapshots.append(snapshot_record(b"1", b"odd", l1_offset=builder.active.offset))
    files = {"disk.qcow2": MemoryHostFile(counted(builder.build())), "data": MemoryHostFile(bytes(1 << 16))}
    options = OpenOptions(writable=True, data_file=FOLDER / "data", open_writable=lambda p: files[p.name])
    image = await Image.open(FOLDER / "disk.qcow2", options)
    before = bytes(files["disk.qcow2"].data)
    snapshot = image.snapshots[0]
    for work in (states.create_snapshot(image, b"new"), states.revert(image, snapshot),
                 states.delete_snapshot(image, snapshot), states.resize(image, 1 << 17)):  # fmt: skip
        with pytest.raises(UnsupportedFeature, match="external data file"):
            await work
    assert bytes(files["disk.qcow2"].data) == before
    await image.aclose()


# -- damage


def damaged(field: int, size: int, value: int) -> bytes:
    """An image whose only snapshot's record has another value in a field."""
    data = bytearray(make(SHAPES["clusters of 512"]).files[DISK])
    poke_word(data, word(data, 64) + field, value, size)
    return bytes(data)


DAMAGE = {
    "L1 table past the end": damaged(0, 8, 1 << 30),
    "L1 table not aligned": damaged(0, 8, 0x1234),
    "L1 table too short": damaged(8, 4, 1),
    "no L1 table": damaged(8, 4, 0),
    "L1 table is the header": damaged(0, 8, 0),
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
async def test_the_disk_does_not_go_back_to_a_damaged_snapshot(data: bytes) -> None:
    folder = make(SHAPES["clusters of 512"]).folder(data)
    disk = await open_disk(folder)
    before, header = await disk.read(0, disk.size), bytes(disk.file.data[:512])
    with pytest.raises(CorruptImage):
        await states.revert(disk.image, disk.image.snapshots[0])
    assert bytes(disk.file.data[:512]) == header
    assert await disk.read(0, disk.size) == before
    await writer_of(disk.image).write(0, b"goes on")
    await disk.image.aclose()
    again = await open_disk(folder)
    assert await again.read(0, 7) == b"goes on"
    await again.image.aclose()


# -- the host fails


async def do_create(twin: Twin) -> None:
    await twin.create()


async def do_delete(twin: Twin) -> None:
    await twin.delete(MADE_BY_QEMU)


async def do_revert(twin: Twin) -> None:
    await twin.revert(MADE_BY_QEMU)


async def do_rename(twin: Twin) -> None:
    await twin.rename(MADE_BY_QEMU, b"other")


async def do_grow(twin: Twin) -> None:
    await twin.resize(len(twin.live) + (300 << 10))


async def do_shrink(twin: Twin) -> None:
    await twin.resize(len(twin.live) // 2 // SECTOR * SECTOR)


ACTIONS = [do_create, do_delete, do_revert, do_rename, do_grow, do_shrink]
FAULTY = ["clusters of 512", "subclusters", "long backing"]


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("action", ACTIONS)
async def test_after_any_fault_the_old_state_goes_on_and_a_later_try_succeeds(
    action: Callable[[Twin], Awaitable[None]], name: str
) -> None:
    for number in itertools.count():
        twin = await opened(name)
        await scribble(twin, number, 3)
        await writer_of(twin.image).flush()
        error = (errno.EIO, errno.ENOSPC)[number % 2]
        with twin.file.fails(error, number):
            try:
                await action(twin)
            except OSError as found:
                assert found.errno == error  # noqa: PT017 - the action may as well succeed
            else:
                break
        told = f"operation {number} failed"
        await twin.assert_equal(told)
        await twin.assert_no_errors(told)
        await scribble(twin, number + 1, 3)
        await action(twin)
        await scribble(twin, number + 2, 3)
        await twin.close(told)
    assert number > 4
    await twin.close()


@pytest.mark.parametrize("action", ACTIONS)
async def test_a_host_that_fails_from_some_moment_on_leaves_one_of_the_two_states(
    action: Callable[[Twin], Awaitable[None]],
) -> None:
    forbidden = 0
    for number in itertools.count():
        twin = await opened("clusters of 512")
        await scribble(twin, 20, 3)
        await writer_of(twin.image).flush()
        live, saved = twin.live, dict(twin.saved)
        with twin.file.fails(errno.EIO, number, 1 << 30):
            try:
                await action(twin)
            except OSError:
                pass
            except CorruptImage as found:
                forbidden += 1
                assert "could neither be written nor put back" in str(found)  # noqa: PT017 - as above
            else:
                break
        twin.image.close()
        assert (await check(twin.file)).errors == []
        after = await Twin.open(twin.made, bytes(twin.file.data))
        assert after.live == live or forbidden
        assert after.saved == saved or forbidden
        await scribble(after, 21, 3)
        await after.image.aclose()
        assert (await check(after.file)).errors == []
    assert forbidden > 0
    await twin.close()


async def test_nothing_is_written_once_the_header_could_not_be_put_back() -> None:
    twin = await opened("plain")
    twin.file.fail_writes(0, 512)
    with pytest.raises(CorruptImage) as caught:
        await twin.create()
    assert str(caught.value) == (
        f"{twin.image.label}: the header could neither be written nor put back (Input/output error); "
        "nothing more is written, check the image"
    )
    twin.file.heal()
    with pytest.raises(CorruptImage):
        await writer_of(twin.image).write(0, b"x")
    with pytest.raises(CorruptImage):
        await twin.create()
    await twin.assert_equal()
    with pytest.raises(CorruptImage, match="a change of its state failed half-way"):
        await twin.image.aclose()
    assert (await check(twin.file)).errors == []


async def test_nothing_is_written_by_the_old_tables_once_another_state_is_in_force() -> None:
    """The header is written, but what it names cannot be read back."""
    twin = await opened("plain")
    live, switched = twin.live, twin.file.sync

    async def sync_then_fail() -> None:
        await switched()
        if twin.file.log[-2:] and getattr(twin.file.log[-2], "offset", -1) == 24:
            twin.file.fail_reads(0, 1 << 50)

    twin.file.sync = sync_then_fail  # type: ignore[method-assign]
    with pytest.raises((OSError, QcowError)):
        await twin.create()
    twin.file.heal()
    with pytest.raises(CorruptImage):
        await twin.write(0, b"acknowledged, yet in nobody's tables")
    twin.image.close()
    after = await Twin.open(twin.made, bytes(twin.file.data))
    assert after.live == live
    assert after.saved[b"2"] == live
    await after.image.aclose()
    assert (await check(after.file)).errors == []


async def test_nothing_is_written_at_the_end_either_once_another_state_is_in_force() -> None:
    """Not even bitmaps, whose place would be found by the old counts."""
    file = MemoryHostFile(made_with_bitmaps())
    image = await open_file(file)
    await writer_of(image).write(100_000, b"A" * 100_000)
    await writer_of(image).flush()
    write = file.write_from

    async def write_then_fail(requests: Sequence[WriteRequest]) -> None:
        await write(requests)
        if any(offset == 24 for offset, _ in requests):
            file.fail_reads(0, 1 << 50)

    file.write_from = write_then_fail  # type: ignore[method-assign]
    with pytest.raises((OSError, QcowError)):
        await states.create_snapshot(image, b"new")
    file.heal()
    in_force = bytes(file.data)
    assert not writer_of(image).is_dirty
    for action in (writer_of(image).flush, image.aclose):
        with pytest.raises(CorruptImage, match="nothing more is written"):
            await action()
    assert file.data == in_force
    assert (await check(file)).errors == []


# -- beside others


async def test_two_who_delete_the_same_snapshot_do_not_fall_over_each_other() -> None:
    twin = await opened("plain")
    snapshot, refusals = twin.snapshot(MADE_BY_QEMU), []

    async def delete() -> None:
        try:
            await states.delete_snapshot(twin.image, snapshot)
        except UsageError as error:
            refusals.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(delete)
        nursery.start_soon(delete)
    assert refusals == [f'{twin.image.label}: the snapshot "before" is no more']
    twin.saved = {}
    await twin.close()


async def test_each_of_two_who_create_at_once_gets_its_own_snapshot() -> None:
    twin = await opened("plain")
    made: dict[bytes, Snapshot] = {}

    async def create(name: bytes) -> None:
        made[name] = await states.create_snapshot(twin.image, name)

    async with trio.open_nursery() as nursery:
        for name in (b"a", b"b", b"c"):
            nursery.start_soon(create, name)
    assert all(snapshot.name == name for name, snapshot in made.items())
    assert sorted(s.id for s in made.values()) == [b"2", b"3", b"4"]
    twin.saved |= {s.id: twin.live for s in made.values()}
    await twin.close()


async def test_growing_while_another_shrinks_shows_nothing_of_what_was_cut() -> None:
    file = WaitingFile(make(Shape(size=256 << 10, filled=False)).files[DISK])
    image = await open_file(file)
    await writer_of(image).write(0, b"x" * image.size)
    await writer_of(image).flush()
    small, large = 65536 + 512, 1 << 20
    file.hold = {"write"}

    async def shrink() -> None:
        await states.resize(image, small, shrink=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shrink)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(states.resize, image, large)
        await trio.testing.wait_all_tasks_blocked()
        file.release()
    shown = await read(image.active, 0, large)
    assert (len(shown), shown.rstrip(b"\0")) == (large, b"x" * small)
    await image.aclose()


@pytest.mark.parametrize("zeroed", [0, 2, 3, 31])
async def test_a_cut_subcluster_stays_cut_when_the_disk_grows(zeroed: int, tmp_path: Path) -> None:
    """QEMU has made one subcluster read as zeros; the disk ends there for a while."""
    made = make(Shape(extended_l2=True, size=128 << 10, filled=False))
    path = made.save(made.files[DISK], tmp_path)
    commands = ("-c", "write -P 7 0 128k", "-c", f"write -z {zeroed * 2048} 2048")
    qemu("qemu-io", "-f", "qcow2", *commands, path)
    twin = await Twin.open(made, path.read_bytes())
    await twin.resize(zeroed * 2048 + 1024)
    await twin.resize(128 << 10)
    await twin.close_before_qemu(tmp_path)


async def test_a_reader_under_way_does_not_leave_wrong_flags_behind() -> None:
    """A cluster waits to be freed until a read ends, while the disk goes back to a snapshot that has it."""
    made = make(Shape(size=1 << 20, filled=False))
    file = WaitingFile(made.files[DISK])
    image = await open_file(file)
    writer = writer_of(image)
    await writer.write(0, b"a" * 65536)
    snapshot = await states.create_snapshot(image, b"one")
    await read(image.active, 0, 1)  # the tables are in memory
    file.hold = {"read"}
    async with trio.open_nursery() as nursery:
        buffer = bytearray(4096)
        nursery.start_soon(image.active.read_into, 0, memoryview(buffer))
        await trio.testing.wait_all_tasks_blocked()
        file.hold = set()
        await writer.write(0, b"b" * 65536)
        await states.revert(image, snapshot)
        await states.delete_snapshot(image, image.snapshots[0])
        file.release()
    assert buffer == b"a" * 4096
    assert await read(image.active, 0, 65536) == b"a" * 65536
    await image.aclose()
    report = await check(file)
    assert (report.errors, report.leaks) == ([], [])


async def test_readers_go_on_and_writers_wait_while_a_state_is_made() -> None:
    file = WaitingFile(make(Shape(snapshot=True)).files[DISK])
    image = await open_file(file)
    before = await read(image.active, 0, image.size)
    view = image.snapshot_view(image.snapshots[0])
    written: list[str] = []
    file.hold = {"write"}

    async def write() -> None:
        await writer_of(image).write(0, b"later")
        written.append("written")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(states.create_snapshot, image, b"new")
        await trio.testing.wait_all_tasks_blocked()
        assert file.waiting
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        assert not writer_of(image).write_now(0, b"never")
        assert await read(image.active, 0, image.size) == before
        assert len(await read(view, 0, view.size)) == view.size
        assert written == []
        file.release()
    new = image.snapshot_view(image.snapshots[1])
    assert await read(new, 0, new.size) == before
    assert await read(image.active, 0, 5) == b"later"
    await image.aclose()
    report = await check(file)
    assert (report.errors, report.leaks) == ([], [])
