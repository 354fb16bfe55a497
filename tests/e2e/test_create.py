"""`qcowfs create` makes what `qemu-img create` makes with the same options, as QEMU sees it."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tools import KIB, MIB, QCOWFS, attempt, edits, qcowfs, qemu_img, qemu_info, qemu_io, run, until

SIZE = 5 * MIB + 512
FORMS = [
    "", "compat=v2", "compat=0.10,cluster_size=512", "cluster_size=512", "cluster_size=2M",
    "extended_l2=on,cluster_size=16k", "refcount_bits=1", "refcount_bits=64,cluster_size=4k",
    "lazy_refcounts=on", "compression_type=zstd",
]  # fmt: skip
CASES = [(form, kind) for form in FORMS for kind in ("off", "metadata")]
CASES += [(form, kind) for form in FORMS[:2] for kind in ("falloc", "full")]


def described(image: Path) -> dict[str, Any]:
    """What qemu-img says of an image, without its name and what it takes on the host."""
    return {k: v for k, v in qemu_info(image).items() if k not in ("filename", "actual-size")}


def mapped(image: Path) -> list[tuple[int, object]]:
    """Where qemu-img's map changes and to what; without what it learns from holes in the host file."""
    places: list[tuple[int, object]] = []
    for extent in json.loads(qemu_img("map", "--output=json", image)):
        what = (extent["present"], extent["data"], extent["zero"] and not extent["data"])
        if not places or places[-1][1] != what:
            places.append((extent["start"], what))
    return places


@pytest.mark.parametrize(("form", "preallocation"), CASES)
def test_each_form_is_what_qemu_makes_of_it(form: str, preallocation: str, tmp_path: Path) -> None:
    options = ",".join(filter(None, (form, f"preallocation={preallocation}")))
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    run(*QCOWFS, "create", "-q", "-o", options, ours, str(SIZE))
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, theirs, str(SIZE))
    assert described(ours) == described(theirs)
    assert mapped(ours) == mapped(theirs)
    qemu_img("check", ours)
    qemu_img("compare", ours, theirs)
    assert (ours.stat().st_blocks * 512 >= SIZE) == (preallocation in ("falloc", "full"))


@pytest.mark.parametrize("form", ["", "cluster_size=512", "refcount_bits=1,preallocation=metadata"])
def test_qemu_writes_into_it(form: str, tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    run(*QCOWFS, "create", *(["-o", form] if form else []), image, "3M")
    qemu_io(image, *edits(3 * MIB, form))
    qemu_img("check", image)


@pytest.mark.parametrize("options", ["", ",data_file_raw=on", ",preallocation=full"])
def test_an_external_data_file_is_made_too(options: str, tmp_path: Path) -> None:
    names = [tmp_path / f"{who}.raw" for who in ("ours", "theirs")]
    images = [name.with_suffix(".qcow2") for name in names]
    run(*QCOWFS, "create", "-o", f"data_file={names[0]}{options}", images[0], str(SIZE))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={names[1]}{options}", images[1], str(SIZE))
    assert names[0].stat().st_size == SIZE <= names[1].stat().st_size
    assert mapped(images[0]) == mapped(images[1])
    qemu_img("check", images[0])
    assert qcowfs("create", "-o", f"data_file={names[0]}", tmp_path / "again.qcow2", "1M").returncode == 2
    assert not (tmp_path / "again.qcow2").exists()


def test_an_overlay_takes_the_size_of_its_backing_file(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "7M")
    (tmp_path / "base.raw").write_bytes(bytes(3 * MIB + 1))
    for name, kind, size in (("base.qcow2", "qcow2", 7 * MIB), ("base.raw", "raw", 3 * MIB + 512)):
        image = tmp_path / f"over-{kind}.qcow2"
        run(*QCOWFS, "create", "-b", name, "-F", kind, image, cwd="/")
        record = qemu_info(image)
        assert (record["virtual-size"], record["backing-filename"]) == (size, name)
        assert record["backing-filename-format"] == kind
        qemu_img("check", image)


def test_a_missing_backing_file_is_refused_unless_nobody_looks(tmp_path: Path) -> None:
    words = ("-b", "none.qcow2", "-F", "qcow2", tmp_path / "x.qcow2", "1M")
    refused = qcowfs("create", *words)
    assert refused.returncode == 6
    assert "none.qcow2" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    assert qcowfs("create", "-u", *words).returncode == 0


def test_an_image_is_not_replaced_by_one_that_stands_on_it(tmp_path: Path) -> None:
    base, over = tmp_path / "base.qcow2", tmp_path / "over.qcow2"
    run(*QCOWFS, "create", base, "1M")
    run(*QCOWFS, "create", "-b", base, "-F", "qcow2", over)
    before = base.read_bytes()
    assert qcowfs("create", "--force", "-b", over, "-F", "qcow2", base).returncode == 5
    assert base.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("x.qcow2",), "which size"),
        (("-o", "size=1M", "x.qcow2", "2M"), "size is given twice"),
        (("-o", "cluster_size=512", "x.qcow2", "129G"), "needs larger clusters"),
        (("-b", "b", "-o", "backing_file=c", "x.qcow2", "1M"), "backing_file is given twice"),
        (("x.qcow2", "-1"), "no size"),
        (("none/x.qcow2", "1M"), "No such file"),
    ],
)
def test_what_cannot_be_made_is_one_clear_line(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    result = attempt(*QCOWFS, "create", *(("--",) if words[-1] == "-1" else ()), *words, cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_comma_in_a_value_is_written_twice(tmp_path: Path) -> None:
    run(*QCOWFS, "create", "-u", "-o", "backing_file=a,,b,backing_fmt=raw", tmp_path / "x", "64k")
    assert qemu_info(tmp_path / "x")["backing-filename"] == "a,b"


def test_a_petabyte_is_made_at_once(tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    run(*QCOWFS, "create", image, "1P")
    assert qemu_info(image)["virtual-size"] == 1 << 50
    assert image.stat().st_blocks * 512 < 256 * KIB


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    words = [*QCOWFS, "create", "-o", "preallocation=full", str(tmp_path / "x.qcow2"), "4G"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    until(lambda: _writes(process.pid))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert list(tmp_path.iterdir()) == []


def _writes(pid: int) -> bool:
    """Whether the process has written some megabytes."""
    text = Path(f"/proc/{pid}/io").read_text()
    return int(text.partition("wchar: ")[2].split()[0]) > 8 * MIB
