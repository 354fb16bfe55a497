"""Refcounts that seem to lie on guest data or tables are counted anew; what lies there is never given up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.tools import (
    KIB,
    OFFSET_MASK,
    as_raw,
    create,
    l1_entry_at,
    l2_entry_at,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_io,
    word,
)

REFCOUNT_TABLE = 48


@pytest.mark.parametrize("options", [(), ("--drop-lost",)])
@pytest.mark.parametrize("victim", ["L2 table", "data"])
def test_what_a_refcount_block_seems_to_lie_on_is_kept(
    tmp_path: Path, victim: str, options: tuple[str, ...]
) -> None:
    image, twin = create(tmp_path / "image.qcow2", 256 * KIB, cluster_size="4k"), tmp_path / "twin"
    qemu_io(image, "write -q -P 5 0 64k")
    twin.write_bytes(as_raw(image, tmp_path / "before").read_bytes())
    entry = l1_entry_at(image) if victim == "L2 table" else l2_entry_at(image, 0)
    poke_word(image, word(image, REFCOUNT_TABLE), word(image, entry) & OFFSET_MASK)
    result = qcowfs("check", "--repair", "all", *options, image)
    assert (result.returncode, "will lose" in result.stdout + result.stderr) == (0, False)
    qemu_img("check", image)
    assert as_raw(image, tmp_path / "after").read_bytes() == twin.read_bytes()
