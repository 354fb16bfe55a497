"""What end-to-end tests share: nothing they mounted or attached may outlive the run; slow-to-make images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import loop_devices, mount_points
from tests.e2e.tools import attempt


@pytest.fixture(scope="session", autouse=True)
def modules_are_compiled_once() -> Iterator[None]:
    """Commands start as they do where qcowfs is installed; other users, too, find what root compiled."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        patch.setenv("PYTHONPYCACHEPREFIX", folder)
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the last test of the run, after clearing up, if a mount or a loop device is left."""
    base = tmp_path_factory.getbasetemp()
    yield
    mounts, loops = mount_points(base), loop_devices(base)
    for folder in mounts:
        attempt("umount", "-l", folder)
    for device in loops:
        attempt("losetup", "-d", device)
    assert (mounts, loops) == ([], [])


@pytest.fixture(scope="session")
def encrypted_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image of each kind of encryption; made once, since LUKS takes seconds."""
    folder = tmp_path_factory.mktemp("encrypted")
    secret = ("--object", "secret,id=key,data=passphrase")
    images = {}
    for kind, fields in (("aes", {}), ("luks", {"encrypt.iter-time": 10, "encrypt.hash-alg": "sha512"})):
        images[kind] = folder / f"{kind}.qcow2"
        options = {"encrypt.format": kind, "encrypt.key-secret": "key"} | fields
        assert any(_created(images[kind], secret, options) for _ in range(20))
    return images


def _created(image: Path, secret: tuple[str, ...], options: dict[str, object]) -> bool:
    """Whether the image was made; QEMU now and then finds its clock too coarse to choose LUKS's effort."""
    words = ",".join(f"{name}={value}" for name, value in options.items())
    result = attempt("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", words, image, "1M")
    assert result.returncode == 0 or "Unable to get accurate CPU usage" in result.stderr, result.stderr
    return result.returncode == 0
