"""`qcowfs measure` gives the figures of `qemu-img measure`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.tools import MIB, create, qcowfs, qemu_img, qemu_io, raw_file

SIZED = [
    ("--size", "1G"), ("--size", "1G", "-O", "qcow2"), ("--size", "0", "-O", "qcow2"),
    ("--size", "1P", "-O", "qcow2"), ("--size", "1000001", "-O", "qcow2"),
    ("--size", "1G", "-O", "qcow2", "-o", "cluster_size=512"),
    ("--size", "1G", "-O", "qcow2", "-o", "preallocation=full"),
    ("--size", "10G", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=16k,refcount_bits=1"),
    ("--size", "3G", "-O", "qcow2", "-o", "refcount_bits=64,cluster_size=2M,preallocation=metadata"),
]  # fmt: skip


@pytest.mark.parametrize("words", SIZED, ids=" ".join)
def test_a_size_alone_is_measured_as_qemu_does(words: tuple[str, ...]) -> None:
    ours = qcowfs("measure", "--json", *words)
    assert json.loads(ours.stdout) == json.loads(qemu_img("measure", "--output=json", *words))
    assert qcowfs("measure", *words).stdout == qemu_img("measure", *words)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with a snapshot and a bitmap."""
    folder = tmp_path_factory.mktemp("measure")
    raw_file(folder / "base.raw", MIB, "measure")
    image = create(folder / "x.qcow2", 9 * MIB, "-b", "base.raw", "-F", "raw")
    qemu_io(image, "write -q 5M 70k", "write -q -z 0 100k", "write -q 8M 1M")
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write -q 3M 1M")
    qemu_img("bitmap", "--add", "-g", "512", image, "one")
    qemu_img("bitmap", "--add", image, "two")
    return image


@pytest.mark.parametrize(
    "words",
    [(), ("-O", "qcow2"), ("-O", "qcow2", "-o", "cluster_size=4k"), ("-O", "qcow2", "-l", "then")],
    ids=" ".join,
)
def test_a_source_is_measured_as_qemu_does(words: tuple[str, ...], image: Path) -> None:
    ours = json.loads(qcowfs("measure", "--json", *words, image).stdout)
    assert ours == json.loads(qemu_img("measure", "--output=json", *words, image))


def test_a_raw_source_is_measured_as_qemu_does(image: Path) -> None:
    words = ("-f", "raw", "-O", "qcow2", image.parent / "base.raw")
    ours = json.loads(qcowfs("measure", "--json", *words).stdout)
    assert ours == json.loads(qemu_img("measure", "--output=json", *words))


@pytest.mark.parametrize(
    ("words", "text"),
    [((), "give either"), (("--size", "1G", "x"), "give either"),
     (("--size", "1G", "-o", "compat=v3"), "add -O qcow2"),
     (("--size", "3P", "-O", "qcow2"), "needs larger clusters")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_clear_line(words: tuple[str, ...], text: str) -> None:
    result = qcowfs("measure", *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert text in result.stderr
