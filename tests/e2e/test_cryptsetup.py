"""LUKS areas by cryptsetup: qcowfs opens what it makes, and it opens what qcowfs makes.

cryptsetup judges headers, key slots and master keys, for which it needs no help of the kernel. It reads
sectors only by dm-crypt, so what lies in them is judged by QEMU, and by OpenSSL: with AES-192 in CBC, QEMU's
tools abort. OpenSSL, by which cryptsetup works, has no AES-192 in XTS; QEMU judges that elsewhere.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from qcowfs.codecs.luks_keys import make_luks_volume
from qcowfs.format import extensions as ext
from qcowfs.format.header import Header
from qcowfs.format.luks import unpack_pointer
from tests.e2e.encrypted import PASSPHRASE, Locked
from tests.e2e.mounts import mounted
from tests.e2e.tools import MIB, Word, assert_same, attempt, cluster_size, host_offset, qcowfs, raw_file, run
from tests.e2e.writes import write_to_both

CRYPTSETUP = "cryptsetup"
SECTOR = 512
SIZE = MIB + 3 * SECTOR
QUICK = ("--pbkdf-force-iterations", "1000")
FORMS = {
    "aes-192-cbc-essiv": ("aes-cbc-essiv:sha256", 192, "sha256"),
    "aes-192-cbc-plain64": ("aes-cbc-plain64", 192, "sha1"),
    "aes-128-cbc-plain": ("aes-cbc-plain", 128, "ripemd160"),
    "aes-256-cbc-essiv": ("aes-cbc-essiv:sha256", 256, "sha512"),
    "aes-128-xts": ("aes-xts-plain64", 256, "sha1"),
    "aes-256-xts": ("aes-xts-plain64", 512, "sha256"),
}
QEMU_ABORTS = ("aes-192-cbc-essiv", "aes-192-cbc-plain64")
"""Their key material ends within a sector, which QEMU takes for impossible."""


@dataclass(frozen=True)
class Container:
    """A file that holds a LUKS area at its start, as cryptsetup has it."""

    file: Path

    def opens(self, key: Path) -> bool:
        """Whether the key file opens a key slot."""
        return attempt(CRYPTSETUP, "open", "--test-passphrase", "--key-file", key, self.file).returncode == 0

    def master_key(self, key: Path) -> bytes:
        volume_key = self.file.with_suffix(".master")
        words = ("luksDump", "-q", "--dump-master-key", "--master-key-file", volume_key, "--key-file", key)
        run(CRYPTSETUP, *words, self.file)
        try:
            return volume_key.read_bytes()
        finally:
            volume_key.unlink()

    def slots_in_use(self) -> list[int]:
        lines = run(CRYPTSETUP, "luksDump", self.file).stdout.splitlines()
        return [int(line.split()[2][:-1]) for line in lines if line.endswith(": ENABLED")]

    def add(self, key: Path, new: Path) -> None:
        run(CRYPTSETUP, "luksAddKey", "-q", *QUICK, "--key-file", key, self.file, new)


def container(folder: Path, key: Path, cipher: str, bits: int, hash_name: str) -> Container:
    """A container that cryptsetup made."""
    file = folder / "container"
    file.write_bytes(bytes(8 * MIB))
    form: list[Word] = ["--type", "luks1", "-c", cipher, "-s", str(bits), "-h", hash_name]
    run(CRYPTSETUP, "luksFormat", "-q", *form, *QUICK, "--key-file", key, file)
    return Container(file)


def image_of(made: Container, key: Path) -> Locked:
    """An image whose LUKS area is that of the container, in the place of a larger one."""
    image = Locked(made.file.with_name("image.qcow2"), key)
    words = (
        "create",
        "-q",
        "--encrypt",
        "luks",
        "--iter-time",
        "1",
        "--key-file",
        key,
        image.image,
        str(SIZE),
    )
    result = qcowfs(*words)
    assert (result.returncode, result.stderr) == (0, "")
    put_back(made, image)
    return image


def place_of_area(image: Path) -> tuple[int, int]:
    """Where an image's LUKS area lies, and how long it is."""
    pointer = Header.unpack(image.read_bytes()[:65536]).extension(ext.ENCRYPTION_HEADER)
    assert pointer is not None
    return unpack_pointer(pointer)


def taken_out(made: Locked) -> Container:
    """An image's LUKS area in a file of its own."""
    offset, length = place_of_area(made.image)
    file = made.image.with_suffix(".area")
    file.write_bytes(made.image.read_bytes()[offset : offset + length].ljust(8 * MIB, b"\0"))
    return Container(file)


def put_back(area: Container, made: Locked) -> None:
    offset, length = place_of_area(made.image)
    data = bytearray(made.image.read_bytes())
    data[offset : offset + length] = area.file.read_bytes()[:length]
    made.image.write_bytes(data)


def key_in(folder: Path, name: str) -> Path:
    key = folder / f"{name}.key"
    key.write_bytes(PASSPHRASE + name.encode())
    return key


# -- sectors by OpenSSL, each by itself


def openssl(cipher: str, key: bytes, data: bytes, *words: str) -> bytes:
    command = ["openssl", "enc", f"-{cipher}", "-K", key.hex(), "-nopad", *words]
    return subprocess.run(command, input=data, capture_output=True, check=True, timeout=60).stdout


def decrypted(sector: bytes, number: int, key: bytes, generator: str) -> bytes:
    """A sector that AES in CBC encrypted."""
    iv = number.to_bytes(16, "little")
    if generator == "essiv:sha256":
        iv = openssl("aes-256-ecb", sha256(key).digest(), iv, "-e")
    return openssl(f"aes-{len(key) * 8}-cbc", key, sector, "-d", "-iv", iv.hex())


def assert_same_by_openssl(made: Locked, twin: Path, key: bytes, generator: str) -> None:
    """Fail unless sectors all over the image hold what the twin does, numbered by the host's offsets."""
    data, content = made.image.read_bytes(), twin.read_bytes()
    for guest in range(0, SIZE, 37 * SECTOR):
        host = host_offset(made.image, guest) + guest % cluster_size(made.image)
        plain = decrypted(data[host : host + SECTOR], host // SECTOR, key, generator)
        assert plain == content[guest : guest + SECTOR], guest


@pytest.mark.parametrize("name", FORMS)
def test_an_area_that_cryptsetup_made_serves_an_image(name: str, tmp_path: Path) -> None:
    key, wrong = key_in(tmp_path, "right"), key_in(tmp_path, "wrong")
    area = container(tmp_path, key, *FORMS[name])
    made = image_of(area, key)
    twin = raw_file(tmp_path / "twin", SIZE, name)
    with mounted(made.image, "--key-file", key, writable=True) as mount:
        mount.disk.write_bytes(twin.read_bytes())
        write_to_both(mount.disk, twin, name, 5)
        assert_same(mount.disk, twin)
    with mounted(made.image, "--key-file", key) as mount:
        assert_same(mount.disk, twin)
    if "cbc" in name:
        generator = FORMS[name][0].split("-")[2]
        assert_same_by_openssl(made, twin, area.master_key(key), generator)
    if name not in QEMU_ABORTS:
        made.assert_sound_and_same(twin)
    assert qcowfs("map", "--key-file", wrong, made.image).returncode == 8


@pytest.mark.parametrize("name", FORMS)
def test_an_area_that_we_made_opens_by_cryptsetup(name: str, tmp_path: Path) -> None:
    cipher, bits, hash_name = FORMS[name]
    key = key_in(tmp_path, "right")
    cipher, _, mode = cipher.partition("-")
    made = make_luks_volume(
        key.read_bytes(), cipher=cipher, mode=mode, key_bytes=bits // 8, hash_name=hash_name, iter_time=0
    )
    area = Container(tmp_path / "area")
    area.file.write_bytes(made.area.ljust(8 * MIB, b"\0"))
    assert area.opens(key)
    assert not area.opens(key_in(tmp_path, "wrong"))
    assert area.master_key(key) == made.master_key


@pytest.mark.parametrize("name", ["aes-192-cbc-essiv", "aes-256-xts"])
def test_keys_are_added_and_removed_by_both_in_turn(name: str, tmp_path: Path) -> None:
    first, ours, theirs = (key_in(tmp_path, word) for word in ("first", "ours", "theirs"))
    made = image_of(container(tmp_path, first, *FORMS[name]), first)
    master_key = taken_out(made).master_key(first)
    added = qcowfs(
        "key",
        "add",
        made.image,
        "--key-file",
        first,
        "--new-key-file",
        ours,
        "--iter-time",
        "1",
        "--slot",
        "6",
    )
    assert added.returncode == 0, added.stderr
    area = taken_out(made)
    assert area.slots_in_use() == [0, 6]
    assert area.master_key(ours) == master_key
    area.add(ours, theirs)
    put_back(area, made)
    removed = qcowfs("key", "remove", made.image, "--key-file", theirs, "--slot", "0")
    assert removed.returncode == 0, removed.stderr
    area = taken_out(made)
    assert area.slots_in_use() == [1, 6]
    assert [area.opens(key) for key in (first, ours, theirs)] == [False, True, True]
    assert area.master_key(theirs) == master_key
