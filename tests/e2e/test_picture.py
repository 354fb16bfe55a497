"""The picture of a disk: what it says agrees with the map, in each of its three forms."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qcowfs.disk.disks import open_disk
from qcowfs.picture.drawing import Box, Drawing, Text
from qcowfs.picture.picture import COLOURS, LABELS
from qcowfs.picture.survey import KINDS, survey
from tests.e2e.tools import KIB, MIB, create, l2_entry_at, poke_word, qcowfs, qemu_img, qemu_io


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with 1 MiB each of backing, own, shared and zero data, and 64 KiB compressed and damaged."""
    folder = tmp_path_factory.mktemp("picture")
    (folder / "base.raw").write_bytes(b"base" * (MIB // 4))
    image = create(folder / "x.qcow2", 8 * MIB, "-b", "base.raw", "-F", "raw")
    qemu_io(image, "write -q 2M 1M", "write -q -z 4M 1M", "write -q -c 6M 64k")
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write -q 1M 1M", "write -q 7M 64k")
    poke_word(image, l2_entry_at(image, 7 * MIB), 3 * 512)
    return image


async def test_a_survey_counts_each_kind_and_each_part(image: Path) -> None:
    async with open_disk(image) as disk:
        found = await survey(disk, 16)
    expected = {
        "data": MIB, "shared": MIB, "compressed": 64 * KIB, "backing": MIB, "zero": MIB, "damaged": 64 * KIB,
        "unallocated": 4 * MIB - 128 * KIB,
    }  # fmt: skip
    assert found.totals == expected
    assert found.parts.sum(axis=0).tolist() == [512 * KIB] * 16
    assert found.parts[KINDS.index("data")].nonzero()[0].tolist() == [2, 3]
    assert (found.fragments, int(found.breaks.sum())) == (2, 1)
    assert 0 < found.stored < 4096


async def test_an_empty_disk_has_a_survey_too(tmp_path: Path) -> None:
    create(tmp_path / "x.qcow2", 0)
    async with open_disk(tmp_path / "x.qcow2") as disk:
        found = await survey(disk, 16)
    assert (found.size, sum(found.totals.values()), found.fragments) == (0, 0, 0)


def test_an_svg_is_a_document_with_every_colour_and_size(image: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.svg"
    result = qcowfs("map", "--picture", picture, image)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    root = ElementTree.fromstring(picture.read_text())  # noqa: S314 - our own file
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    fills = {element.get("fill") for element in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert fills >= set(COLOURS.values())
    assert {"x.qcow2", *LABELS.values(), "1 MiB", "12.5 %"} <= set(texts)
    assert qcowfs("map", "--picture", picture, image).returncode == 2
    assert qcowfs("map", "--force", "--picture", picture, image).returncode == 0


def test_a_png_shows_as_much_of_each_colour_as_there_is(image: Path, tmp_path: Path) -> None:
    assert qcowfs("map", "--picture", tmp_path / "x.png", image).returncode == 0
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    strips = pixels[2 * 130 : 2 * 756]
    counts = {kind: _count(strips, colour) for kind, colour in COLOURS.items()}
    assert counts["data"] == pytest.approx(counts["shared"], rel=0.02)
    assert counts["backing"] == pytest.approx(counts["zero"], rel=0.02)
    assert counts["data"] == pytest.approx(16 * counts["compressed"], rel=0.1)
    assert counts["unallocated"] == pytest.approx(counts["data"] * 3.875, rel=0.02)


def _count(pixels: NDArray[np.uint8], colour: str) -> int:
    wanted = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
    return int((pixels == wanted).all(axis=2).sum())


def test_the_terminal_gets_signs_and_a_key_to_them(image: Path) -> None:
    result = qcowfs("map", "--picture", "-", image)
    lines = result.stdout.splitlines()
    assert lines[0] == "x.qcow2"
    signs = "".join(match[1] for line in lines if (match := re.match(r" *\d+(?:\.\d+)? .?i?B (\S+)$", line)))
    eighth = len(signs) // 8
    assert [signs[n * eighth + eighth // 2] for n in range(6)] == ["b", "#", "S", ".", "0", "."]
    assert "!" in signs
    assert any(line.startswith("S data shared with snapshots") and "1 MiB" in line for line in lines)


@pytest.mark.parametrize("name", ["x.jpg", "x", "svg"])
def test_other_names_of_files_are_refused(name: str, image: Path, tmp_path: Path) -> None:
    result = qcowfs("map", "--picture", tmp_path / name, image)
    assert (result.returncode, "must end in .svg or .png" in result.stderr) == (2, True)


def test_names_are_safe_in_a_document() -> None:
    drawing = Drawing(40, 40, "<a> & b", [Text(0, 10, "x < y & z", bold=True), Box(1, 1, 3, 3, "#ff0000")])
    root = ElementTree.fromstring(drawing.svg())  # noqa: S314 - our own document
    assert [element.text for element in root][0::2] == ["<a> & b", "x < y & z"]
    picture = Image.open(io.BytesIO(drawing.png()))
    assert (picture.size, picture.getpixel((4, 4))) == ((80, 80), (255, 0, 0))
