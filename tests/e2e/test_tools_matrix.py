"""Every kind of image through every tool that reads disks, each against what qemu-img makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcowfs.copying.compare import compare
from qcowfs.copying.convert import Copying, convert
from qcowfs.copying.measure import measure_copy
from qcowfs.creation.form import Creation
from qcowfs.disk.disks import Disk, open_disk
from qcowfs.disk.extents import disk_extents
from qcowfs.disk.image import OpenOptions
from tests.e2e.kinds import Form, Made, kinds_for
from tests.e2e.tools import KIB, MIB, as_raw, assert_same, edits, qemu_img, qemu_io, run

Maker = Callable[[Path, Form], Made]

FORMS = [Form("v2", 4 * KIB), Form("v3", 512), Form("v3", 64 * KIB), Form("v3", 2 * MIB)]
CASES = [
    pytest.param(form, make, id=f"{form.version}-{form.cluster_size}-{make.__name__}")
    for form in FORMS
    for make in kinds_for(form)
]


def options_for(made: Made) -> OpenOptions:
    """How the image is opened in this process."""
    return OpenOptions(data_file=Path(made.options[1])) if made.options else OpenOptions()


@pytest.mark.parametrize(("form", "make"), CASES)
async def test_each_kind_of_image_is_what_qemu_takes_it_for(form: Form, make: Maker, tmp_path: Path) -> None:
    made = make(tmp_path, form)
    qemu_io(made.image, *edits(form.size, form, 6))
    if made.has_snapshots:
        qemu_img("snapshot", "-c", "first", made.image)
        qemu_io(made.image, *edits(form.size, f"{form} again", 3))
    run("sync", made.image)  # from now on the host counts its blocks the same each time it is asked
    raw = as_raw(made.image, tmp_path / "live")
    async with open_disk(made.image, "qcow2", options_for(made)) as disk, open_disk(raw, "raw") as copy:
        assert await mapped(disk) == json.loads(qemu_img("map", "--output=json", made.image))
        measured = (await measure_copy(Creation(), disk)).record()
        assert measured == json.loads(qemu_img("measure", "-O", "qcow2", "--output=json", made.image))
        assert (await compare(disk, copy)).identical
        await convert(disk, tmp_path / "copy.raw", Copying())
        await convert(disk, tmp_path / "copy.qcow2", Copying(_form_like(form), compress=True))
        await convert(copy, tmp_path / "from-raw.qcow2", Copying(_form_like(form)))
    assert_same(tmp_path / "copy.raw", raw)
    for name in ("copy.qcow2", "from-raw.qcow2"):
        qemu_img("check", tmp_path / name)
        qemu_img("compare", tmp_path / name, raw)


def _form_like(form: Form) -> Creation:
    return Creation.from_words({"compat": form.version, "cluster_size": str(form.cluster_size)})


async def mapped(disk: Disk) -> list[dict[str, Any]]:
    """The map with the keys that this version of qemu-img knows."""
    known = ("start", "length", "depth", "present", "zero", "data", "offset")
    return [{k: v for k, v in e.record().items() if k in known} async for e in disk_extents(disk)]
