"""The verifier finds nothing in sound images, and each kind of damage."""

from __future__ import annotations

import pytest

from qcowfs.check import Finding, Kind, check
from qcowfs.check.checker import inspect
from qcowfs.check.findings import MOST_LISTED
from qcowfs.testing import MemoryHostFile
from tests.asserting import little_memory
from tests.host_files import place_of_entry, poke_word, word
from tests.shapes import DISK, Shape, make

C = 512
COPIED, ZERO = 1 << 63, 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
PLAIN = Shape(cluster_size=C, size=200 << 10, bulk=40 * C, filled=False)
BIG = Shape(bulk=65536, filled=False)
FULL = Shape(cluster_size=C, size=200 << 10, snapshot=True)


def image(shape: Shape = PLAIN) -> bytearray:
    return bytearray(make(shape).files[DISK])


async def found(data: bytearray) -> tuple[list[str], list[str]]:
    report = await check(MemoryHostFile(bytes(data)))
    assert report.is_clean == (not report.errors and not report.leaks)
    return report.errors, report.leaks


def count_at(data: bytearray, host: int) -> int:
    """Where the 16-bit count of a host offset lies."""
    block = word(data, word(data, 48) + host // C // 256 * 8)
    return block + host // C % 256 * 2


@pytest.mark.parametrize(
    "shape",
    [
        PLAIN,
        FULL,
        Shape(),
        Shape(version=2, snapshot=True),
        Shape(extended_l2=True, snapshot=True),
        Shape(refcount_bits=1),
        Shape(encryption="luks"),
        Shape(refcount_bits=64, snapshot=True, base=5000),
    ],
)
async def test_what_qemu_made_is_clean(shape: Shape) -> None:
    data = image(shape)
    assert await found(data) == ([], [])
    subject = (await inspect(MemoryHostFile(bytes(data)))).subject
    assert int(subject.references.sum()) * shape.cluster_size >= len(data) // 2


@pytest.mark.parametrize("which", ["header", "L1", "L2", "table", "block", "data"])
async def test_a_count_that_is_too_low_or_too_high_is_found(which: str) -> None:
    data = image()
    entry = place_of_entry(data, C)
    hosts = {
        "header": 0, "L1": word(data, 40), "L2": entry // C * C, "table": word(data, 48),
        "block": word(data, word(data, 48)), "data": word(data, entry) & OFFSET_MASK,
    }  # fmt: skip
    host = hosts[which]
    poke_word(data, count_at(data, host), 0, 2)
    errors, leaks = await found(data)
    assert f"host offset {host:#x}: refcount 0, references 1" in errors
    assert leaks == []
    poke_word(data, count_at(data, host), 3, 2)
    errors, leaks = await found(data)
    assert leaks == [f"host offset {host:#x}: refcount 3, references 1"]
    assert bool(errors) == (which in ("L2", "data"))  # those have a COPIED flag


async def test_a_cluster_that_nothing_names_is_a_leak() -> None:
    data = image()
    place = place_of_entry(data, C)
    host = word(data, place) & OFFSET_MASK
    poke_word(data, place, 0)
    assert await found(data) == ([], [f"host offset {host:#x}: refcount 1, references 0"])


async def test_a_cluster_that_two_entries_name_is_an_error() -> None:
    data = image()
    first, second = place_of_entry(data, C), place_of_entry(data, 2 * C)
    host, lost = word(data, first) & OFFSET_MASK, word(data, second) & OFFSET_MASK
    poke_word(data, second, word(data, first))
    errors, leaks = await found(data)
    assert errors == [f"host offset {host:#x}: refcount 1, references 2"]
    assert leaks == [f"host offset {lost:#x}: refcount 1, references 0"]


@pytest.mark.parametrize("level", ["L1", "L2"])
async def test_a_missing_flag_is_found(level: str) -> None:
    data = image()
    entry = place_of_entry(data, C)
    place = entry if level == "L2" else word(data, 40)
    host = word(data, place) & OFFSET_MASK
    poke_word(data, place, host)
    owner, guest, what = (
        ("live disk", C, "cluster") if level == "L2" else ("live disk, L1 table", 0, "L2 table")
    )
    assert await found(data) == (
        [
            (
                f"{owner}, guest offset {guest:#x}, host offset {host:#x}, entry at {place:#x} ({host:#x}): "
                f"lacks the COPIED flag, but its {what}'s refcount is 1"
            )
        ],
        [],
    )


async def test_a_flag_on_a_shared_cluster_is_found() -> None:
    data = image()
    entry = word(data, place_of_entry(data, C))
    poke_word(data, count_at(data, entry & OFFSET_MASK), 2, 2)
    errors, _ = await found(data)
    assert errors == [at(data, C, entry) + "has the COPIED flag, but its cluster's refcount is not 1"]


def at(data: bytearray, guest: int, entry: int) -> str:
    """How a finding names the entry of a guest offset."""
    place, host = place_of_entry(data, guest), entry & OFFSET_MASK
    return f"live disk, guest offset {guest:#x}, host offset {host:#x}, entry at {place:#x} ({entry:#x}): "


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (1 << 40, "the cluster lies past the end of the file"),
        (COPIED | 0x1201, "the cluster is not cluster aligned"),
        (COPIED, "the COPIED flag without a cluster"),
        (1 << 40 | ZERO, "the cluster lies past the end of the file"),
        (ZERO | 2, "reserved bits are set"),
        (0, ""),
    ],
)
async def test_a_broken_entry_is_found(entry: int, rule: str) -> None:
    data = image(BIG)
    if entry & 0x200:
        entry &= ~ZERO
    place = word(data, word(data, 40)) & OFFSET_MASK
    poke_word(data, place, entry)
    errors, leaks = await found(data)
    host = entry & OFFSET_MASK
    named = f"live disk, guest offset 0x0, host offset {host:#x}, entry at {place:#x} ({entry:#x}): "
    assert errors == ([named + rule] if rule else [])
    assert len(leaks) == 1


@pytest.mark.parametrize(
    ("offset", "rule"),
    [
        (0, "the compressed cluster overlaps the header"),
        (1 << 40, "the compressed cluster lies past the end of the file"),
    ],
)
async def test_a_broken_compressed_entry_is_found(offset: int, rule: str) -> None:
    data = image()
    poke_word(data, place_of_entry(data, C), COPIED | 1 << 62 | offset)
    errors, _ = await found(data)
    named = f"live disk, guest offset 0x200, host offset {offset:#x}, "
    rules = {line.rpartition(": ")[2] for line in errors if line.startswith(named)}
    assert rules == {"a compressed cluster has the COPIED flag", rule}


async def test_tables_and_blocks_have_to_be_aligned_and_in_the_file() -> None:
    data = image(BIG)
    l1, table = word(data, 40), word(data, 48)
    for offset, rule in ((0x1200, "is not cluster aligned"), (1 << 40, "lies past the end of the file")):
        poke_word(data, l1, COPIED | offset)
        poke_word(data, table + 8, offset)
        report = await check(MemoryHostFile(bytes(data)))
        assert report.hidden
        assert [line for line in report.errors if "refcount block" in line] == [
            (
                f"refcount table, host offset {offset:#x}, entry at {table + 8:#x} ({offset:#x}): "
                f"the refcount block {rule}"
            )
        ]
        assert [line for line in report.errors if "L2 table" in line] == [
            (
                f"live disk, L1 table, guest offset 0x0, host offset {offset:#x}, entry at {l1:#x} "
                f"({COPIED | offset:#x}): the L2 table {rule}"
            )
        ]


@pytest.mark.parametrize("which", ["header", "L1", "L2", "table", "block", "snapshots", "other L1"])
async def test_data_over_metadata_is_found_even_where_the_counts_agree(which: str) -> None:
    data = image(Shape(cluster_size=C, size=200 << 10, bulk=40 * C, filled=False, snapshot=True))
    entry = place_of_entry(data, 0)  # in a table that both trees share
    snapshots = word(data, 64)
    hosts = {
        "header": (0, "the header"), "L1": (word(data, 40), "an L1 table"),
        "L2": (entry // C * C, "an L2 table"), "table": (word(data, 48), "the refcount table"),
        "block": (word(data, word(data, 48)), "a refcount block"),
        "snapshots": (snapshots, "the snapshot table"), "other L1": (word(data, snapshots), "an L1 table"),
    }  # fmt: skip
    host, name = hosts[which]
    count = count_at(data, host)
    poke_word(data, count, word(data, count, 2) + 2, 2)
    poke_word(data, entry, host or 1 << 62)
    errors, _ = await found(data)
    assert any(line.endswith(f"cluster overlaps {name}") for line in errors)
    assert not any(line.startswith(f"host offset {host:#x}: refcount") for line in errors)


async def test_a_block_beyond_all_files_is_named_by_its_place() -> None:
    data = image(BIG)
    table, offset = word(data, 48), 1 << 63 | 1 << 20
    poke_word(data, table + 8, offset)
    report = await check(MemoryHostFile(bytes(data)))
    where = f"host offset {offset:#x}, entry at {table + 8:#x} ({offset:#x})"
    assert [line for line in report.errors if "refcount block" in line] == [
        f"refcount table, {where}: the refcount block lies past the end of the file"
    ]


async def test_an_l2_table_on_other_metadata_is_no_table() -> None:
    data = image()
    poke_word(data, word(data, 40), COPIED | word(data, 48))
    report = await check(MemoryHostFile(bytes(data)))
    assert report.hidden
    assert report.errors[0].endswith("the L2 table overlaps the refcount table")


async def test_the_zero_flag_is_an_error_in_version_2() -> None:
    data = image(Shape(cluster_size=C, size=200 << 10, version=2, bulk=40 * C, filled=False))
    place = place_of_entry(data, C)
    entry = word(data, place) | ZERO
    poke_word(data, place, entry)
    assert await found(data) == ([at(data, C, entry) + "the zero flag, which version 2 does not know"], [])


@pytest.mark.parametrize("bitmap", [1 << 32 | 1, 1 << 35 | 1 << 3])
async def test_a_subcluster_that_is_both_allocated_and_zero_is_found(bitmap: int) -> None:
    data = image(Shape(extended_l2=True, bulk=65536, filled=False))
    l2_table = word(data, word(data, 40)) & OFFSET_MASK
    poke_word(data, l2_table + 8, bitmap)
    [error], leaks = await found(data)
    assert error.endswith(": a subcluster is marked both allocated and zero")
    assert leaks == []


async def test_allocated_subclusters_need_a_cluster() -> None:
    data = image(Shape(extended_l2=True, bulk=65536, filled=False))
    l2_table = word(data, word(data, 40)) & OFFSET_MASK
    poke_word(data, l2_table, 0)
    [error], [leak] = await found(data)
    assert error.endswith(": subclusters are allocated but the cluster has no offset")
    assert leak.endswith(": refcount 1, references 0")


async def test_a_cluster_that_does_not_inflate_is_found_when_asked_for() -> None:
    data = image(Shape())
    table = word(data, word(data, 40)) & OFFSET_MASK
    words = [word(data, table + 8 * n) for n in range(12)]
    packed = next(n for n, entry in enumerate(words) if entry >> 62 == 1)
    host = words[packed] & (1 << 54) - 1
    data[host : host + 8] = b"\xff" * 8
    assert await found(data) == ([], [])
    report = await check(MemoryHostFile(bytes(data)), data=True)
    [finding] = report.findings
    assert (finding.kind, finding.guest, finding.host) == (Kind.LOST, packed * 65536, host)
    assert finding.rule.startswith("compressed cluster ")


async def test_memory_is_bounded_by_the_file_whatever_its_pointers_say() -> None:
    data = image()
    poke_word(data, place_of_entry(data, C), COPIED | 1 << 55)
    poke_word(data, place_of_entry(data, 2 * C), 1 << 62 | (1 << 61) - 1)
    poke_word(data, word(data, 48) + 16, 1 << 62)
    with little_memory(4 << 20):
        errors, _ = await found(data)
    assert len([line for line in errors if "past the end" in line]) == 3


async def test_what_is_found_a_million_times_is_listed_a_thousand_times() -> None:
    data = image(Shape(cluster_size=C, size=200 << 10, bulk=200 << 10, filled=False))
    table = word(data, 48)
    data[word(data, table) : word(data, table) + C] = bytes(C)
    data[word(data, table + 8) : word(data, table + 8) + C] = bytes(C)
    report = await check(MemoryHostFile(bytes(data)))
    assert report.totals[Kind.ERROR] > 800  # each cluster, and each flag
    assert len(report.findings) < report.totals[Kind.ERROR]
    report.add_many(Kind.LEAK, (Finding(Kind.LEAK, "x") for _ in range(2000)), 2000)
    assert (len(report.leaks), report.totals[Kind.LEAK]) == (MOST_LISTED, 2000)


async def test_a_damaged_snapshot_table_is_an_error() -> None:
    data = image(FULL)
    poke_word(data, word(data, 64), 0x123)
    report = await check(MemoryHostFile(bytes(data)))
    assert report.hidden
    assert 'snapshot "1", host offset 0x123: ' in report.errors[0]
