"""Kinds of images for the matrix: each is made by QEMU's tools with a given version and cluster size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.tools import KIB, MIB, SECTOR, Word, convert, create, edits, qemu_io, raw_file


@dataclass(frozen=True)
class Form:
    """What any image has: a version such as v3, and a cluster size in bytes."""

    version: str
    cluster_size: int

    @property
    def size(self) -> int:
        """A virtual size of several clusters that ends within one."""
        return (9 if self.cluster_size > MIB else 2) * MIB + 37 * SECTOR

    @property
    def fields(self) -> dict[str, object]:
        return {"compat": self.version, "cluster_size": self.cluster_size}


@dataclass(frozen=True)
class Made:
    """An image, and the options without which it cannot be mounted."""

    image: Path
    options: tuple[Word, ...] = ()
    has_snapshots: bool = True


def _filled(folder: Path, form: Form, *words: Word, **fields: object) -> Path:
    raw = raw_file(folder / "content", form.size, form)
    return convert(raw, folder / "image.qcow2", *words, **form.fields, **fields)


def plain(folder: Path, form: Form) -> Made:
    return Made(_filled(folder, form))


def zlib(folder: Path, form: Form) -> Made:
    return Made(_filled(folder, form, "-c"))


def zstd(folder: Path, form: Form) -> Made:
    return Made(_filled(folder, form, "-c", compression_type="zstd"))


def extended_l2(folder: Path, form: Form) -> Made:
    image = _filled(folder, form, extended_l2="on")
    part = form.cluster_size // 32
    qemu_io(image, *(f"write -q -z {part * n} {part}" for n in (1, 2, 40, 63, 64)))
    return Made(image)


def extended_l2_compressed(folder: Path, form: Form) -> Made:
    return Made(_filled(folder, form, "-c", extended_l2="on"))


def extended_l2_overlay(folder: Path, form: Form) -> Made:
    base = raw_file(folder / "base.raw", form.size, "base")
    return Made(_overlay(folder, form, base, "raw", extended_l2="on"))


def over_qcow2(folder: Path, form: Form) -> Made:
    raw = raw_file(folder / "content", form.size, "base")
    base = convert(raw, folder / "base.qcow2", "-c", **form.fields)
    return Made(_overlay(folder, form, base, "qcow2"))


def over_raw(folder: Path, form: Form) -> Made:
    return Made(_overlay(folder, form, raw_file(folder / "base.raw", form.size, "base"), "raw"))


def over_short(folder: Path, form: Form) -> Made:
    return Made(_overlay(folder, form, raw_file(folder / "base.raw", MIB + 777, "base"), "raw"))


def over_long(folder: Path, form: Form) -> Made:
    return Made(_overlay(folder, form, raw_file(folder / "base.raw", form.size + MIB, "base"), "raw"))


def over_three(folder: Path, form: Form) -> Made:
    base = raw_file(folder / "base.raw", form.size - 64 * KIB, "base")
    lower = create(folder / "lower.qcow2", MIB, "-b", base, "-F", "raw")
    middle = create(folder / "middle.qcow2", form.size, "-b", lower, "-F", "qcow2", cluster_size=512)
    qemu_io(lower, *edits(MIB, "lower"))
    qemu_io(middle, *edits(form.size, "middle"))
    return Made(_overlay(folder, form, middle, "qcow2"))


def _overlay(folder: Path, form: Form, base: Path, kind: str, **fields: object) -> Path:
    image = folder / "image.qcow2"
    return create(image, form.size, "-b", base.name, "-F", kind, **form.fields, **fields)


def data_file(folder: Path, form: Form) -> Made:
    data = folder / "image.data"
    image = _filled(folder, form, data_file=data)
    return Made(image, ("--data-file", data), has_snapshots=False)


def data_file_raw(folder: Path, form: Form) -> Made:
    data = folder / "image.data"
    image = _filled(folder, form, data_file=data, data_file_raw="on")
    return Made(image, ("--data-file", data), has_snapshots=False)


def zeroed(folder: Path, form: Form) -> Made:
    image = _filled(folder, form)
    half = form.size // 2 // SECTOR * SECTOR
    qemu_io(image, f"write -q -z 0 {half - 3 * SECTOR}", f"write -q -z -u {half} {half // 2}")
    return Made(image)


def preallocated(folder: Path, form: Form) -> Made:
    return Made(create(folder / "image.qcow2", form.size, **form.fields, preallocation="metadata"))


def discarded(folder: Path, form: Form) -> Made:
    image = _filled(folder, form)
    start, length = 256 * KIB, form.size // 2 // SECTOR * SECTOR
    qemu_io(image, f"discard -q {start} {length}")
    return Made(image)


ANY: list[Callable[[Path, Form], Made]] = [
    plain, zlib, over_qcow2, over_raw, over_short, over_long, over_three, preallocated, discarded,
]  # fmt: skip
VERSION_3: list[Callable[[Path, Form], Made]] = [zstd, data_file, data_file_raw, zeroed]
LARGE_CLUSTERS: list[Callable[[Path, Form], Made]] = [
    extended_l2, extended_l2_compressed, extended_l2_overlay,
]  # fmt: skip


def kinds_for(form: Form) -> list[Callable[[Path, Form], Made]]:
    """Every kind that an image of that form can be of."""
    if form.version == "v2":
        return ANY
    return ANY + VERSION_3 + (LARGE_CLUSTERS if form.cluster_size >= 16 * KIB else [])
