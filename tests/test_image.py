"""Opening images: what is accepted, warned about or refused, and that nothing stays open after a failure."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from qcowfs.disk.image import OpenOptions
from qcowfs.errors import BackingFileError, CorruptImage, NotQcow2, QcowError, UnsupportedFeature, UsageError
from tests import builders
from tests.asserting import little_memory, raises_exactly
from tests.builders import (
    BIT_CORRUPT,
    BIT_DATA_FILE,
    BIT_DIRTY,
    DATA_FILE_NAME,
    FEATURE_NAMES,
    ImageBuilder,
    extension,
    feature_name,
    snapshot_record,
)
from tests.memory import DISK, FOLDER, MemoryFolder, open_bytes, read

C = 512


async def refused(data: bytes, kind: type[QcowError], text: str) -> None:
    """Assert that the image is refused with that text, which its path leads, and closed."""
    folder = MemoryFolder({DISK.name: data})
    with raises_exactly(kind, f"{DISK}: {text}"):
        await folder.image(DISK.name)
    assert folder.left_open() == []


async def test_an_open_image_tells_its_size_and_closes_its_file() -> None:
    folder = MemoryFolder({DISK.name: ImageBuilder(3 * C + 100).build()})
    image = await folder.image(DISK.name)
    assert (image.size, image.label, image.backing) == (3 * C, str(DISK), None)
    assert folder.left_open() == [DISK.name]
    image.close()
    assert folder.left_open() == []


async def test_a_missing_image_is_the_hosts_error() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await MemoryFolder({}).image("gone.qcow2")
    assert caught.value.filename == "/images/gone.qcow2"


OTHER_FORMAT = (
    "is not a qcow2 image (starts with 4d 5a 00 00, not 51 46 49 fb); "
    "another format can be converted: qemu-img convert -O qcow2"
)


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"", "is empty; a qcow2 image starts with its header"), (b"MZ" + bytes(1000), OTHER_FORMAT)],
)
async def test_another_kind_of_file_is_refused(data: bytes, text: str) -> None:
    await refused(data, NotQcow2, text)


async def test_a_damaged_header_is_refused_in_the_name_of_the_image() -> None:
    data = ImageBuilder(C, fields={"l1_size": 0}).build()
    text = "header field l1_size = 0 is below the 1 entries that the size needs"
    await refused(data, CorruptImage, text)


NO_KEY = (
    "is encrypted (legacy AES); give its passphrase by --key-file FILE, by --key-fd N, or as the systemd "
    "credential qcowfs.key"
)


@pytest.mark.parametrize(
    ("method", "kind", "text"),
    [
        (1, UsageError, NO_KEY),
        (2, CorruptImage, "is encrypted (LUKS) but does not tell where its LUKS header is"),
        (7, UnsupportedFeature, "encryption method 7 is unknown"),
    ],
)  # fmt: skip
async def test_an_encrypted_image_is_not_opened_without_a_key(
    method: int, kind: type[QcowError], text: str
) -> None:
    await refused(ImageBuilder(C, fields={"crypt_method": method}).build(), kind, text)


@pytest.mark.parametrize(
    ("names", "shown"), [(b"", "unnamed"), (feature_name(0, 40, b"time travel"), '"time travel"')]
)
async def test_an_unknown_incompatible_feature_is_refused_by_its_name(names: bytes, shown: str) -> None:
    image = ImageBuilder(C, fields={"incompatible": 1 << 40}, extensions=extension(FEATURE_NAMES, names))
    text = f"needs incompatible feature bit 40 ({shown}), which this version does not support"
    await refused(image.build(), UnsupportedFeature, text)


async def test_unknown_compatible_and_autoclear_features_are_no_obstacle() -> None:
    image = ImageBuilder(C, fields={"compatible": 1 << 40, "autoclear": 1 << 41})
    image.normal(0, b"x" * C)
    assert await read(await open_bytes(image.build()), 0, C) == b"x" * C


@pytest.mark.parametrize(
    ("bit", "text"),
    [
        (BIT_DIRTY, "is marked dirty (not closed cleanly); reading it is safe"),
        (BIT_CORRUPT, "is marked corrupt; reads go on, check it with qcowfs check"),
    ],
)
async def test_a_marked_image_is_read_with_a_warning(
    bit: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = ImageBuilder(C, fields={"incompatible": bit})
    image.normal(0, b"x" * C)
    disk = await open_bytes(image.build())
    assert caplog.record_tuples == [("qcowfs.disk.image", logging.WARNING, f"{DISK}: {text}")]
    assert await read(disk, 0, C) == b"x" * C


async def test_a_sound_image_is_opened_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    await open_bytes(ImageBuilder(C).build())
    assert caplog.records == []


async def test_opening_a_header_with_the_largest_clusters_reads_one_cluster() -> None:
    folder = MemoryFolder({"a": ImageBuilder(1 << 21, cluster_bits=21).build()})
    with little_memory():
        image = await folder.image("a")
    assert image.geometry.cluster_size == 2 << 20


@pytest.mark.parametrize("bits", [0, 22, 63, (1 << 32) - 1])
async def test_senseless_cluster_bits_cost_little(bits: int) -> None:
    image = bytearray(ImageBuilder(1 << 21, cluster_bits=21).build())
    builders.poke(image, "cluster_bits", bits)
    folder = MemoryFolder({"a": bytes(image)})
    text = f"/images/a: header field cluster_bits = {bits} is outside 9..21"
    with little_memory(), raises_exactly(CorruptImage, text):
        await folder.image("a")


# -- external data files


def with_data_file(**fields: int) -> bytes:
    image = ImageBuilder(C, fields={"incompatible": BIT_DATA_FILE, **fields})
    image.entry(0, builders.COPIED)
    image.extensions = extension(DATA_FILE_NAME, b"data\x1b.raw")
    return image.build()


async def test_a_data_file_is_opened_only_where_the_user_names_it() -> None:
    folder = MemoryFolder({"a": with_data_file(), "data\x1b.raw": b"never", "mine": b"m" * C})
    image = await folder.image("a", OpenOptions(data_file=FOLDER / "mine"))
    assert await read(image, 0, C) == b"m" * C
    assert folder.opened == ["a", "mine"]
    image.close()
    assert folder.left_open() == []


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (with_data_file(), ' (its header names "data\\x1b.raw")'),
        (ImageBuilder(C, fields={"incompatible": BIT_DATA_FILE}).build(), ""),
    ],
)
async def test_an_image_with_a_data_file_asks_for_its_path(data: bytes, named: str) -> None:
    where = "which is opened only where you name it: --data-file PATH"
    await refused(data, UnsupportedFeature, f"keeps its data in an external data file{named}, {where}")


async def test_a_needless_data_file_is_refused_unopened() -> None:
    folder = MemoryFolder({"a": ImageBuilder(C).build(), "mine": b""})
    with raises_exactly(UsageError, "/images/a: has no external data file; leave --data-file out"):
        await folder.image("a", OpenOptions(data_file=FOLDER / "mine"))
    assert folder.opened == ["a"]
    assert folder.left_open() == []


async def test_a_missing_data_file_is_told_by_its_path() -> None:
    folder = MemoryFolder({"a": with_data_file()})
    with pytest.raises(BackingFileError, match="/images/mine"):
        await folder.image("a", OpenOptions(data_file=FOLDER / "mine"))
    assert folder.left_open() == []


# -- snapshots


async def test_a_snapshot_without_a_size_has_that_of_the_live_disk() -> None:
    image = ImageBuilder(3 * C)
    image.snapshots.append(snapshot_record(b"1", b"old", l1_offset=image.active.offset, l1_size=1))
    disk = await open_bytes(image.build())
    assert disk.snapshot_view(disk.snapshots[0]).size == 3 * C


async def test_a_snapshot_with_a_broken_l1_table_leaves_the_live_disk_readable() -> None:
    image = ImageBuilder(C)
    image.normal(0, b"x" * C)
    image.snapshots.append(snapshot_record(b"1", b"bad", l1_offset=7, l1_size=1))
    disk = await open_bytes(image.build())
    text = "snapshot id 1: L1 table at offset 0x7 is not cluster aligned"
    with raises_exactly(CorruptImage, f"{DISK}: {text}"):
        disk.snapshot_view(disk.snapshots[0])
    assert await read(disk, 0, C) == b"x" * C


async def test_a_snapshots_label_shows_its_name_safely() -> None:
    image = ImageBuilder(C)
    record = snapshot_record(b"1", b"a\nb", l1_offset=image.active.offset, l1_size=1)
    image.snapshots.append(record)
    disk = await open_bytes(image.build())
    assert disk.snapshot_view(disk.snapshots[0]).label == f'{DISK}, snapshot "a\\x0ab"'


# -- failures

FAILURES: list[tuple[str, Callable[[], bytes]]] = [
    ("header", lambda: b"QFI\xfb" + bytes(500)),
    ("feature", lambda: ImageBuilder(C, fields={"incompatible": 1 << 63}).build()),
    (
        "snapshot table",
        lambda: ImageBuilder(C, fields={"nb_snapshots": 9, "snapshots_offset": C << 20}).build(),
    ),
    ("data file", with_data_file),
    ("backing format", lambda: ImageBuilder(C, backing_name=b"base").build()),
]


@pytest.mark.parametrize("make", [make for _, make in FAILURES], ids=[name for name, _ in FAILURES])
async def test_every_file_is_closed_after_a_failure(make: Callable[[], bytes]) -> None:
    base = ImageBuilder(C, backing_name=b"bad", extensions=extension(builders.BACKING_FORMAT, b"qcow2"))
    top = ImageBuilder(C, backing_name=b"mid", extensions=extension(builders.BACKING_FORMAT, b"qcow2"))
    folder = MemoryFolder({"top": top.build(), "mid": base.build(), "bad": make(), "base": b""})
    with pytest.raises(QcowError, match=r"^/images/bad"):
        await folder.image("top")
    assert folder.opened[:3] == ["top", "mid", "bad"]
    assert folder.left_open() == []


async def test_a_data_file_is_closed_when_the_backing_file_is_refused() -> None:
    image = ImageBuilder(C, fields={"incompatible": BIT_DATA_FILE}, backing_name=b"undeclared")
    folder = MemoryFolder({"a": image.build(), "mine": b""})
    with pytest.raises(BackingFileError, match="does not declare the format"):
        await folder.image("a", OpenOptions(data_file=FOLDER / "mine"))
    assert folder.opened == ["a", "mine"]
    assert folder.left_open() == []


async def test_the_files_are_closed_when_the_host_fails() -> None:
    folder = MemoryFolder({"a": ImageBuilder(C).build()})
    folder.files["a"].fail_reads(0, 1)
    with pytest.raises(OSError, match="Input/output error"):
        await folder.image("a")
    assert folder.left_open() == []


async def test_closing_an_image_closes_its_whole_chain() -> None:
    declared = extension(builders.BACKING_FORMAT, b"qcow2")
    raw = extension(builders.BACKING_FORMAT, b"raw")
    files = {
        "top": ImageBuilder(C, backing_name=b"mid", extensions=declared).build(),
        "mid": ImageBuilder(C, backing_name=b"base", extensions=raw).build(),
        "base": b"b",
    }
    folder = MemoryFolder(files)
    image = await folder.image("top")
    assert folder.left_open() == ["top", "mid", "base"]
    image.close()
    assert folder.left_open() == []
