"""Options that say what form a new image shall have: those of qemu-img.

Owns their names on the command line and how `-o` is read. Must not know what the options mean.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.creation import Creation

HELP = (
    "creation options as qemu-img knows them: compat=v2|v3, cluster_size, refcount_bits, lazy_refcounts, "
    "extended_l2, compression_type=zlib|zstd, preallocation=off|metadata|falloc|full, data_file, "
    "data_file_raw, backing_file, backing_fmt, size; a comma within a value is written twice"
)


def add_fields(parser: argparse._ActionsContainer) -> None:
    """Add `-o` to a command's parser."""
    parser.add_argument("-o", dest="fields", action="append", default=[], metavar="NAME=VALUE,...", help=HELP)


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `-o` and the backing file to a command's parser."""
    add_fields(parser)
    parser.add_argument("--backing", "-b", metavar="FILE", help="the backing file of the new image")
    parser.add_argument(
        "--backing-format", "-F", metavar="FORMAT", help="its format, qcow2 or raw; never guessed"
    )


def creation(args: argparse.Namespace) -> Creation:
    """The form that all the options ask for; raises `UsageError`."""
    given = {"backing_file": args.backing, "backing_fmt": args.backing_format}
    return from_fields(args.fields, **{name: text for name, text in given.items() if text is not None})


def from_fields(fields: list[str], **given: str) -> Creation:
    """The form that the texts after `-o` ask for, and what was given otherwise; raises `UsageError`."""
    from qcowfs.creation import Creation

    words: dict[str, str] = {}
    for text in fields:
        words.update(split_fields(text))
    for name, value in given.items():
        if words.setdefault(name, value) != value:
            raise UsageError(f"{name} is given twice, as {words[name]!r} and as {value!r}")
    return Creation.from_words(words)


def split_fields(text: str) -> dict[str, str]:
    """`a=1,b=x,,y` as `{"a": "1", "b": "x,y"}`; a name alone means on."""
    fields = {}
    for item in text.replace(",,", "\0").split(","):
        name, equals, value = item.partition("=")
        fields[name] = value.replace("\0", ",") if equals else "on"
    return fields
