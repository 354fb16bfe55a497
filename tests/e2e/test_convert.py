"""`qcowfs convert`: options, sizes, sparseness, what it refuses and what it leaves behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.tools import (
    KIB,
    MIB,
    QCOWFS,
    Word,
    as_raw,
    assert_same,
    content,
    convert,
    create,
    l2_entry_at,
    poke_word,
    qcowfs,
    qemu_img,
    qemu_info,
    qemu_io,
    raw_file,
    run,
    until,
)

SIZE = 3 * MIB + 37 * 512


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk with data, zeros that are written and a hole."""
    path = raw_file(tmp_path_factory.mktemp("convert") / "disk.raw", SIZE, "convert")
    with path.open("r+b") as file:
        file.truncate(9 * MIB)
        file.seek(8 * MIB + 512)
        file.write(b"at the end")
    return path


def copied(source: Path, target: Path, *words: Word) -> Path:
    run(*QCOWFS, "convert", *words, source, target)
    return target


@pytest.mark.parametrize(
    "options",
    ["compat=v2", "cluster_size=512,refcount_bits=1", "extended_l2=on,cluster_size=2M",
     "preallocation=metadata", "preallocation=falloc,cluster_size=4k",
     "preallocation=full,lazy_refcounts=on"],
)  # fmt: skip
def test_each_form_of_image_holds_the_disk(options: str, raw: Path, tmp_path: Path) -> None:
    image = copied(raw, tmp_path / "x.qcow2", "-o", options)
    theirs = convert(raw, tmp_path / "theirs.qcow2", **dict(o.split("=") for o in options.split(",")))
    qemu_img("check", image)
    qemu_img("compare", image, raw)
    ours, other = qemu_info(image), qemu_info(theirs)
    assert ours["format-specific"] == other["format-specific"]
    assert (ours["actual-size"] >= 9 * MIB) == (other["actual-size"] >= 9 * MIB)


@pytest.mark.parametrize(
    "words",
    [("-c",), ("-c", "--level", "9"), ("-c", "--level", "1", "-m", "3"),
     ("-c", "-o", "compression_type=zstd"),
     ("-c", "-o", "compression_type=zstd,refcount_bits=1,cluster_size=4k"), ("-c", "-o", "extended_l2=on")],
    ids=" ".join,
)  # fmt: skip
def test_a_compressed_copy_is_sound_and_about_as_small_as_qemus(
    words: tuple[str, ...], raw: Path, tmp_path: Path
) -> None:
    image = copied(raw, tmp_path / "x.qcow2", *words)
    options = [word for word in words if word in ("-c", "-o") or "=" in word]
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, tmp_path / "theirs.qcow2")
    qemu_img("check", image)
    qemu_img("compare", image, raw)
    assert image.stat().st_blocks <= 1.1 * (tmp_path / "theirs.qcow2").stat().st_blocks


def test_text_shrinks_about_as_much_as_with_qemu(tmp_path: Path) -> None:
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    (tmp_path / "text").write_bytes(text * (4 * MIB // len(text)))
    for kind in ("zlib", "zstd"):
        words = ("-c", "-o", f"compression_type={kind}")
        image = copied(tmp_path / "text", tmp_path / f"{kind}.qcow2", *words)
        theirs = tmp_path / f"{kind}-theirs.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *words, tmp_path / "text", theirs)
        assert image.stat().st_size <= 1.1 * theirs.stat().st_size


def test_a_raw_copy_is_as_sparse_as_qemus(raw: Path, tmp_path: Path) -> None:
    for source in (raw, copied(raw, tmp_path / "x.qcow2", "-c"), copied(raw, tmp_path / "y.qcow2")):
        ours = copied(source, tmp_path / "ours.raw", "--force")
        qemu_img("convert", "-O", "raw", source, tmp_path / "theirs.raw")
        assert_same(ours, raw)
        assert ours.stat().st_blocks <= (tmp_path / "theirs.raw").stat().st_blocks


def test_a_snapshot_and_a_chain_are_copied_whole(raw: Path, tmp_path: Path) -> None:
    image = create(tmp_path / "x.qcow2", 9 * MIB, "-b", raw, "-F", "raw")
    qemu_io(image, "write -q -P 3 1M 200k")
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write -q -P 4 1M 20k", "write -q -z 2M 70k")
    for words, name in (((), None), (("--snapshot", "then"), "then")):
        expected = as_raw(image, tmp_path / "expected.raw", name)
        assert_same(copied(image, tmp_path / "ours.raw", "--force", *words), expected)
        copy = copied(image, tmp_path / "ours.qcow2", "--force", *words)
        assert "backing-filename" not in qemu_info(copy)
        qemu_img("compare", copy, expected)


@pytest.mark.parametrize("options", ["", ",data_file_raw=on"])
def test_data_may_go_into_a_file_of_its_own(options: str, raw: Path, tmp_path: Path) -> None:
    data = tmp_path / "x.data"
    image = copied(raw, tmp_path / "x.qcow2", "-o", f"data_file={data}{options}")
    qemu_img("check", image)
    qemu_img("compare", image, raw)
    assert data.stat().st_size == raw.stat().st_size
    if options:
        assert_same(data, raw)


@pytest.mark.parametrize("words", [(), ("-c",), ("-o", "cluster_size=2M")], ids=" ".join)
def test_what_a_source_has_behind_its_end_is_not_copied(words: tuple[str, ...], tmp_path: Path) -> None:
    source = create(tmp_path / "a.qcow2", MIB)
    qemu_io(source, "write -q -P 7 0 1M")
    qemu_img("resize", "-q", "--shrink", source, str(MIB - 33 * KIB))
    image = copied(source, tmp_path / "b.qcow2", *words)
    qemu_img("resize", "-q", image, str(MIB))
    assert as_raw(image, tmp_path / "b.raw").read_bytes() == b"\7" * (MIB - 33 * KIB) + bytes(33 * KIB)


def test_a_size_that_is_no_whole_sector_is_rounded_up(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(content(70_001, "odd"))
    for name in ("x.qcow2", "x.raw"):
        copy = copied(tmp_path / "odd", tmp_path / name, "-f", "raw")
        qemu_img("compare", "-f", "raw", tmp_path / "odd", copy)
    assert (tmp_path / "x.raw").stat().st_size == 70_144


@pytest.fixture
def reflinks(tmp_path: Path) -> Iterator[Path]:
    """A folder of a file system whose files may share blocks."""
    device, folder = tmp_path / "xfs", tmp_path / "mounted"
    with device.open("wb") as file:
        file.truncate(400 * MIB)
    run("mkfs.xfs", "-q", device)
    folder.mkdir()
    run("mount", "-o", "loop", device, folder)
    yield folder
    run("umount", folder)


def test_blocks_are_shared_where_the_host_can(reflinks: Path) -> None:
    raw = raw_file(reflinks / "a.raw", 64 * MIB, "reflink")
    run("sync", "-f", raw)
    before = shutil.disk_usage(reflinks).used
    assert_same(copied(raw, reflinks / "b.raw", "-f", "raw"), raw)
    image = copied(raw, reflinks / "b.qcow2", "-f", "raw")
    assert_same(copied(image, reflinks / "c.raw"), raw)
    qemu_img("check", image)
    qemu_img("compare", image, raw)
    run("sync", "-f", raw)
    assert shutil.disk_usage(reflinks).used - before < 16 * MIB


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("-c", "a.raw", "x.raw"), 2, "add -O qcow2"),
        (("-o", "compat=v3", "a.raw", "x.raw"), 2, "add -O qcow2"),
        (("-c", "--level", "12", "a.raw", "x.qcow2"), 2, "zlib has levels 1 to 9"),
        (("-c", "-o", "preallocation=full", "a.raw", "x.qcow2"), 2, "does not go with it"),
        (("-c", "-o", "data_file=d", "a.raw", "x.qcow2"), 2, "cannot hold compressed"),
        (("-B", "a.raw", "a.raw", "x.qcow2"), 2, "needs its format"),
        (("-B", "a.raw", "-F", "raw", "a.raw", "x.raw"), 2, "-B: raw files"),
        (("-B", "none", "-F", "raw", "a.raw", "x.qcow2"), 6, "none"),
        (
            ("-B", "a.raw", "-F", "raw", "-o", "extended_l2=on,preallocation=metadata", "a.raw", "x.qcow2"),
            2,
            "holds what differs only",
        ),
        (("a.raw", "a.raw"), 2, "--force replaces it"),
        (("--force", "a.raw", "a.raw"), 5, "a.raw: in use"),
        (("none", "x.raw"), 1, "No such file"),
        (("a.raw", "none/x.raw"), 1, "No such file"),
        (("--snapshot", "x", "a.raw", "x.raw"), 2, "has no snapshots"),
        (("-m", "0", "a.raw", "x.raw"), 2, "at least 1"),
    ],
)
def test_what_cannot_be_copied_is_one_clear_line_and_leaves_nothing(
    words: tuple[str, ...], code: int, text: str, tmp_path: Path
) -> None:
    before = raw_file(tmp_path / "a.raw", 70 * KIB, "a").read_bytes()
    result = subprocess.run(
        [*QCOWFS, "convert", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, text in result.stderr) == (code, True), result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("qcowfs")
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]
    assert (tmp_path / "a.raw").read_bytes() == before


def test_lost_data_ends_a_copy_unless_zeros_are_asked_for(tmp_path: Path) -> None:
    image = create(tmp_path / "x.qcow2", 4 * MIB)
    qemu_io(image, "write -q -P 5 0 3M")
    poke_word(image, l2_entry_at(image, MIB), 3 * 512)
    result = qcowfs("convert", image, tmp_path / "x.raw")
    assert result.returncode == 4
    assert "guest offset 0x100000" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.qcow2"]
    copied(image, tmp_path / "x.raw", "--lost-data", "zeros")
    expected = b"\5" * MIB + bytes(64 * KIB) + b"\5" * (2 * MIB - 64 * KIB) + bytes(MIB)
    assert (tmp_path / "x.raw").read_bytes() == expected


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        for _ in range(24):
            file.write(content(4 * MIB, "slow"))
    words = [*QCOWFS, "convert", "-c", "--level", "9", "-m", "1", str(source), str(tmp_path / "x.qcow2")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    until(lambda: _written(process.pid) > MIB)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert (process.returncode, text) == (130, b"")
    assert list(tmp_path.iterdir()) == [source]


def _written(pid: int) -> int:
    """Bytes that a process has written so far."""
    return int(Path(f"/proc/{pid}/io").read_text().partition("wchar: ")[2].split()[0])
