"""What is written to a disk of any kind of image is what QEMU reads from it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import kinds
from tests.e2e.kinds import Form, Made
from tests.e2e.mounts import mounted
from tests.e2e.tools import KIB, MIB, as_raw, assert_same, create, edits, qemu_img, qemu_io
from tests.e2e.writes import assert_holds, assert_sound, write_to_both

Maker = Callable[[Path, Form], Made]


def narrow_refcounts(folder: Path, form: Form) -> Made:
    """With one bit for each count there can be no snapshot."""
    image = create(folder / "image.qcow2", form.size, **form.fields, refcount_bits=1)
    return Made(image, has_snapshots=False)


def wide_refcounts(folder: Path, form: Form) -> Made:
    return Made(create(folder / "image.qcow2", form.size, **form.fields, refcount_bits=64))


def empty(folder: Path, form: Form) -> Made:
    return Made(create(folder / "image.qcow2", form.size, **form.fields))


V2, V3 = Form("v2", 64 * KIB), Form("v3", 64 * KIB)
OTHER_SIZES = [Form("v3", 512), Form("v3", 2 * MIB)]
WIDTHS: list[Maker] = [narrow_refcounts, wide_refcounts]
FEW: list[Maker] = [
    kinds.plain,
    kinds.zlib,
    kinds.over_qcow2,
    kinds.over_short,
    kinds.zeroed,
    kinds.discarded,
]
PAIRS: list[tuple[Form, Maker]] = [
    *((V3, make) for make in (empty, *WIDTHS, *kinds.kinds_for(V3))),
    *((V2, make) for make in (kinds.plain, kinds.zlib, kinds.over_raw, kinds.over_short, kinds.over_three)),
    *((form, make) for form in OTHER_SIZES for make in (*FEW, *WIDTHS, kinds.data_file)),
    (Form("v2", 512), kinds.over_qcow2),
    (Form("v3", 16 * KIB), kinds.extended_l2_overlay),
    (Form("v3", 2 * MIB), kinds.extended_l2),
]
CASES = [
    pytest.param(form, make, id=f"{form.version}-{form.cluster_size}-{make.__name__}") for form, make in PAIRS
]


@pytest.mark.parametrize(("form", "make"), CASES)
def test_each_kind_of_image_holds_what_was_written_and_its_snapshots_stay(
    form: Form, make: Maker, tmp_path: Path
) -> None:
    made = make(tmp_path, form)
    frozen = snapshot_taken(made, form, tmp_path)
    twin = as_raw(made.image, tmp_path / "twin")
    for seed in ("first", "second"):
        with mounted(made.image, *made.options, writable=True) as mount:
            write_to_both(mount.disk, twin, f"{form} {make.__name__} {seed}", 12)
            assert_same(mount.disk, twin)
        assert_sound(made.image)
        assert_holds(made.image, twin)
    if frozen is not None:
        assert_same(as_raw(made.image, tmp_path / "after", "before"), frozen)


def snapshot_taken(made: Made, form: Form, folder: Path) -> Path | None:
    """Take a snapshot, where the kind permits, and change a little afterwards; what it holds."""
    if not made.has_snapshots:
        return None
    qemu_img("snapshot", "-c", "before", made.image)
    qemu_io(made.image, *edits(form.size, f"{form} after", 3))
    return as_raw(made.image, folder / "frozen", "before")
