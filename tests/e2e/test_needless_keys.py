"""Passphrases that no image needs: a name that is none's is wrong usage, one for a plain image a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.encrypted import locked
from tests.e2e.mounts import mounted, refusal
from tests.e2e.tools import KIB, create, qcowfs

SIZE = 64 * KIB
COMMANDS = {
    "mount": "mount --dry-run {image} {folder}",
    "map": "map {image}",
    "map --picture": "map --picture {target}.svg {image}",
    "measure": "measure {image}",
    "compare": "compare {image} {base}",
    "convert": "convert {image} {target}",
    "create": "create -b {base} -F qcow2 {target}",
    "resize": "resize {image} +64K",
    "snapshot": "snapshot create {image} name",
    "commit": "commit {image}",
    "rebase": "rebase -b {base} -F qcow2 {image}",
}
NAME = "--key-file {name}={key}"


class Place:
    """A plain overlay of a plain image, a key, and a folder."""

    def __init__(self, folder: Path) -> None:
        self.base = create(folder / "base.qcow2", SIZE)
        self.image = create(folder / "vm.qcow2", SIZE, "-b", self.base, "-F", "qcow2")
        self.target = folder / "new.qcow2"
        self.key = folder / "secret.key"
        self.key.write_bytes(b"a secret")
        self.folder = folder / "here"
        self.folder.mkdir()

    def words(self, command: str, **more: str) -> list[str]:
        return command.format(**vars(self), **more).split()

    def images(self) -> list[bytes]:
        return [self.base.read_bytes(), self.image.read_bytes()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_no_image_has_is_wrong_usage_and_nothing_is_done(command: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    before = place.images()
    result = qcowfs(*place.words(f"{COMMANDS[command]} {NAME}", name="bsae.qcow2"))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("qcowfs: --key-file bsae.qcow2=FILE: names none of ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert place.images() == before
    assert not place.target.exists()
    assert not place.target.with_suffix(".qcow2.svg").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_passphrase_for_a_plain_image_is_a_warning(command: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    result = qcowfs(*place.words(f"{COMMANDS[command]} {NAME}", name="base.qcow2"))
    assert result.returncode == 0, result.stderr
    text = f"{place.base}: is not encrypted; the passphrase given for it is not used\n"
    assert result.stderr == f"qcowfs: {text}"


def test_a_passphrase_for_a_new_image_without_encryption_is_a_warning(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for words in ("create {target} 1M", "convert --force {image} {target}"):
        result = qcowfs(*place.words(f"{words} --key-file {{key}}"))
        assert result.returncode == 0
        assert result.stderr.startswith(f"qcowfs: {place.target}")
        assert result.stderr.endswith(": not encrypted; the passphrase given is not used\n")


def test_a_mount_tells_of_a_passphrase_that_it_does_not_need(tmp_path: Path) -> None:
    place = Place(tmp_path)
    named = place.words(NAME, name="other")
    result = refusal(place.image, place.folder, *named)
    text = f"qcowfs: --key-file other=FILE: names none of {place.image}, {place.base}\n"
    assert (result.returncode, result.stderr) == (2, text)
    with mounted(place.image, "--key-file", place.key) as mount:
        text = f"WARNING {place.image}, {place.base}: not encrypted; the passphrase given is not used"
        assert mount.take_complaints() == [text]
        assert "a secret" not in mount.log_file.read_text()


@pytest.mark.parametrize("action", ["add", "remove"])
def test_a_key_is_changed_only_by_a_name_that_is_the_images(action: str, tmp_path: Path) -> None:
    made = locked(tmp_path, "vm", SIZE)
    before = made.image.read_bytes()
    new = ("--new-key-file", made.key) if action == "add" else ()
    keys = ("--key-file", made.key, "--key-file", f"base.qcow2={made.key}")
    result = qcowfs("key", action, made.image, *keys, *new)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"qcowfs: --key-file base.qcow2=FILE: names none of {made.image}\n"
    assert made.image.read_bytes() == before
