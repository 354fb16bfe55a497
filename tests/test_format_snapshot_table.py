"""Snapshot records survive unpacking and packing, and their limits are refused by name."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.errors import CorruptImage
from qcowfs.format.snapshot_table import FIXED_SIZE, Snapshot, record_length, unpack_record
from qcowfs.geometry import Geometry
from tests import builders
from tests.asserting import raises_exactly

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
SNAPSHOTS = st.builds(
    Snapshot, U64, U32, st.binary(max_size=40), st.binary(max_size=300), U32, U32, U64, U32,
    st.binary(max_size=1024),
)  # fmt: skip


@given(SNAPSHOTS, st.binary(max_size=80), st.binary(max_size=80))
def test_a_packed_record_unpacks_to_itself(snapshot: Snapshot, before: bytes, after: bytes) -> None:
    record = snapshot.pack()
    table = before + record + after
    assert record_length(table, len(before)) == len(record)
    assert unpack_record(table, len(before)) == snapshot
    assert unpack_record(record, 0).pack() == record


def test_every_field_is_where_the_format_puts_it() -> None:
    record = builders.snapshot_record(
        b"12", b"name", l1_offset=0x50000, l1_size=3, sec=1, nsec=2, clock=3, vm_state=4, extra=b"\1" * 16
    )
    expected = Snapshot(0x50000, 3, b"12", b"name", 1, 2, 3, 4, b"\1" * 16)
    assert unpack_record(record, 0) == expected
    assert expected.pack() == record
    assert expected.date_ns == 1_000_000_002


@pytest.mark.parametrize("size", [65535, 0])
def test_id_and_name_may_be_as_long_as_their_fields_count(size: int) -> None:
    record = builders.snapshot_record(b"i" * size, b"n" * size)
    snapshot = unpack_record(record, 0)
    assert (snapshot.id, snapshot.name) == (b"i" * size, b"n" * size)
    assert record_length(record, 0) == len(record)


@pytest.mark.parametrize(
    ("extra", "vm_state", "disk_size", "icount"),
    [
        (b"", 7, None, None),
        (b"\xff" * 7, 7, None, None),
        (bytes(7) + b"\x09", 9, None, None),
        (bytes(7) + b"\x09" + (513).to_bytes(8, "big"), 9, 512, None),
        (bytes(16) + (5).to_bytes(8, "big"), 0, 0, 5),
        (bytes(16) + b"\xff" * 8, 0, 0, None),
        (bytes(16) + b"\xff" * 7 + b"\xfe" + b"later fields", 0, 0, (1 << 64) - 2),
    ],
)
def test_extra_data_may_hold_more_and_more_fields(
    extra: bytes, vm_state: int, disk_size: int | None, icount: int | None
) -> None:
    snapshot = unpack_record(builders.snapshot_record(b"1", b"n", vm_state=7, extra=extra), 0)
    assert (snapshot.vm_state_size, snapshot.disk_size, snapshot.icount) == (vm_state, disk_size, icount)


@pytest.mark.parametrize("length", [0, 1, FIXED_SIZE - 1])
def test_a_record_whose_fixed_part_is_incomplete_has_no_length_yet(length: int) -> None:
    assert record_length(bytes(length), 0) is None


@pytest.mark.parametrize("size", [1025, 1 << 31, (1 << 32) - 1])
def test_too_much_extra_data_is_refused(size: int) -> None:
    record = bytearray(builders.snapshot_record(b"1", b"n"))
    record[36:40] = size.to_bytes(4, "big")
    with raises_exactly(CorruptImage, f"snapshot table: extra data of {size} bytes, over 1024"):
        record_length(bytes(record), 0)


GEOMETRY = Geometry(16)
SOUND = Snapshot(0x50000, 2, b"1", b"n", 0, 0, 0, 0)
LAST = (1 << 63) - (1 << 16)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"l1_size": (32 << 17) + 1}, "L1 table of 33554440 bytes, over 33554432"),
        ({"l1_table_offset": 0x50008}, "L1 table at offset 0x50008 is not cluster aligned"),
        ({"l1_table_offset": LAST, "l1_size": 1 << 13}, f"L1 table at {LAST:#x} ends beyond 2^63"),
        ({"l1_table_offset": (1 << 64) - (1 << 16)}, "L1 table at 0xffffffffffff0000 ends beyond 2^63"),
        ({"l1_size": 1}, "L1 table of 1 entries is short of its size"),
    ],
)
def test_an_l1_table_that_breaks_a_limit_is_refused(fields: dict[str, int], text: str) -> None:
    snapshot = replace(SOUND, id=b"7\xff", **fields)  # type: ignore[arg-type]  # only the numbers vary
    with raises_exactly(CorruptImage, f"snapshot id 7\\xff: {text}"):
        snapshot.check(GEOMETRY, (1 << 29) + 512)


@pytest.mark.parametrize("fields", [{"l1_size": 32 << 17}, {"l1_table_offset": LAST}, {"l1_table_offset": 0}])
def test_an_l1_table_at_a_limit_is_accepted(fields: dict[str, int]) -> None:
    snapshot = replace(SOUND, **fields)  # type: ignore[arg-type]  # only the numbers vary
    snapshot.check(GEOMETRY, 1 << 30)
    assert snapshot.l1_size >= 2


@pytest.mark.parametrize("compat", ["v2", "v3"])
def test_records_that_qemu_wrote_are_packed_as_qemu_packs_them(compat: str, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", str(path), "1M"]
    subprocess.run(create, check=True)
    for name in ("first", "", "a/b", "ümläut"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, str(path)], check=True)
    image = path.read_bytes() + bytes(8)  # the file ends with the last name, unpadded
    at = int.from_bytes(image[64:72], "big")
    names = []
    for _ in range(4):
        snapshot = unpack_record(image, at)
        record = snapshot.pack()
        assert image[at : at + len(record)] == record
        assert record_length(image, at) == len(record)
        names.append(snapshot.name)
        at += len(record)
    assert names == [b"first", b"", b"a/b", "ümläut".encode()]
