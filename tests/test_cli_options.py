"""The command line: options as mount(8) writes them, sizes, and exit codes."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs import errors
from qcowfs.cli import image_options, mount
from qcowfs.cli.exits import complain, exit_code, guarded, raise_single
from qcowfs.cli.main import main
from qcowfs.cli.mount_helper import mount_command
from qcowfs.cli.mount_words import IGNORED, as_arguments, expand
from qcowfs.cli.sizes import disk_size
from qcowfs.disk.image import OpenOptions
from qcowfs.errors import UsageError
from tests.asserting import raises_exactly

# -- mount words


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("", []),
        ("ro", ["--read-only"]),
        ("ro,allow_other,uid=1000", ["--read-only", "--allow-other", "--uid=1000"]),
        ("rw,noauto,user,_netdev,defaults,nofail", []),
        ("x-systemd.automount,comment=mine,fsname=a,subtype=b,nosuid,nodev", []),
        (",,ro,,", ["--read-only"]),
        ("data_file=/a b/c_d=e", ["--data-file=/a b/c_d=e"]),
        (r"data_file=/a\,b,ro", ["--data-file=/a,b", "--read-only"]),
        (r"data_file=/a\\,ro", ["--data-file=/a\\", "--read-only"]),
        (r"data_file=/a\b", ["--data-file=/ab"]),
        ("data_file=", ["--data-file="]),
        ("made_up", ["--made-up"]),
    ],
)
def test_mount_words_become_long_options(words: str, arguments: list[str]) -> None:
    assert as_arguments(words) == arguments


@given(st.text(st.characters(codec="ascii"), min_size=1, max_size=30))
def test_any_value_can_be_written_with_backslashes(value: str) -> None:
    escaped = value.replace("\\", "\\\\").replace(",", "\\,")
    assert as_arguments(f"ro,data_file={escaped},rw") == ["--read-only", f"--data-file={value}"]


@pytest.mark.parametrize("word", sorted(IGNORED))
def test_what_belongs_to_the_mount_program_is_left_out(word: str) -> None:
    assert as_arguments(word) == []


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["mount", "-o", "ro", "i", "m"], ["mount", "--read-only", "i", "m"]),
        (["mount", "i", "m", "-oro,uid=1"], ["mount", "i", "m", "--read-only", "--uid=1"]),
        (["-o", "ro", "-o", "gid=2"], ["--read-only", "--gid=2"]),
        (["-f", "--", "-o", "ro"], ["-f", "--", "-o", "ro"]),
    ],
)
def test_lists_of_words_are_replaced_before_two_dashes(words: list[str], expanded: list[str]) -> None:
    assert expand(words) == expanded


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    mount.add_arguments(parser)
    return parser.parse_args(expand([*words, "/i", "/m"]))


def test_words_mean_what_the_long_options_mean() -> None:
    words = "allow_other,uid=7,mode=444,lost_data=zeros,table_cache=1M,no_backing,data_file=/d"
    args = parsed("-o", words)
    assert (args.allow_other, args.uid, args.mode, args.lost_data) == (True, 7, 0o444, "zeros")
    assert (args.table_cache, args.no_backing, args.data_file) == (1 << 20, True, Path("/d"))
    assert (args.image, args.mount_point) == (Path("/i"), Path("/m"))


def test_several_lists_of_words_are_joined() -> None:
    args = parsed("-o", "ro,uid=1", "-ogid=2")
    assert (args.read_only, args.uid, args.gid) == (True, 1, 2)


def test_options_that_are_given_as_such_stay() -> None:
    args = parsed("--uid", "5", "--force-share", "--data-file", "rel", "-f", "-o", "gid=2")
    assert (args.uid, args.gid, args.force_share, args.foreground) == (5, 2, True, True)
    assert args.data_file == Path.cwd() / "rel"


def test_words_behind_joined_flags_count_too() -> None:
    args = parsed("-fo", "no_backing")
    assert (args.foreground, args.no_backing) == (True, True)


@pytest.mark.parametrize("word", ["made-up", "allow", "uid_=3"])
def test_an_unknown_word_is_refused_by_name(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("-o", f"ro,{word}")
    assert caught.value.code == 2
    assert f"unrecognized arguments: --{word.replace('_', '-')}" in capsys.readouterr().err


def test_a_list_of_words_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    mount.add_arguments(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(expand(["/i", "/m", "-o"]))
    assert caught.value.code == 2
    assert "expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["i", "m"], ["mount", "--", "i", "m"]),
        (["i", "m", "-o", "ro,uid=1", "-o", "x"], ["mount", "-o", "ro,uid=1", "-o", "x", "--", "i", "m"]),
        (["i", "m", "-s", "-n", "-v", "-t", "qcowfs"], ["mount", "--", "i", "m"]),
        (["i", "m", "-f"], ["mount", "--dry-run", "--", "i", "m"]),
        (["--", "-i", "-m"], ["mount", "--", "-i", "-m"]),
    ],
)
def test_the_mount_helper_becomes_the_command_mount(words: list[str], command: list[str]) -> None:
    assert mount_command(words) == command


@pytest.mark.parametrize(
    ("text", "mode"), [("444", 0o444), ("640", 0o640), ("777", 0o666), ("000", 0), ("4", 0o004)]
)
def test_modes_never_give_permission_to_execute(text: str, mode: int) -> None:
    assert parsed("--mode", text, "-o", "ro").mode == mode


@pytest.mark.parametrize("text", ["1000", "8", "-1", "rw", ""])
def test_what_is_no_mode_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(f"--mode={text}")
    assert caught.value.code == 2
    assert f"{text!r} is no octal mode between 000 and 777" in capsys.readouterr().err


# -- sizes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("4096", 4096), ("1K", 1 << 10), ("32M", 32 << 20), ("1GiB", 1 << 30), ("2TB", 2 << 40),
        ("7k", 7 << 10), ("3gib", 3 << 30), ("5B", 5), ("1.5M", 3 << 19),
        ("2P", 2 << 50),
    ],
)  # fmt: skip
def test_sizes_have_binary_units(text: str, value: int) -> None:
    assert disk_size(text) == value


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1.M", "4 K", "M4", "4KK", "4KiBB", "0x10", "4\n", "4i", "4iB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with raises_exactly(argparse.ArgumentTypeError, f"{text!r} is no size such as 4096, 1.5G or 20GiB"):
        disk_size(text)


def open_options(*words: str) -> OpenOptions:
    """What the words of a command line become, where the command has --read-only."""
    parser = argparse.ArgumentParser()
    image_options.add_arguments(parser)
    parser.add_argument("--read-only", action="store_true")
    return image_options.open_options(parser.parse_args(words))


def test_options_become_open_options() -> None:
    words = ["--no-backing", "--probe-backing", "-U", "--lost-data", "zeros", "--table-cache", "1M"]
    options = open_options(*words, "--data-file", "/d")
    assert (options.backing.refuse_all, options.backing.probe) == (True, True)
    assert (options.force_share, options.lost_data_as_zeros) == (True, True)
    assert (options.table_cache, options.data_file) == (1 << 20, Path("/d"))
    plain = open_options()
    assert (plain.backing.refuse_all, plain.backing.probe, plain.data_file) == (False, False, None)
    assert (plain.force_share, plain.lost_data_as_zeros, plain.table_cache) == (False, False, 32 << 20)


@pytest.mark.parametrize(("words", "writable"), [([], True), (["--read-only"], False), (["-U"], False)])
def test_an_image_is_writable_unless_that_is_not_wanted(words: list[str], writable: bool) -> None:
    assert open_options(*words).writable is writable


def test_lost_data_as_zeros_is_for_reading_only() -> None:
    text = "--lost-data=zeros would write zeros over lost data; add --read-only"
    with raises_exactly(errors.UsageError, text):
        open_options("--lost-data", "zeros")
    assert open_options("--lost-data", "zeros", "--read-only").lost_data_as_zeros


# -- exit codes


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2), (errors.NotQcow2, 2), (errors.ReadOnlyError, 2),
        (errors.UnsupportedFeature, 3), (errors.CorruptImage, 4), (errors.ImageInUse, 5),
        (errors.BackingFileError, 6), (errors.MountError, 7), (errors.BadPassphrase, 8),
        (errors.QcowError, 1),
    ],
)  # fmt: skip
def test_each_error_has_its_exit_code(
    kind: type[errors.QcowError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> NoReturn:
        raise kind("the reason")

    assert exit_code(kind("")) == code
    assert guarded(fail) == code
    assert capsys.readouterr().err == "qcowfs: the reason\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOENT, "No such file or directory", "/gone"), "/gone: No such file or directory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("odd"), "odd"),
    ],
)
def test_an_error_of_the_host_is_one_line_and_exit_code_1(
    error: OSError, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> NoReturn:
        raise error

    assert guarded(fail) == 1
    assert capsys.readouterr().err == f"qcowfs: {text}\n"


def test_an_interrupt_is_exit_code_130() -> None:
    def fail() -> NoReturn:
        raise KeyboardInterrupt

    assert guarded(fail) == 130


def test_a_body_that_succeeds_keeps_its_exit_code() -> None:
    assert guarded(lambda: 0) == 0


def test_a_group_of_errors_is_raised_as_its_first() -> None:
    group = BaseExceptionGroup("outer", [ExceptionGroup("inner", [UsageError("a")]), OSError("b")])
    with raises_exactly(UsageError, "a"), raise_single():
        raise group


def test_a_single_error_passes_as_it_is() -> None:
    with raises_exactly(UsageError, "a"), raise_single():
        raise UsageError("a")


def test_complaints_go_to_standard_error_in_the_name_of_the_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    complain("what")
    assert capsys.readouterr() == ("", "qcowfs: what\n")


# -- the command itself


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: qcowfs")


@pytest.mark.parametrize(
    ("words", "code"), [(["--version"], 0), (["--help"], 0), (["nonsense"], 2), (["--nonsense"], 2),
                        (["info"], 2), (["mount", "only-one"], 2), (["info", "--help"], 0)],
)  # fmt: skip
def test_words_that_argparse_answers(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert (caught.value.code or 0) == code
    out, err = capsys.readouterr()
    assert "qcowfs" in (err if code else out)


def test_info_on_a_missing_image_is_the_hosts_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "gone"
    assert main(["info", str(missing)]) == 1
    assert capsys.readouterr() == ("", f"qcowfs: {missing}: No such file or directory\n")


def test_info_on_another_kind_of_file_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert main(["info", str(path)]) == 2
    text = "is empty; a qcow2 image starts with its header"
    assert capsys.readouterr() == ("", f"qcowfs: {path}: {text}\n")
