"""From an encrypted image and a passphrase to its data: what is believed of the LUKS area, at what cost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from qcowfs.codecs.luks_keys import count_rounds, seal
from qcowfs.data.guest_data import EncryptedData, PlainData
from qcowfs.disk.image import OpenOptions, read_header
from qcowfs.disk.key_slots import add_key, read_slots
from qcowfs.disk.keys import Keys
from qcowfs.disk.unlocking import LuksArea, load_area, load_materials, open_guest_data, unlock_area
from qcowfs.errors import BadPassphrase, CorruptImage, QcowError, UnsupportedFeature, UsageError
from qcowfs.format import extensions as ext
from qcowfs.format.extensions import Extension
from qcowfs.format.header import Header
from qcowfs.format.luks import MAX_ITERATIONS, MOST_ROUNDS, SLOTS, LuksHeader, pack_pointer
from qcowfs.testing import MemoryHostFile
from tests.asserting import raises_exactly
from tests.memory import FOLDER, MemoryFolder, read
from tests.shapes import DISK, KEY, Made, Shape, make

PASSPHRASE = KEY.encode()
LUKS = Shape(cluster_size=4096, size=64 << 10, encryption="luks")
LEGACY = replace(LUKS, encryption="aes")
PLAIN = replace(LUKS, encryption=None)
LABEL = "vm"


@pytest.fixture
def made() -> Made:
    return make(LUKS)


def file_of(made: Made) -> MemoryHostFile:
    return MemoryHostFile(made.files[DISK], "/images/vm.qcow2")


async def area_of(file: MemoryHostFile) -> LuksArea:
    return await load_area(file, await read_header(file, LABEL), LABEL)


# -- the passphrase


@pytest.mark.parametrize("shape", [LUKS, LEGACY, PLAIN])
async def test_the_right_passphrase_reads_what_qemu_wrote(shape: Shape) -> None:
    made = make(shape)
    image = await MemoryFolder(made.files).image(DISK, OpenOptions(keys=Keys(default=PASSPHRASE)))
    assert await read(image.active, 0, image.size) == made.content


async def test_a_wrong_passphrase_is_told_and_its_newline_mentioned(made: Made) -> None:
    file = file_of(made)
    area = await area_of(file)
    number, key = await unlock_area(file, area, PASSPHRASE, LABEL)
    assert (number, len(key)) == (0, area.header.key_bytes)
    text = "vm: the passphrase opens none of the image's key slots"
    for wrong, hint in ((b"wrong", ""), (b"", ""), (PASSPHRASE + b"\n", "; the newline at its end counts")):
        with raises_exactly(BadPassphrase, text + hint):
            await unlock_area(file, area, wrong, LABEL)


async def test_legacy_aes_takes_any_passphrase_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    file = file_of(make(LEGACY))
    header = await read_header(file, LABEL)
    port = await open_guest_data(header, LABEL, file, file, Keys(default=b"wrong"))
    assert isinstance(port, EncryptedData)
    text = "vm: legacy AES cannot tell a wrong passphrase; with one, everything is noise"
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, text)]
    caplog.clear()


async def test_a_plain_image_asks_for_no_passphrase() -> None:
    def ask(_: str) -> bytes:
        raise AssertionError("asked")

    file = file_of(make(PLAIN))
    header = await read_header(file, LABEL)
    assert isinstance(await open_guest_data(header, LABEL, file, file, Keys(ask=ask)), PlainData)


@pytest.mark.parametrize("shape", [LUKS, LEGACY])
async def test_without_a_passphrase_the_image_is_named(shape: Shape) -> None:
    file = file_of(make(shape))
    header = await read_header(file, LABEL)
    with pytest.raises(UsageError, match=r"^vm: is encrypted \("):
        await open_guest_data(header, LABEL, file, file, Keys())


# -- where the area lies


def with_pointer(header: Header, data: bytes | None) -> Header:
    kept = tuple(e for e in header.extensions if e.kind != ext.ENCRYPTION_HEADER)
    added = () if data is None else (Extension(ext.ENCRYPTION_HEADER, data),)
    return replace(header, extensions=kept + added)


@pytest.mark.parametrize(
    ("pointer", "text"),
    [
        (None, "is encrypted (LUKS) but does not tell where its LUKS header is"),
        (bytes(15), "encryption header pointer has 15 bytes, not 16"),
        (pack_pointer(0, 4096), "LUKS header offset 0x0 is not cluster aligned"),
        (pack_pointer(4608, 4096), "LUKS header offset 0x1200 is not cluster aligned"),
        (pack_pointer(1 << 40, 4096), "LUKS header is cut short: 0 bytes of 592"),
        (pack_pointer(1 << 63, 1 << 63), "LUKS header is cut short: 0 bytes of 592"),
        (pack_pointer(4096, 4096), "LUKS header: magic 000000000000 version 0 is not LUKS version 1"),
    ],
)
async def test_a_pointer_that_leads_nowhere_is_damage(pointer: bytes | None, text: str, made: Made) -> None:
    file = file_of(made)
    file.data[4096:8192] = bytes(4096)
    header = with_pointer(await read_header(file, LABEL), pointer)
    with raises_exactly(CorruptImage, f"vm: {text}"):
        await load_area(file, header, LABEL)


async def test_an_area_that_is_too_short_for_its_key_material_is_damage(made: Made) -> None:
    file = file_of(made)
    header = await read_header(file, LABEL)
    area = await area_of(file)
    short = with_pointer(header, pack_pointer(area.offset, area.length - area.header.material_size - 4096))
    with pytest.raises(CorruptImage, match=r"^vm: LUKS header: key material goes beyond the area"):
        await load_area(file, short, LABEL)


async def test_material_that_the_file_lacks_counts_as_zeros_and_opens_nothing(made: Made) -> None:
    file = file_of(made)
    area = await area_of(file)
    del file.data[area.offset + area.header.slots[0].key_offset + 1000 :]
    (material,) = (await load_materials(file, area)).values()
    assert len(material) == area.header.material_size
    assert not any(material[1000:])
    with pytest.raises(BadPassphrase):
        await unlock_area(file, area, PASSPHRASE, LABEL)


# -- what it may cost


def costly(header: LuksHeader, iterations: Callable[[int], int], digest: int) -> LuksHeader:
    """The header with every slot in use, each at its cost."""
    slots = tuple(replace(slot, active=True, iterations=iterations(n)) for n, slot in enumerate(header.slots))
    return replace(header, slots=slots, digest_iterations=digest)


async def store(file: MemoryHostFile, area: LuksArea, header: LuksHeader) -> None:
    data = header.pack()
    file.data[area.offset : area.offset + len(data)] = data


@pytest.mark.parametrize(("slot", "digest"), [(MAX_ITERATIONS, 1000), (1000, MAX_ITERATIONS)])
async def test_a_header_that_would_take_minutes_is_refused_but_its_slots_are_listed(
    slot: int, digest: int, made: Made
) -> None:
    folder = MemoryFolder(made.files)
    area = await area_of(folder.files[DISK])
    hostile = costly(area.header, lambda _: slot, digest)
    await store(folder.files[DISK], area, hostile)
    text = (
        f"{FOLDER / DISK}: trying a passphrase in every key slot takes {count_rounds(hostile)} rounds, more "
        f"than {MOST_ROUNDS}, which wastes time on purpose; if you trust the image, find the costly slots by "
        "qcowfs key list and empty one by qemu-img amend -o encrypt.state=inactive,encrypt.keyslot=N"
    )
    with raises_exactly(UnsupportedFeature, text):
        await folder.image(DISK, OpenOptions(keys=Keys(default=PASSPHRASE)))
    assert folder.left_open() == []
    assert [s.iterations for s in await read_slots(FOLDER / DISK, folder.open)] == [slot] * SLOTS


@pytest.mark.parametrize(
    ("hash_name", "key_bytes", "iterations"),
    [
        ("sha1", 64, 5_000_000),  # 2 seconds at 10 million rounds a second
        ("sha1", 32, 10_000_000),
        ("sha256", 64, 10_000_000),
        ("sha512", 64, 20_000_000),
    ],
)
def test_eight_slots_of_two_seconds_from_a_fast_machine_are_fine(
    hash_name: str, key_bytes: int, iterations: int, made: Made
) -> None:
    header = LuksHeader.unpack(made.files[DISK][made.files[DISK].index(b"LUKS\xba\xbe") :])
    usual = replace(header, hash=hash_name, key_bytes=key_bytes)
    assert count_rounds(costly(usual, lambda _: iterations, iterations // 8)) <= MOST_ROUNDS
    one = replace(usual.slots[0], active=True, iterations=MAX_ITERATIONS)
    costliest = replace(usual, slots=(one, *usual.slots[1:]), digest_iterations=MAX_ITERATIONS)
    assert count_rounds(costliest) <= MOST_ROUNDS


def test_rounds_are_those_of_every_slot_in_use_and_of_the_digest_after_it(made: Made) -> None:
    header = LuksHeader.unpack(made.files[DISK][made.files[DISK].index(b"LUKS\xba\xbe") :])
    header = costly(header, lambda n: 10**n, 7)
    assert (header.hash, header.key_bytes) == ("sha256", 64)
    assert count_rounds(header) == 2 * 11_111_111 + 8 * 7
    assert count_rounds(replace(header, hash="sha1")) == 4 * 11_111_111 + 8 * 7
    assert count_rounds(replace(header, hash="sha1", slots=header.slots[2:3])) == 4 * 100 + 7


async def test_a_key_that_would_make_the_image_too_costly_is_not_added(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = MemoryFolder(made.files)
    before = bytes(folder.files[DISK].data)
    area = await area_of(folder.files[DISK])
    monkeypatch.setattr("qcowfs.disk.key_slots.MOST_ROUNDS", count_rounds(area.header) + 1000)
    with pytest.raises(UsageError, match=r"nobody could open the image here; lower --iter-time$"):
        await add_key(FOLDER / DISK, Keys(default=PASSPHRASE), b"new", iter_time=0, open_host=folder.open)
    assert folder.files[DISK].data == before


async def test_the_last_of_eight_slots_opens_as_the_first_does(made: Made) -> None:
    file = file_of(made)
    area = await area_of(file)
    _, key = await unlock_area(file, area, PASSPHRASE, LABEL)
    header = area.header
    for number in range(1, SLOTS):
        header, material = seal(header, number, b"%d" % number, key, 0)
        await file.write_from([(area.offset + header.slots[number].key_offset, material)])
    await store(file, area, header)
    unlocked = partial(unlock_area, file, await area_of(file))
    assert await unlocked(PASSPHRASE, LABEL) == (0, key)
    assert await unlocked(b"7", LABEL) == (7, key)
    with pytest.raises(QcowError):
        await unlocked(b"8", LABEL)
