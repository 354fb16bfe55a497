"""Backing chains that lie wholly in memory: sizes, depths, loops, and what the policy refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest

from qcowfs.data.backing import BackingPolicy
from qcowfs.disk.image import Image, OpenOptions
from qcowfs.errors import BackingFileError, UnsupportedFeature
from tests.asserting import raises_exactly
from tests.builders import BACKING_FORMAT, BIT_DATA_FILE, ImageBuilder, deflate, extension, snapshot_record
from tests.memory import FOLDER, MemoryFolder, read

C = 512
PROBE = OpenOptions(backing=BackingPolicy(probe=True))


def overlay(size: int, below: bytes, declared: bytes | None = b"qcow2") -> ImageBuilder:
    """An empty image above a backing file."""
    extensions = b"" if declared is None else extension(BACKING_FORMAT, declared)
    return ImageBuilder(size, backing_name=below, extensions=extensions)


def filled(size: int, letter: bytes) -> ImageBuilder:
    """An image without backing file where every cluster is written."""
    image = ImageBuilder(size)
    for guest in range(0, size, C):
        image.normal(guest, letter * C)
    return image


async def chain(*images: bytes, options: OpenOptions | None = None) -> Image:
    """Open the first of some images that are called a, b, c and so on."""
    files = dict(zip("abcdefgh", images, strict=False))
    return await MemoryFolder(files).image("a", options)


async def test_an_overlay_shows_its_backing_file_where_it_holds_nothing() -> None:
    top = overlay(4 * C, b"b")
    top.normal(C, b"t" * C)
    top.zero_plain(2 * C)
    disk = await chain(top.build(), filled(4 * C, b"b").build())
    assert await read(disk, 0, 4 * C) == b"b" * C + b"t" * C + bytes(C) + b"b" * C
    assert disk.backing is not None
    assert disk.backing.label == "/images/b (backing file of /images/a)"


async def test_an_overlay_larger_than_its_backing_file_is_zeros_beyond_it() -> None:
    disk = await chain(overlay(100 * C, b"b").build(), filled(2 * C, b"b").build())
    assert await read(disk, C, 99 * C) == b"b" * C + bytes(98 * C)


async def test_an_overlay_smaller_than_its_backing_file_hides_the_rest() -> None:
    disk = await chain(overlay(2 * C, b"b").build(), filled(9 * C, b"b").build())
    assert disk.size == 2 * C
    assert await read(disk, C, 3 * C) == b"b" * C + bytes(2 * C)


@pytest.mark.parametrize("size", [0, 1, C - 1, C + 1, 3 * C])
async def test_a_raw_backing_file_may_have_any_size(size: int) -> None:
    disk = await chain(overlay(3 * C, b"b", b"raw").build(), b"r" * size)
    assert await read(disk, 0, 3 * C) == (b"r" * size).ljust(3 * C, b"\0")


async def test_a_raw_backing_file_is_not_looked_into() -> None:
    image = filled(2 * C, b"x").build()
    disk = await chain(overlay(2 * C, b"b", b"raw").build(), image)
    assert await read(disk, 0, 2 * C) == image[: 2 * C]


async def test_three_levels_each_show_through_the_holes_above() -> None:
    top, middle = overlay(4 * C, b"b"), overlay(3 * C, b"c")
    top.normal(0, b"t" * C)
    middle.compressed(C, deflate(b"m" * C))
    disk = await chain(top.build(), middle.build(), filled(4 * C, b"b").build())
    assert await read(disk, 0, 4 * C) == b"t" * C + b"m" * C + b"b" * C + bytes(C)


async def test_subclusters_show_the_backing_file_one_by_one() -> None:
    size = 1 << 14
    top = ImageBuilder(size, cluster_bits=14, extended_l2=True, backing_name=b"b")
    top.extensions = extension(BACKING_FORMAT, b"raw")
    top.subclusters(0, b"t" * size, 1 << 1 | 1 << 34)
    disk = await chain(top.build(), b"b" * size)
    expected = b"b" * C + b"t" * C + bytes(C) + b"b" * (size - 3 * C)
    assert await read(disk, 0, size) == expected


async def test_a_snapshot_falls_through_to_the_backing_file_too() -> None:
    top = overlay(2 * C, b"b")
    tree = top.new_tree(1)
    top.normal(0, b"t" * C)
    top.normal(C, b"s" * C, tree)
    top.snapshots.append(snapshot_record(b"1", b"s", l1_offset=tree.offset, l1_size=1))
    disk = await chain(top.build(), filled(2 * C, b"b").build())
    view = disk.snapshot_view(disk.snapshots[0])
    assert await read(view, 0, 2 * C) == b"b" * C + b"s" * C


async def test_names_are_relative_to_the_folder_of_the_image_that_holds_them() -> None:
    files = {
        "a": overlay(C, b"sub/b").build(),
        "sub/b": overlay(C, b"../c", b"raw").build(),
        "c": b"c" * C,
    }
    assert await read(await MemoryFolder(files).image("a"), 0, C) == b"c" * C


@pytest.mark.parametrize("name", [b"file:b", b"./b", b"/images/b"])
async def test_ways_to_name_a_file_are_followed(name: bytes) -> None:
    disk = await chain(overlay(C, name, b"raw").build(), b"b" * C)
    assert await read(disk, 0, C) == b"b" * C


async def test_a_colon_behind_a_folder_belongs_to_the_file_name() -> None:
    folder = MemoryFolder({"a": overlay(C, b"./nbd:b", b"raw").build(), "nbd:b": b"b" * C})
    assert await read(await folder.image("a"), 0, C) == b"b" * C


# -- refusals


async def refused(folder: MemoryFolder, text: str, options: OpenOptions | None = None) -> None:
    """Assert that opening "a" is refused in its name, and that nothing stays open."""
    with raises_exactly(BackingFileError, f"/images/a: {text}"):
        await folder.image("a", options)
    assert folder.left_open() == []


async def test_an_image_that_is_its_own_backing_file_is_refused() -> None:
    folder = MemoryFolder({"a": overlay(C, b"a").build()})
    await refused(folder, "the backing file /images/a is already part of the chain: a loop")


async def test_a_loop_is_found_by_identity_however_it_is_named() -> None:
    folder = MemoryFolder({"a": overlay(C, b"b").build(), "b": overlay(C, b"./alias").build()})
    folder.files["alias"] = folder.files["a"]
    where = "/images/b (backing file of /images/a)"
    text = f"{where}: the backing file /images/alias is already part of the chain: a loop"
    with raises_exactly(BackingFileError, text):
        await folder.image("a")
    assert folder.left_open() == []


def deep(depth: int) -> MemoryFolder:
    """A chain of images that are called a, 1, 2 and so on, `depth` of them below the first."""
    names = ["a", *map(str, range(1, depth + 1))]
    files = {n: overlay(C, below.encode()).build() for n, below in pairwise(names)}
    return MemoryFolder(files | {names[-1]: filled(C, b"z").build()})


async def test_a_chain_of_200_backing_files_is_read() -> None:
    folder = deep(200)
    disk = await folder.image("a")
    assert await read(disk, 0, C) == b"z" * C
    assert await disk.allocated_bytes() == C
    disk.close()
    assert folder.left_open() == []


async def test_a_deeper_chain_is_refused() -> None:
    folder = deep(201)
    with pytest.raises(BackingFileError, match=r"the backing chain is deeper than 200 images$"):
        await folder.image("a")
    assert folder.left_open() == []


async def test_no_backing_refuses_even_a_sound_backing_file() -> None:
    folder = MemoryFolder({"a": overlay(C, b"b").build(), "b": filled(C, b"b").build()})
    options = OpenOptions(backing=BackingPolicy(refuse_all=True))
    await refused(folder, 'wants the backing file "b", which --no-backing refuses', options)
    assert folder.opened == ["a"]


UNDECLARED = (
    'does not declare the format of its backing file "b"; declare it with qcowfs rebase -u -F FORMAT '
    "-b FILE, or trust the file's content with --probe-backing"
)


async def test_an_undeclared_format_is_refused() -> None:
    folder = MemoryFolder({"a": overlay(C, b"b", None).build(), "b": filled(C, b"b").build()})
    await refused(folder, UNDECLARED)
    assert folder.opened == ["a"]


async def test_probing_finds_qcow2_and_raw() -> None:
    top = overlay(C, b"b", None).build()
    assert await read(await chain(top, filled(C, b"q").build(), options=PROBE), 0, C) == b"q" * C
    assert await read(await chain(top, b"r" * C, options=PROBE), 0, C) == b"r" * C
    assert await read(await chain(top, b"", options=PROBE), 0, C) == bytes(C)


@pytest.mark.parametrize(
    ("start", "found"),
    [(b"KDMV", "vmdk"), (b"conectix", "vpc"), (b"vhdxfile", "vhdx"), (b"QED\0", "qed")],
)
async def test_probing_refuses_other_known_formats(start: bytes, found: str) -> None:
    folder = MemoryFolder({"a": overlay(C, b"b", None).build(), "b": start + bytes(C)})
    await refused(folder, f"wants the backing file /images/b, which is a {found} image", PROBE)


@pytest.mark.parametrize(
    ("declared", "shown"),
    [(b"vmdk", '"vmdk"'), (b"QCOW2", '"QCOW2"'), (b"", '""'), (b"\x1b\xff", '"\\x1b\\xff"')],
)
async def test_other_declared_formats_are_refused(declared: bytes, shown: str) -> None:
    folder = MemoryFolder({"a": overlay(C, b"b", declared).build(), "b": b"KDMV"})
    text = f"wants a backing file of format {shown}; qcow2 and raw are supported"
    await refused(folder, text)
    await refused(folder, text, PROBE)


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"file"}', "nbd:localhost:10809", "nbd://host/export", "http://host/a",
        "https://host/a", "fat:rw:/etc", "host_device:/dev/sda", "host_cdrom:/dev/sr0", "ssh://host/a",
        "rbd:pool/image", "blkdebug::b", "null-co://", "NBD:unix:/s", "file:json:{}", "file:nbd:host",
        "nvme://0000/1", "x+y.z-1:b",
    ],
)  # fmt: skip
async def test_names_of_qemus_mini_language_are_refused(name: str) -> None:
    folder = MemoryFolder({"a": overlay(C, name.encode(), b"raw").build(), name: b"bait"})
    shown = f'"{name}"'
    await refused(folder, f"wants the backing file {shown}; only names of files are followed")
    assert folder.opened == ["a"]


@pytest.mark.parametrize(("name", "shown"), [(b"", '""'), (b"file:", '"file:"'), (b"a\0b", '"a\\x00b"')])
async def test_what_is_no_file_name_is_refused(name: bytes, shown: str) -> None:
    folder = MemoryFolder({"a": overlay(C, name, b"raw").build()})
    await refused(folder, f"names {shown} as backing file, which is no file name")


async def test_a_missing_backing_file_is_told_by_name_and_path() -> None:
    folder = MemoryFolder({"a": overlay(C, b"sub/gone", b"raw").build()})
    where = "looked for at /images/sub/gone: No such file or directory"
    await refused(folder, f'wants the backing file "sub/gone", {where}')


async def test_an_image_below_that_needs_a_feature_is_refused_in_its_own_name() -> None:
    below = ImageBuilder(C, fields={"incompatible": BIT_DATA_FILE})
    folder = MemoryFolder({"a": overlay(C, b"b").build(), "b": below.build()})
    with pytest.raises(UnsupportedFeature, match=r"^/images/b \(backing file of /images/a\): keeps its data"):
        await folder.image("a", OpenOptions())
    assert folder.left_open() == []


async def test_an_image_in_a_folder_whose_name_is_no_utf8_may_have_a_backing_file() -> None:
    name = "f\udcff/a"  # how Python writes the byte ff of a path
    folder = MemoryFolder({name: overlay(C, b"b", b"raw").build(), "f\udcff/b": b"b" * C})
    disk = await Image.open(FOLDER / name, OpenOptions(open_host=folder.open))
    assert await read(disk, 0, C) == b"b" * C
