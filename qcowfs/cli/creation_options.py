"""Options that say what form a new image shall have: those of qemu-img.

Owns their names on the command line and how `-o` is read. Must not know what the options mean.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcowfs.errors import UsageError

if TYPE_CHECKING:
    from qcowfs.creation.form import Creation

HELP = (
    "creation options as qemu-img knows them: compat=v2|v3, cluster_size, refcount_bits, lazy_refcounts, "
    "extended_l2, compression_type=zlib|zstd, preallocation=off|metadata|falloc|full, data_file, "
    "data_file_raw, backing_file, backing_fmt, size, encrypt.format=luks, encrypt.iter-time, "
    "encrypt.cipher-alg, encrypt.cipher-mode, encrypt.ivgen-alg, encrypt.ivgen-hash-alg, encrypt.hash-alg; "
    "a comma within a value is written twice"
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


ENCRYPTION = {
    "--iter-time": ("MS", "how long opening it by the passphrase takes, in milliseconds (default 2000)"),
    "--cipher-alg": ("NAME", "aes-128, aes-192, aes-256 (the default) or cast5-128"),
    "--cipher-mode": ("NAME", "xts (the default) or cbc"),
    "--ivgen-alg": ("NAME", "plain, plain64 (the default) or essiv"),
    "--ivgen-hash-alg": ("NAME", "of essiv: md5 or sha256 (the default)"),
    "--hash-alg": (
        "NAME",
        "of key derivation: sha1, sha224, sha256 (the default), sha384, sha512, ripemd160",
    ),
}


def add_encryption(parser: argparse.ArgumentParser) -> None:
    """Add how the new image shall be encrypted."""
    group = parser.add_argument_group("encrypting the image")
    group.add_argument("--encrypt", choices=("luks",), help="encrypt the disk; asks for a new passphrase")
    for option, (metavar, text) in ENCRYPTION.items():
        group.add_argument(option, metavar=metavar, help=text)


def encryption_words(args: argparse.Namespace) -> dict[str, str]:
    """What those options ask for, under qemu-img's names."""
    values = {option[2:]: getattr(args, option[2:].replace("-", "_")) for option in ENCRYPTION}
    words = {"format": args.encrypt, **values}
    return {f"encrypt.{name}": text for name, text in words.items() if text is not None}


def creation(args: argparse.Namespace) -> Creation:
    """The form that all the options ask for; raises `UsageError`."""
    return from_fields(args.fields, **backing_words(args), **encryption_words(args))


def backing_words(args: argparse.Namespace) -> dict[str, str]:
    """What the options ask for that name a backing file and its format."""
    given = {"backing_file": args.backing, "backing_fmt": args.backing_format}
    return {name: text for name, text in given.items() if text is not None}


def from_fields(fields: list[str], **given: str) -> Creation:
    """The form that the texts after `-o` ask for, and what was given otherwise; raises `UsageError`."""
    from qcowfs.creation.form import Creation

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
