"""Every kind of image reads byte for byte as `qemu-img convert -O raw` has it, and so does every snapshot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.kinds import Form, Made, kinds_for
from tests.e2e.mounts import mounted
from tests.e2e.tools import KIB, MIB, as_raw, assert_same, edits, qemu_img, qemu_io

Maker = Callable[[Path, Form], Made]

FORMS = [Form(version, size) for version in ("v2", "v3") for size in (512, 4 * KIB, 64 * KIB, 2 * MIB)]
CASES = [
    pytest.param(form, make, id=f"{form.version}-{form.cluster_size}-{make.__name__}")
    for form in FORMS
    for make in kinds_for(form)
]


@pytest.mark.parametrize(("form", "make"), CASES)
def test_each_kind_of_image_and_its_snapshots_read_as_qemu_has_them(
    form: Form, make: Maker, tmp_path: Path
) -> None:
    made = make(tmp_path, form)
    names = _change(made, form)
    with mounted(made.image, *made.options) as mount:
        assert_same(mount.disk, as_raw(made.image, tmp_path / "live"))
        assert [file.name for file in sorted(mount.snapshots.iterdir())] == [f"{n}.raw" for n in names]
        for name in names:
            assert_same(mount.snapshot(name), as_raw(made.image, tmp_path / name, name))


def _change(made: Made, form: Form) -> list[str]:
    """Write here and there, between two snapshots where the kind permits; returns their names."""
    names = ["first", "second"] if made.has_snapshots else []
    for name in names:
        qemu_io(made.image, *edits(form.size, f"{form} before {name}", 5))
        qemu_img("snapshot", "-c", name, made.image)
    qemu_io(made.image, *edits(form.size, f"{form} at last", 5))
    return names
