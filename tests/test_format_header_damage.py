"""Damaged headers are refused by a text that names field and limit, and cost little memory."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qcowfs.errors import CorruptImage, NotQcow2, QcowError, UnsupportedFeature
from qcowfs.format.header import Header
from tests import builders
from tests.asserting import little_memory, raises_exactly

BOUNDARIES = [
    0, 1, 0x100,
    *((1 << 31) + n for n in (-1, 0, 1)),
    (1 << 32) - 1,
    *((1 << 63) + n for n in (-1, 0, 1)),
    (1 << 64) - (1 << 21), (1 << 64) - 1,
]  # fmt: skip
FIELDS = sorted(builders.FIELDS)


def unpack_or_refuse(image: bytes) -> None:
    """Do with a header what opening does; only a `QcowError` may come out, with a text of one line."""
    try:
        header = Header.unpack(image)
        header.check_supported()
    except QcowError as error:
        text = str(error)
    else:
        text = "sound"
        assert Header.unpack(header.pack().ljust(len(image), b"\0")) == header
    assert text.isprintable()


@given(st.binary(max_size=700))
def test_random_bytes_raise_nothing_but_our_errors(data: bytes) -> None:
    with little_memory():
        unpack_or_refuse(data)


@given(st.sampled_from([2, 3]), st.binary(max_size=700))
def test_random_fields_raise_nothing_but_our_errors(version: int, data: bytes) -> None:
    with little_memory():
        unpack_or_refuse(builders.MAGIC + version.to_bytes(4, "big") + data)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_bits", [9, 21])
def test_a_boundary_value_in_any_field_costs_little(name: str, version: int, cluster_bits: int) -> None:
    sound = builders.header(version=version, cluster_bits=cluster_bits, l1_table_offset=1 << 30,
                            refcount_table_offset=1 << 31, l1_size=32)  # fmt: skip
    image = bytearray(sound.ljust(1 << cluster_bits, b"\0"))
    for value in BOUNDARIES:
        changed = image.copy()
        builders.poke(changed, name, value)
        with little_memory():
            unpack_or_refuse(bytes(changed))


@given(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(BOUNDARIES)), st.binary(max_size=300))
@example({"backing_file_offset": 0x100, "backing_file_size": 1}, b"\xff" * 300)
def test_boundary_values_in_many_fields_raise_nothing_but_our_errors(
    values: dict[str, int], extensions: bytes
) -> None:
    image = bytearray((builders.header() + extensions).ljust(1 << 16, b"\0"))
    for name, value in values.items():
        builders.poke(image, name, value)
    with little_memory():
        unpack_or_refuse(bytes(image))


def test_a_first_cluster_full_of_empty_extensions_costs_little() -> None:
    start = builders.header(cluster_bits=21, l1_table_offset=0, refcount_table_offset=0)
    image = start + builders.extension(0x12345678, b"") * (((2 << 20) - len(start)) // 8)
    with little_memory():
        unpack_or_refuse(image)


SHORT = "header is cut short: {} bytes of at least {}"
TABLE = "header field {} makes a table of {} bytes, over {}"
ALIGNMENT = "header: the table of {} at offset {:#x} is not cluster aligned"
BEYOND = "header: the table of {} at offset {:#x} ends beyond 2^63"
LAST = (1 << 63) - (1 << 16)
DAMAGE: list[tuple[dict[str, int], str]] = [
    ({"cluster_bits": 8}, "header field cluster_bits = 8 is outside 9..21"),
    ({"cluster_bits": 22}, "header field cluster_bits = 22 is outside 9..21"),
    ({"refcount_order": 7}, "header field refcount_order = 7 exceeds 6"),
    (
        {"cluster_bits": 13, "incompatible": 16},
        "header field cluster_bits = 13 is below 14, the least for extended L2",
    ),
    ({"l1_size": (32 << 17) + 1}, TABLE.format("l1_size", (32 << 20) + 8, 32 << 20)),
    ({"l1_size": 0}, "header field l1_size = 0 is below the 1 entries that the size needs"),
    ({"size": (1 << 29) + 1}, "header field l1_size = 1 is below the 2 entries that the size needs"),
    ({"l1_table_offset": 0x200}, ALIGNMENT.format("l1_size", 0x200)),
    ({"l1_table_offset": LAST, "l1_size": 1 << 13}, BEYOND.format("l1_size", LAST)),
    ({"size": (1 << 51) + 1}, f"header field size = {(1 << 51) + 1} needs an L1 table over 32 MiB"),
    ({"refcount_table_clusters": 0}, "header field refcount_table_clusters = 0 must not be 0"),
    (
        {"refcount_table_clusters": 129},
        TABLE.format("refcount_table_clusters", 129 << 16, 8 << 20),
    ),
    ({"refcount_table_offset": 1}, ALIGNMENT.format("refcount_table_clusters", 1)),
    (
        {"refcount_table_offset": LAST},
        BEYOND.format("refcount_table_clusters", LAST),
    ),
    ({"nb_snapshots": 65537}, "header field nb_snapshots = 65537 exceeds 65536"),
    ({"snapshots_offset": 0xFFFF}, ALIGNMENT.format("snapshots_offset", 0xFFFF)),
    ({"snapshots_offset": 1 << 63}, BEYOND.format("snapshots_offset", 1 << 63)),
    (
        {"backing_file_offset": 120, "backing_file_size": 1024},
        "header field backing_file_size = 1024 exceeds 1023",
    ),
    (
        {"backing_file_offset": 0xFFFF, "backing_file_size": 2},
        "header field backing_file_offset = 65535 puts the name beyond the first cluster",
    ),
]


@pytest.mark.parametrize(("fields", "text"), DAMAGE)
def test_each_limit_is_refused_by_name(fields: dict[str, int], text: str) -> None:
    image = builders.header(**fields).ljust(1 << 16, b"\0")
    with raises_exactly(CorruptImage, text):
        Header.unpack(image)


@pytest.mark.parametrize(
    "fields",
    [
        {"cluster_bits": 9, "size": 512}, {"cluster_bits": 21, "l1_table_offset": 2 << 20,
                                           "refcount_table_offset": 4 << 20},
        {"refcount_order": 6}, {"refcount_order": 0}, {"l1_size": 32 << 17},
        {"size": 1 << 51, "l1_size": 1 << 22}, {"size": 0, "l1_size": 0}, {"size": 1 << 29},
        {"refcount_table_clusters": 128}, {"nb_snapshots": 65536},
        {"cluster_bits": 14, "incompatible": 16},
        {"snapshots_offset": LAST}, {"l1_table_offset": LAST, "l1_size": (1 << 13) - 1},
        {"backing_file_offset": (1 << 16) - 1023, "backing_file_size": 1023},
    ],
)  # fmt: skip
def test_values_at_a_limit_are_accepted(fields: dict[str, int]) -> None:
    image = builders.header(**fields).ljust(1 << fields.get("cluster_bits", 16), b"\0")
    header = Header.unpack(image)
    assert header.cluster_bits == fields.get("cluster_bits", 16)


@pytest.mark.parametrize(
    ("length", "rule"),
    [
        (96, "must be a multiple of 8 and at least 104"),
        (108, "must be a multiple of 8 and at least 104"),
        ((1 << 16) + 8, "goes beyond the first cluster (65536 bytes read)"),
        ((1 << 32) - 8, "goes beyond the first cluster (65536 bytes read)"),
    ],
)
def test_a_senseless_header_length_is_refused(length: int, rule: str) -> None:
    image = bytearray(builders.header().ljust(1 << 16, b"\0"))
    builders.poke(image, "header_length", length)
    with raises_exactly(CorruptImage, f"header field header_length = {length} {rule}"):
        Header.unpack(bytes(image))


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (builders.MAGIC, SHORT.format(4, 72)),
        (builders.header(version=2)[:71], SHORT.format(71, 72)),
        (builders.header()[:103], SHORT.format(103, 104)),
    ],
)
def test_a_header_that_is_cut_short_is_refused(image: bytes, text: str) -> None:
    with raises_exactly(CorruptImage, text):
        Header.unpack(image)


def test_a_backing_name_that_is_cut_short_is_refused() -> None:
    image = builders.header(backing_file_offset=0x78, backing_file_size=20) + bytes(8) + b"n" * 19
    with raises_exactly(CorruptImage, "the backing file name at offset 0x78 is cut short"):
        Header.unpack(image)


def test_an_extension_beyond_the_cluster_is_refused() -> None:
    image = builders.header() + b"\x00\x00\x12\x34\x00\x00\x00\x09" + bytes(8)
    with raises_exactly(CorruptImage, "header extension 0x00001234 claims 9 bytes, 8 remain"):
        Header.unpack(image)


@pytest.mark.parametrize("version", [0, 1, 4, (1 << 32) - 1])
def test_another_version_is_refused_by_its_number(version: int) -> None:
    image = bytearray(builders.header())
    builders.poke(image, "version", version)
    text = f"is qcow version {version}; versions 2 and 3 are known"
    with raises_exactly(UnsupportedFeature, text):
        Header.unpack(bytes(image))


def test_an_empty_file_is_no_image() -> None:
    with raises_exactly(NotQcow2, "is empty; a qcow2 image starts with its header"):
        Header.unpack(b"")


@pytest.mark.parametrize(
    ("start", "shown"),
    [(b"KDMV" + bytes(600), "4b 44 4d 56"), (b"QFI", "51 46 49"), (b"\0", "00")],
)
def test_another_kind_of_file_is_told_by_its_first_bytes(start: bytes, shown: str) -> None:
    text = (
        f"is not a qcow2 image (starts with {shown}, not 51 46 49 fb); "
        "another format can be converted: qemu-img convert -O qcow2"
    )
    with raises_exactly(NotQcow2, text):
        Header.unpack(start)


@pytest.mark.parametrize(("kind", "marked"), [(1, False), (0, True)])
def test_a_compression_type_that_contradicts_its_bit_is_damage(kind: int, marked: bool) -> None:
    bit = builders.BIT_COMPRESSION if marked else 0
    header = Header.unpack(builders.header(compression_type=kind, incompatible=bit))
    state = "set" if marked else "clear"
    text = f"compression type {kind} contradicts incompatible feature bit 3 ({state})"
    with raises_exactly(CorruptImage, text):
        header.check_supported()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"crypt_method": 3}, "encryption method 3 is unknown"),
        ({"compression_type": 2, "incompatible": 8}, "compression type 2 is unknown"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(fields: dict[str, int], text: str) -> None:
    header = Header.unpack(builders.header(**fields))
    with raises_exactly(UnsupportedFeature, text):
        header.check_supported()
