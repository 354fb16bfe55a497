"""The options of a new image: which texts they take, which combinations are refused, the header they give."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcowfs.creation.form import Creation, parse_size
from qcowfs.errors import UsageError
from qcowfs.format.extensions import FEATURE_NAMES
from qcowfs.format.features import Incompatible, unpack_names
from qcowfs.format.header import Header


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("513", 513), ("4k", 4096), ("1.5G", 3 << 29), ("20GiB", 20 << 30), ("7b", 7), ("3E", 3 << 60),
     ("0.1k", 102), ("2tb", 2 << 40)],
)  # fmt: skip
def test_a_size_is_read_with_any_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "k", "1.k", ".5k", "1 G", "8E", "0x10", "1e3", "1ib"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"no size|largest size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ({"cluster_size": "1000"}, "cluster_size=1000: must be a power of two"),
        ({"cluster_size": "4M"}, "power of two from 512 to 2M"),
        ({"cluster_size": "0"}, "power of two"),
        ({"refcount_bits": "3"}, "refcount_bits=3: must be"),
        ({"refcount_bits": "0"}, "refcount_bits=0: must be"),
        ({"refcount_bits": "128"}, "refcount_bits=128: must be"),
        ({"refcount_bits": "x"}, "refcount_bits=x: must be a number"),
        ({"compat": "v2", "lazy_refcounts": "on"}, "lazy_refcounts: version 2"),
        ({"compat": "0.10", "refcount_bits": "8"}, "refcount_bits: version 2"),
        ({"compat": "v2", "extended_l2": "on"}, "extended_l2: version 2"),
        ({"compat": "v2", "compression_type": "zstd"}, "compression_type: version 2"),
        ({"compat": "v2", "data_file": "d"}, "data_file: version 2"),
        ({"compat": "v4"}, "compat=v4: must be one of"),
        ({"extended_l2": "on", "cluster_size": "8k"}, "16k or more"),
        ({"extended_l2": "yes"}, "must be one of on, off"),
        ({"data_file_raw": "on"}, "needs data_file"),
        ({"data_file_raw": "on", "data_file": "d", "backing_file": "b", "backing_fmt": "raw"}, "combined"),
        ({"backing_file": "b", "backing_fmt": "raw", "preallocation": "full"}, "would hide the backing file"),
        ({"backing_file": "b"}, "needs its format"),
        ({"backing_fmt": "raw"}, "needs a backing file"),
        ({"backing_file": "b" * 1024, "backing_fmt": "raw"}, "1 to 1023 bytes"),
        ({"backing_file": "b", "backing_fmt": "vmdk"}, "must be one of qcow2, raw"),
        ({"preallocation": "some"}, "must be one of off, metadata, falloc, full"),
        ({"compression_type": "lz4"}, "must be one of zlib, zstd"),
        ({"made_up": "1"}, "no creation option"),
    ],
)
def test_a_wrong_option_is_named_with_its_rule(words: dict[str, str], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Creation.from_words(words)


def test_the_header_is_one_that_is_understood_again() -> None:
    form = Creation.from_words({
        "cluster_size": "128k", "refcount_bits": "1", "extended_l2": "on", "lazy_refcounts": "on",
        "compression_type": "zstd", "backing_file": "base,1", "backing_fmt": "qcow2",
    })  # fmt: skip
    header = form.header(5 << 30)
    again = Header.unpack(replace(header, refcount_table_clusters=1).pack().ljust(form.cluster_size, b"\0"))
    assert (again.size, again.cluster_bits, again.refcount_order) == (5 << 30, 17, 0)
    assert again.incompatible == Incompatible.EXTENDED_L2 | Incompatible.COMPRESSION_TYPE
    assert (again.compression_type, again.compatible, again.backing_name) == (1, 1, b"base,1")
    assert again.backing_format == "qcow2"
    assert unpack_names(again.extension(FEATURE_NAMES) or b"")[0, 4] == b"extended L2 entries"


def test_a_small_cluster_drops_the_feature_names_before_it_refuses_the_backing_file() -> None:
    words = {"cluster_size": "512", "backing_fmt": "raw"}
    header = Creation.from_words(words | {"backing_file": "b" * 300}).header(1 << 20)
    assert header.extension(FEATURE_NAMES) is None
    with pytest.raises(UsageError, match="too small for the names"):
        Creation.from_words(words | {"backing_file": "b" * 500}).header(1 << 20)


def test_a_disk_beyond_the_l1_limit_is_refused_with_the_most_that_fits() -> None:
    form = Creation.from_words({"cluster_size": "512"})
    form.check_size(128 << 30)
    with pytest.raises(UsageError, match=f"the most is {128 << 30}"):
        form.check_size((128 << 30) + 512)
    with pytest.raises(UsageError, match=f"the most is {2 << 60}"):
        Creation.from_words({"cluster_size": "2M"}).check_size((2 << 60) + 512)


def test_a_raw_data_file_gets_complete_tables() -> None:
    assert Creation.from_words({"data_file": "d", "data_file_raw": "on"}).preallocation == "metadata"
