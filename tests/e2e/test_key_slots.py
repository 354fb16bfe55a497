"""`qcowfs key`: keys that qcowfs adds open the image for QEMU, and what it removes opens nothing."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from qcowfs.format.luks import MAGIC, REMOVAL_ITERATIONS, SLOT_ACTIVE, SWITCH_SIZE, slot_position
from tests.e2e.encrypted import Locked, locked, refused_by_qemu
from tests.e2e.mounts import mounted
from tests.e2e.tools import MIB, assert_same, attempt, create, qcowfs, raw_file


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Locked:
    """An image with content; made once, since LUKS takes seconds."""
    made = locked(tmp_path_factory.mktemp("original"), "a", MIB)
    made.fill(raw_file(made.image.parent / "raw", MIB, "keys"))
    return made


@pytest.fixture
def made(original: Locked, tmp_path: Path) -> Locked:
    """A copy of that image."""
    copy = replace(original, image=tmp_path / "a.qcow2")
    copy.image.write_bytes(original.image.read_bytes())
    return copy


def other_key(folder: Path) -> Path:
    key = folder / "other.key"
    key.write_bytes(b"\xc3\xa4nother")
    return key


def add(made: Locked, new: Path, *words: str) -> str:
    options = ("--key-file", made.key, "--new-key-file", new, "--iter-time", "1")
    return qcowfs("key", "add", made.image, *options, *words).stdout


def slots_in_use(made: Locked) -> list[int]:
    listed = json.loads(qcowfs("key", "list", made.image, "--json").stdout)
    return [slot["slot"] for slot in listed if slot["active"]]


def test_a_key_that_is_added_opens_the_image_for_everyone(made: Locked, tmp_path: Path) -> None:
    other = other_key(tmp_path)
    assert add(made, other) == "key slot 1 has the new key\n"
    assert add(made, other, "--slot", "7") == "key slot 7 has the new key\n"
    assert slots_in_use(made) == [0, 1, 7]
    for key in (made.key, other):
        replace(made, key=key).assert_sound_and_same(made.key.parent / "raw")
        with mounted(made.image, "--key-file", key) as mount:
            assert_same(mount.disk, made.key.parent / "raw")


def test_a_key_that_qemu_adds_opens_the_image_here(made: Locked, tmp_path: Path) -> None:
    other = other_key(tmp_path)
    change = "encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=10"
    words = [*made.secrets(), "--object", f"secret,id=new,file={other}", "-o", change]
    for _ in range(30):
        result = attempt("qemu-img", "amend", *words, "--image-opts", made.options())
        if result.returncode == 0:
            break
        assert "accurate CPU usage" in result.stderr
    assert slots_in_use(made) == [0, 1]
    with mounted(made.image, "--key-file", other) as mount:
        assert_same(mount.disk, made.key.parent / "raw")


def test_a_key_that_is_removed_opens_nothing_any_more(made: Locked, tmp_path: Path) -> None:
    other = other_key(tmp_path)
    add(made, other)
    result = qcowfs("key", "remove", made.image, "--key-file", made.key)
    assert (result.returncode, result.stdout) == (0, "key slot 0 is empty\n")
    assert slots_in_use(made) == [1]
    assert refused_by_qemu(made)
    replace(made, key=other).assert_sound_and_same(made.key.parent / "raw")
    assert qcowfs("key", "remove", made.image, "--key-file", made.key).returncode == 8


def test_a_removal_that_was_cut_short_is_shown_as_such(made: Locked, tmp_path: Path) -> None:
    add(made, other_key(tmp_path))
    data = bytearray(made.image.read_bytes())
    area = data.index(MAGIC)
    cut_short = struct.pack(">II", SLOT_ACTIVE, REMOVAL_ITERATIONS)
    data[area + slot_position(0) : area + slot_position(0) + SWITCH_SIZE] = cut_short
    made.image.write_bytes(data)
    first = qcowfs("key", "list", made.image).stdout.splitlines()[0]
    assert first == "0: its removal was cut short; remove it again"
    assert refused_by_qemu(made)
    result = qcowfs("key", "remove", made.image, "--key-file", other_key(tmp_path), "--slot", "0")
    assert (result.returncode, result.stdout) == (0, "key slot 0 is empty\n")


def test_the_last_key_stays(made: Locked) -> None:
    before = made.image.read_bytes()
    result = qcowfs("key", "remove", made.image, "--key-file", made.key)
    text = f"qcowfs: {made.image}: key slot 0 has the last key; add another one first\n"
    assert (result.returncode, result.stderr) == (2, text)
    assert made.image.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("add", "--slot", "0"), "key slot 0 is in use; remove its key first"),
        (("add", "--slot", "8"), "has key slots 0 to 7, none of number 8"),
        (("remove", "--slot", "3"), "key slot 3 is not in use"),
    ],
)
def test_a_slot_that_does_not_fit_is_wrong_usage(
    words: tuple[str, ...], text: str, made: Locked, tmp_path: Path
) -> None:
    new = ("--new-key-file", other_key(tmp_path)) if words[0] == "add" else ()
    result = qcowfs("key", words[0], made.image, "--key-file", made.key, *words[1:], *new)
    assert (result.returncode, result.stderr) == (2, f"qcowfs: {made.image}: {text}\n")


def test_nothing_is_changed_while_the_image_is_in_use(made: Locked, tmp_path: Path) -> None:
    with mounted(made.image, "--key-file", made.key):
        options = ("--key-file", made.key, "--new-key-file", other_key(tmp_path))
        assert qcowfs("key", "add", made.image, *options).returncode == 5


def test_an_image_without_luks_has_no_key_slots(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    result = qcowfs("key", "list", image)
    text = f"qcowfs: {image}: has no key slots, since it is not encrypted by LUKS\n"
    assert (result.returncode, result.stderr) == (3, text)
