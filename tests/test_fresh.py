"""An image written in one pass: whatever comes, it is clean, and every cluster is where it was put."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowfs.check import check
from qcowfs.copying.fresh import FreshImage
from qcowfs.creation.form import Creation
from qcowfs.disk.image import Image
from qcowfs.metadata.mapping import COMPRESSED_KIND, DATA, ZERO_KIND
from qcowfs.testing import MemoryHostFile
from tests.memory import open_bytes

SIZE = 600 << 9
KINDS = st.sampled_from(["data", "compressed", "compressed", "zeros"])
STEPS = st.lists(
    st.tuples(
        st.integers(0, 9), st.integers(1, 12), st.sampled_from(["data", "compressed", "compressed", "zeros"])
    ),
    max_size=30,
)


async def written(image: FreshImage) -> MemoryHostFile:
    file = MemoryHostFile(b"")
    await file.write_from(image.finish())
    file.data += bytes(image.end - len(file.data))
    return file


@pytest.mark.parametrize("bits", ["1", "2", "16", "64"])
@settings(max_examples=40)
@given(steps=STEPS, data=st.data())
async def test_every_cluster_is_counted_and_found(
    bits: str, steps: list[tuple[int, int, str]], data: st.DataObject
) -> None:
    form = Creation.from_words({"cluster_size": "512", "refcount_bits": bits})
    fresh, guest, placed = FreshImage(form, SIZE), 0, []
    for skipped, count, kind in steps:
        guest += skipped * 512
        if guest + count * 512 > SIZE:
            break
        if kind == "data":
            placed.append((guest, DATA, fresh.place_data(guest, count * 512)))
            guest += count * 512
        elif kind == "zeros":
            fresh.place_zeros(guest, count * 512)
            placed.append((guest, ZERO_KIND, 0))
            guest += count * 512
        else:
            length = data.draw(st.integers(1, 511))
            placed.append((guest, COMPRESSED_KIND, fresh.place_compressed(guest, length)))
            guest += 512
    file = await written(fresh)
    report = await check(file)
    assert (report.errors, report.leaks) == ([], [])
    image: Image = await open_bytes(bytes(file.data))
    for start, expected, host in placed:
        [extent] = await image.active.mapping.resolve(start, 512)
        assert (extent.kind, extent.host_offset) == (expected, host)
    image.close()


async def test_tables_come_as_they_are_complete() -> None:
    fresh = FreshImage(Creation.from_words({"cluster_size": "512"}), SIZE)
    fresh.place_data(0, 512)
    assert fresh.take_writes() == []
    fresh.place_data(64 * 512, 512)
    assert [len(data) for _, data in fresh.take_writes()] == [512]


async def test_an_empty_disk_is_an_image_too() -> None:
    fresh = FreshImage(Creation.from_words({}), 0)
    report = await check(await written(fresh))
    assert report.is_clean
