"""Snapshots: reading the table, finding one, and the file name that each gets."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qcowfs.errors import CorruptImage, UsageError
from qcowfs.format.header import Header
from qcowfs.format.snapshot_table import Snapshot
from qcowfs.metadata.snapshots import escape, file_names, find_snapshot, load_snapshots
from qcowfs.testing import MemoryHostFile
from tests import builders
from tests.asserting import little_memory, raises_exactly
from tests.builders import snapshot_record
from tests.memory import CountedFile

TABLE_AT = 1 << 16


def named(name: bytes, id_: bytes = b"1") -> Snapshot:
    return Snapshot(0, 0, id_, name, 0, 0, 0, 0)


def numbered(names: Sequence[bytes]) -> list[Snapshot]:
    return [named(name, b"%d" % number) for number, name in enumerate(names, 1)]


# -- reading the table


def header_for(count: int, offset: int = TABLE_AT) -> Header:
    return Header.unpack(builders.header(nb_snapshots=count, snapshots_offset=offset))


async def test_every_record_is_read_in_its_order() -> None:
    records = [
        snapshot_record(b"%d" % n, b"n" * (n % 300), extra=bytes(n % 1025), l1_size=n) for n in range(600)
    ]
    file = CountedFile(bytes(TABLE_AT) + b"".join(records))
    snapshots = await load_snapshots(file, header_for(600))
    assert [s.l1_size for s in snapshots] == list(range(600))
    assert [s.name for s in snapshots] == [b"n" * (n % 300) for n in range(600)]
    assert all(len(reads) == 1 and reads[0][1] <= 65536 for reads in file.reads)


async def test_only_as_many_records_as_the_header_counts_are_read() -> None:
    data = bytes(TABLE_AT) + snapshot_record(b"1", b"a") + snapshot_record(b"2", b"b")
    assert [s.id for s in await load_snapshots(MemoryHostFile(data), header_for(1))] == [b"1"]


async def test_the_table_may_end_without_its_last_padding() -> None:
    data = bytes(TABLE_AT) + snapshot_record(b"1", b"name")[: 40 + 5]
    [snapshot] = await load_snapshots(MemoryHostFile(data), header_for(1))
    assert snapshot.name == b"name"


@pytest.mark.parametrize(
    ("table", "count", "record"),
    [
        (b"", 1, 1),
        (snapshot_record(b"1", b"a"), 1 << 16, 1639),  # zeros up to the cluster's end count
        ((snapshot_record(b"1", b"a" * 60000) * 2)[: 1 << 16], 2, 2),
    ],
)
async def test_a_table_that_is_cut_short_is_damage(table: bytes, count: int, record: int) -> None:
    text = (
        f"snapshot table at 0x10000: record {record} of {count} is cut short by the end of the file "
        "or of the 64 MiB limit"
    )
    with raises_exactly(CorruptImage, text):
        await load_snapshots(MemoryHostFile(bytes(TABLE_AT) + table), header_for(count))


async def test_a_table_past_the_end_of_the_file_is_damage() -> None:
    text = "snapshot table at 0x4000000000000000: record 1 of 3 is cut short"
    with little_memory(), pytest.raises(CorruptImage, match=f"^{text}"):
        await load_snapshots(MemoryHostFile(b"x"), header_for(3, 1 << 62))


async def test_a_record_with_too_much_extra_data_is_damage() -> None:
    record = bytearray(snapshot_record(b"1", b"a"))
    record[36:40] = b"\xff" * 4
    with raises_exactly(CorruptImage, "snapshot table: extra data of 4294967295 bytes, over 1024"):
        await load_snapshots(MemoryHostFile(bytes(TABLE_AT) + record), header_for(1))


# -- finding a snapshot


def test_an_id_is_found_before_a_name() -> None:
    snapshots = [named(b"2", b"1"), named(b"x", b"2"), named(b"x", b"3")]
    assert find_snapshot(snapshots, "2").id == b"2"
    assert find_snapshot(snapshots, "x").id == b"2"
    assert find_snapshot(snapshots, "1").name == b"2"


def test_a_name_that_is_no_utf8_is_found_as_python_writes_it() -> None:
    assert find_snapshot([named(b"\xff")], "\udcff").name == b"\xff"


@pytest.mark.parametrize(
    ("snapshots", "known"),
    [([], "none"), ([named(b"a\n"), named(b"", b"2")], '"1" "a\\x0a", "2" ""')],
)
def test_an_unknown_snapshot_is_refused_with_those_there_are(snapshots: list[Snapshot], known: str) -> None:
    with raises_exactly(UsageError, f"no snapshot has the id or name 'gone'; there are: {known}"):
        find_snapshot(snapshots, "gone")


# -- file names


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        (b"before upgrade", "before upgrade.raw"),
        ("ümläut 漢字".encode(), "ümläut 漢字.raw"),
        (b"a/b", "a%2Fb.raw"),
        (b"..", "%2E..raw"),
        (b".", "%2E.raw"),
        (b".hidden", "%2Ehidden.raw"),
        (b"100%", "100%25.raw"),
        (b"%2F", "%252F.raw"),
        (b"a\nb\x1b\0\x7f", "a%0Ab%1B%00%7F.raw"),
        (b"\xff\xc3", "%FF%C3.raw"),
        ("\x85\u202e".encode(), "%C2%85%E2%80%AE.raw"),
        (b"", "%id=1.raw"),
        (b"x" * 251, "x" * 251 + ".raw"),
        (b"x" * 252, "x" * 246 + "%id=1.raw"),
        ("漢".encode() * 84, "漢" * 82 + "%id=1.raw"),
        (b"/" * 84, "%2F" * 82 + "%id=1.raw"),
        (b"x" + "\x85".encode() * 60, "x" + "%C2%85" * 40 + "%id=1.raw"),
        (b"xx" + b"/" * 84, "xx" + "%2F" * 81 + "%id=1.raw"),
    ],
)
def test_one_snapshot_gets_its_name_escaped(name: bytes, file_name: str) -> None:
    assert file_names([named(name)]) == [file_name]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([b"a", b"a", b"a"], ["a.raw", "a%id=2.raw", "a%id=3.raw"]),
        ([b"2", b"other"], ["2.raw", "other.raw"]),
        ([b"", b""], ["%id=1.raw", "%id=2.raw"]),
        ([b"a%id=2", b"a", b"a"], ["a%25id=2.raw", "a.raw", "a%id=3.raw"]),
        ([b"x" * 300, b"x" * 400], ["x" * 246 + "%id=1.raw", "x" * 246 + "%id=2.raw"]),
    ],
)
def test_names_that_collide_are_told_apart_by_id(names: list[bytes], expected: list[str]) -> None:
    assert file_names(numbered(names)) == expected


def test_ids_that_collide_too_are_told_apart_by_position() -> None:
    assert file_names([named(b"a")] * 3) == ["a.raw", "a%id=1.raw", "a%n=3.raw"]


def test_an_id_too_long_for_a_name_gives_way_to_the_position() -> None:
    assert file_names([named(b"", b"i" * 33)]) == ["%n=1.raw"]
    assert file_names([named(b"", b"\xff" * 32)]) == ["%id=" + "%FF" * 32 + ".raw"]


ALPHABET = st.sampled_from(
    [b"a", b"%", b"/", b".", b"\0", b"\xff", b"=", b"id", b"n", "漢".encode(), b"x" * 90]
)
NAMES = st.lists(ALPHABET, max_size=6).map(b"".join) | st.binary(max_size=300)
SNAPSHOTS = st.lists(st.builds(named, NAMES, NAMES), max_size=8)


@given(SNAPSHOTS)
@example([named(b"a"), named(b"a", b""), named(b"a", b""), named(b"a%id=")])
def test_file_names_are_always_valid_and_unique(snapshots: list[Snapshot]) -> None:
    names = file_names(snapshots)
    assert len(set(names)) == len(names) == len(snapshots)
    for name in names:
        raw = name.encode()
        assert 5 <= len(raw) <= 255
        assert name.endswith(".raw")
        assert not raw.startswith(b".")
        assert not re.search(rb"[/\0]", raw)
        assert name.isprintable()


@given(SNAPSHOTS)
def test_file_names_do_not_change_from_one_mount_to_the_next(snapshots: list[Snapshot]) -> None:
    assert file_names(snapshots) == file_names(list(snapshots))


@given(SNAPSHOTS, NAMES)
def test_a_new_snapshot_does_not_rename_those_before_it(snapshots: list[Snapshot], new: bytes) -> None:
    assert file_names([*snapshots, named(new, b"9")])[:-1] == file_names(snapshots)


@given(st.binary(max_size=80))
def test_an_escaped_name_tells_the_name(name: bytes) -> None:
    unescaped = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), escape(name).encode())
    assert unescaped == name


@given(st.text(st.characters(categories=["L", "N", "Zs"]), max_size=120))
def test_shortening_never_cuts_a_character(name: str) -> None:
    [file_name] = file_names([named(name.encode())])
    kept = re.sub(r"(%id=1)?\.raw$", "", file_name)
    whole = [kept, kept[:-2]] if "%" in kept else [kept]
    assert any(escape(name.encode()).startswith(part) for part in whole)
    assert not re.search(r"%.?$", kept)
