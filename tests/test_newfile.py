"""A new file appears whole or not at all, and never over one that is there, unless asked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcowfs.errors import ImageInUse, UsageError
from qcowfs.host import locks
from qcowfs.host.hostfile import OsHostFile
from qcowfs.host.newfile import new_file


@pytest.fixture(params=["nameless", "named"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a host that knows files without a name, and on one that does not."""
    if request.param == "named":
        real = OsHostFile.create

        def create(path: Path, flags: int = os.O_EXCL) -> OsHostFile:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not here")
            return real(path, flags)

        monkeypatch.setattr(OsHostFile, "create", create)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_it_appears_when_it_is_whole(folder: Path) -> None:
    target = folder / "x"
    async with new_file(target) as file:
        await file.write_from([(0, b"all of it")])
        assert not target.exists()
    assert target.read_bytes() == b"all of it"
    assert names(folder) == ["x"]


async def test_nothing_is_left_when_the_block_fails(folder: Path) -> None:
    async def interrupted() -> None:
        async with new_file(folder / "x") as file:
            await file.write_from([(0, b"half of")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await interrupted()
    assert names(folder) == []


async def test_a_taken_name_is_refused_before_and_after(folder: Path) -> None:
    target = folder / "x"
    with pytest.raises(UsageError, match="made by somebody else meanwhile"):
        async with new_file(target):
            target.write_bytes(b"theirs")
    with pytest.raises(UsageError, match="--force replaces it"):
        async with new_file(target):
            pytest.fail("the name is taken")
    assert target.read_bytes() == b"theirs"
    assert names(folder) == ["x"]


async def test_a_replaced_file_keeps_its_permissions_and_its_link(folder: Path) -> None:
    target, link = folder / "x", folder / "link"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    async with new_file(link, force=True) as file:
        await file.write_from([(0, b"new")])
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert link.is_symlink()
    assert names(folder) == ["link", "x"]


async def test_a_file_in_use_is_not_replaced(folder: Path) -> None:
    target = folder / "x"
    target.write_bytes(b"old")
    user = OsHostFile.open(target)
    locks.acquire(user.fd, user.name, locks.READER)
    with pytest.raises(ImageInUse):
        async with new_file(target, force=True):
            pytest.fail("it is in use")
    user.close()
    assert target.read_bytes() == b"old"


async def test_a_folder_or_fifo_is_not_replaced(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(UsageError, match="no regular file"):
            async with new_file(folder / name, force=True):
                pytest.fail("it cannot be replaced")
