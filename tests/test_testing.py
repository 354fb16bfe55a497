"""The host file in memory behaves as one of the operating system does."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.host.hostfile import HostFile, OsHostFile
from qcowfs.testing import MemoryHostFile


async def read_at(file: HostFile, *places: tuple[int, int]) -> list[bytes]:
    buffers = [bytearray(b"\xa5" * length) for _, length in places]
    await file.read_into([(at, memoryview(b)) for (at, _), b in zip(places, buffers, strict=True)])
    return [bytes(b) for b in buffers]


@given(st.binary(max_size=30), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4))
async def test_both_kinds_of_file_read_the_same(data: bytes, places: list[tuple[int, int]]) -> None:
    fd = os.memfd_create("real")
    os.write(fd, data)
    file = OsHostFile("real", fd)
    try:
        expected = await read_at(file, *places)
    finally:
        file.close()
    assert await read_at(MemoryHostFile(data), *places) == expected
    assert expected == [data[at : at + n].ljust(n, b"\0") for at, n in places]


@pytest.mark.parametrize(
    ("start", "length", "fails"),
    [
        (0, 10, False),
        (5, 6, True),
        (10, 1, True),
        (19, 5, True),
        (20, 10, False),
        (0, 40, True),
    ],
)
async def test_reads_that_touch_a_bad_range_fail(start: int, length: int, fails: bool) -> None:
    file = MemoryHostFile(bytes(30), "bad disk")
    file.fail_reads(10, 10)
    if fails:
        with pytest.raises(OSError, match="bad disk") as caught:
            await read_at(file, (start, length))
        assert caught.value.errno == errno.EIO
    else:
        assert await read_at(file, (start, length)) == [bytes(length)]


def test_each_file_has_an_identity_of_its_own() -> None:
    first, second = MemoryHostFile(b"", mtime_ns=5), MemoryHostFile(b"")
    assert first.facts().identity == first.facts().identity != second.facts().identity
    assert (first.facts().mtime_ns, first.facts().regular) == (5, True)


def test_the_contents_are_a_copy_that_may_be_changed() -> None:
    original = bytearray(b"abc")
    file = MemoryHostFile(bytes(original))
    file.data += b"def"
    assert (bytes(original), file.facts().size) == (b"abc", 6)


def test_closing_is_noted() -> None:
    file = MemoryHostFile(b"")
    assert not file.closed
    file.close()
    assert file.closed
