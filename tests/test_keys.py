"""Which passphrase belongs to which image, and what is said of passphrases that nothing needs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from qcowfs.disk import keys as keys_module
from qcowfs.disk.image import OpenOptions
from qcowfs.disk.keys import CREDENTIAL, MAX_KEY_SIZE, Keys, checked_key, read_key
from qcowfs.errors import UsageError
from tests.asserting import raises_exactly
from tests.memory import FOLDER, MemoryFolder
from tests.shapes import DISK, KEY, Shape, make

IMAGE = "/images/vm.qcow2"
ADVICE = (
    "vm: is encrypted (LUKS); give its passphrase by --key-file FILE, by --key-fd N, or as the systemd "
    "credential qcowfs.key"
)


def get(keys: Keys, image: str | Path = IMAGE) -> bytes:
    return keys.get(str(image), "vm", "LUKS")


# -- which one


def test_a_name_or_a_path_goes_before_what_is_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.qcow2").symlink_to("images/real.qcow2")
    keys = Keys({"vm.qcow2": b"by name", "images/real.qcow2": b"by path"}, b"for all")
    assert get(keys) == get(keys, "/elsewhere/vm.qcow2") == b"by name"
    assert get(keys, tmp_path / "images/real.qcow2") == get(keys, tmp_path / "link.qcow2") == b"by path"
    assert get(keys, "/elsewhere/real.qcow2") == b"for all"


def test_credentials_come_after_what_is_given_the_images_own_first(tmp_path: Path) -> None:
    (tmp_path / CREDENTIAL).write_bytes(b"any image's")
    assert get(Keys(credentials=tmp_path)) == b"any image's"
    (tmp_path / "vm.qcow2.key").write_bytes(b"its own")
    assert get(Keys(credentials=tmp_path)) == b"its own"
    assert get(Keys(credentials=tmp_path), "/images/other.qcow2") == b"any image's"
    assert get(Keys(default=b"given", credentials=tmp_path)) == b"given"


def test_somebody_is_asked_last_and_once_an_image(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(label: str) -> bytes:
        asked.append(label)
        return b"typed"

    keys = Keys(credentials=tmp_path, ask=ask)
    assert get(keys) == get(keys) == b"typed"
    assert keys.get("/images/new.qcow2", "new", "LUKS", lambda label: label.encode() * 2) == b"newnew"
    assert asked == ["vm"]
    (tmp_path / CREDENTIAL).write_bytes(b"found")
    assert get(Keys(credentials=tmp_path, ask=ask)) == b"found"
    assert asked == ["vm"]


@pytest.mark.parametrize("keys", [Keys(), Keys(ask=lambda _: None), Keys({"other.qcow2": b"x"})])
def test_without_a_passphrase_one_line_tells_how_to_give_one(keys: Keys) -> None:
    with raises_exactly(UsageError, ADVICE):
        get(keys)


def test_a_passphrase_is_the_whole_content_of_its_file(tmp_path: Path) -> None:
    for content in (b"", b"pass\n", b"\0\xff" * 1000, b"x" * MAX_KEY_SIZE):
        (tmp_path / "key").write_bytes(content)
        assert read_key(tmp_path / "key") == content == checked_key(content, "fd 3")
    (tmp_path / "key").write_bytes(b"x" * (MAX_KEY_SIZE + 1))
    with raises_exactly(UsageError, f"{tmp_path / 'key'}: a key has at most 8 MiB"):
        read_key(tmp_path / "key")


def test_no_passphrase_shows_when_keys_are_printed() -> None:
    assert "secret" not in repr(Keys({"vm.qcow2": b"secret"}, b"secret"))


# -- what nothing needs


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == keys_module.log.name]
    assert all(r.levelno == logging.WARNING for r in caplog.records)
    caplog.clear()
    return found


def test_a_name_that_no_file_has_is_wrong_usage() -> None:
    keys = Keys({"vm.qcow2": b"a", "bsae.qcow2": b"secret"})
    get(keys)
    keys.note("/images/base.qcow2", encrypted=False)
    names = "/images/vm.qcow2, /images/base.qcow2"
    with raises_exactly(UsageError, f"--key-file bsae.qcow2=FILE: names none of {names}"):
        keys.check_use()


def test_of_a_long_chain_only_some_names_are_told() -> None:
    keys = Keys({"vm": b""})
    for number in range(10):
        keys.note(f"{number}", encrypted=False)
    expected = "--key-file vm=FILE: names none of 0, 1, 2, 3, 4, 5, 6, 7 and 2 more files"
    with raises_exactly(UsageError, expected):
        keys.check_use()


def test_a_passphrase_for_a_file_that_is_not_encrypted_is_worth_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = Keys({"base.raw": b"secret"})
    keys.note(IMAGE, encrypted=True)
    keys.note("/images/base.raw", encrypted=False)
    keys.check_use()
    text = "/images/base.raw: is not encrypted; the passphrase given for it is not used"
    assert warnings(caplog) == [text]


def test_a_passphrase_for_all_files_is_worth_a_warning_where_none_is_encrypted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = Keys(default=b"secret")
    keys.check_use()
    keys.note(IMAGE, encrypted=False)
    keys.note("base", encrypted=False)
    keys.check_use()
    assert warnings(caplog) == [f"{IMAGE}, base: not encrypted; the passphrase given is not used"]
    get(keys, "third")
    keys.check_use()
    assert warnings(caplog) == []


def test_credentials_and_a_terminal_need_no_encrypted_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / CREDENTIAL).write_bytes(b"x")
    keys = Keys(credentials=tmp_path, ask=os.fsencode)
    keys.note(IMAGE, encrypted=False)
    keys.check_use()
    assert warnings(caplog) == []


@pytest.mark.parametrize("encryption", [None, "luks"])
async def test_every_file_of_a_chain_counts(encryption: str | None, caplog: pytest.LogCaptureFixture) -> None:
    made = make(Shape(cluster_size=4096, size=64 << 10, base=5000, encryption=encryption))
    folder = MemoryFolder(made.files)
    keys = Keys({DISK: KEY.encode(), "base.raw": b""})
    await folder.image(DISK, OpenOptions(keys=keys))
    keys.check_use()
    plain = [FOLDER / "base.raw"] if encryption else [FOLDER / DISK, FOLDER / "base.raw"]
    texts = [f"{path}: is not encrypted; the passphrase given for it is not used" for path in plain]
    assert warnings(caplog) == texts
