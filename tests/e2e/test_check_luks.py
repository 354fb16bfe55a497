"""A check holds a LUKS area to the bounds that opening it has; arguments that no call can use are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.tools import create, qcowfs

STRIPES, ITERATIONS, PLACE, SLOT = 44, 4, 40, 48


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (STRIPES, 1, "stripes"),
        (STRIPES + 5 * SLOT, 4001, "key slot 5 has 4001 stripes"),
        (ITERATIONS, 0xFFFFFFFF, "iterations"),
        (PLACE, 0, "overlaps the header"),
    ],
)
def test_a_luks_area_that_cannot_be_opened_is_not_called_sound(
    encrypted_images: dict[str, Path], tmp_path: Path, field: int, value: int, rule: str
) -> None:
    image = tmp_path / "image.qcow2"
    shutil.copyfile(encrypted_images["luks"], image)
    assert qcowfs("check", image).returncode == 0
    data = bytearray(image.read_bytes())
    slot = data.index(b"LUKS\xba\xbe") + 208 + field
    data[slot : slot + 4] = value.to_bytes(4, "big")
    image.write_bytes(data)
    result = qcowfs("check", image)
    assert (result.returncode, rule in result.stdout) == (2, True), result.stdout


@pytest.mark.parametrize("option", [("--key-fd", "77"), ("--key-fd", "-1")])
def test_a_descriptor_that_is_not_open_is_wrong_usage(tmp_path: Path, option: tuple[str, str]) -> None:
    image = create(tmp_path / "image.qcow2", 512)
    result = qcowfs("compare", *option, image, image)
    assert (result.returncode, "file descriptor" in result.stderr) == (2, True), result.stderr


def test_an_owner_that_is_no_number_of_one_is_wrong_usage(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 512)
    result = qcowfs("mount", image, tmp_path, "--uid=-5")
    assert (result.returncode, "-5 is outside 0..4294967294" in result.stderr) == (2, True), result.stderr
