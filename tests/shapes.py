"""Images of many shapes, made and partly filled by QEMU's tools, as bytes for host files in memory.

A shape is what differs between images that are written to: format version, sizes, and what is there before.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qcowfs.disk.image import Image, OpenOptions
from qcowfs.disk.keys import Keys
from qcowfs.testing import MemoryHostFile
from tests.luks_images import encrypt_by_luks
from tests.memory import FOLDER, MemoryFolder

SECTOR = 512
DISK, BASE, SNAPSHOT = "disk.qcow2", "base.raw", "before"
KEY = "a passphrase"
_SECRET = ("--object", f"secret,id=key,data={KEY}")
_TOO_COARSE = "Unable to get accurate CPU usage"


@dataclass(frozen=True)
class Shape:
    """How `qemu-img create` is called and what `qemu-io` does next; `base` is the backing file's size.

    The first `bulk` bytes of the disk are written whole. `encryption` is its format, luks or aes.
    """

    cluster_size: int = 65536
    size: int = 768 * 1024 + 3 * SECTOR
    version: int = 3
    refcount_bits: int = 16
    extended_l2: bool = False
    base: int | None = None
    snapshot: bool = False
    filled: bool = True
    bulk: int = 0
    encryption: str | None = None

    @property
    def options(self) -> str:
        """What `qemu-img create -o` takes."""
        values = [f"cluster_size={self.cluster_size}", f"compat={'1.1' if self.version == 3 else '0.10'}"]
        if self.version == 3:
            extended = "on" if self.extended_l2 else "off"
            values += [f"refcount_bits={self.refcount_bits}", f"extended_l2={extended}"]
        if self.base is not None:
            values += [f"backing_file={BASE}", "backing_fmt=raw"]
        if self.encryption == "aes":
            values += ["encrypt.format=aes", "encrypt.key-secret=key"]
        return ",".join(values)

    def opened(self, disk: Path) -> list[str]:
        """The words by which QEMU's tools open the image."""
        if self.encryption is None:
            return ["--image-opts", f"driver=qcow2,file.filename={disk}"]
        return [*_SECRET, "--image-opts", f"driver=qcow2,file.filename={disk},encrypt.key-secret=key"]

    @property
    def discards_keep_content(self) -> bool:
        """Whether the format has no way to say that a discarded cluster hides the backing file."""
        return self.version == 2 and self.base is not None


@dataclass(frozen=True)
class Made:
    """The files of an image, and what its live disk and its snapshot read as."""

    shape: Shape
    files: dict[str, bytes]
    content: bytes
    snapshot: bytes | None

    def folder(self, disk: bytes | None = None) -> MemoryFolder:
        """The files in memory, with another image file in the place of the one made."""
        return MemoryFolder(self.files if disk is None else self.files | {DISK: disk})

    def save(self, disk: bytes, folder: Path) -> Path:
        """Write the files to a folder of the host; the path of the image file."""
        for name, data in (self.files | {DISK: disk}).items():
            (folder / name).write_bytes(data)
        return folder / DISK


@dataclass
class OpenDisk:
    """A writable image of a folder in memory."""

    image: Image
    file: MemoryHostFile

    @property
    def size(self) -> int:
        """Bytes of the live disk, as of now."""
        return self.image.size

    async def read(self, guest: int, length: int) -> bytes:
        buffer = bytearray(b"\xa5" * length)
        await self.image.active.read_into(guest, memoryview(buffer))
        return bytes(buffer)


async def open_disk(folder: MemoryFolder, options: OpenOptions | None = None) -> OpenDisk:
    """Open the folder's image for writing; its log starts anew."""
    wanted = replace(
        options or OpenOptions(), writable=True, open_writable=folder.open, keys=Keys(default=KEY.encode())
    )
    file = folder.files[DISK]
    file.log.clear()
    image = await Image.open(FOLDER / DISK, replace(wanted, open_host=folder.open))
    return OpenDisk(image, file)


def qemu(*command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run one of QEMU's tools, which has to end with one of the exit codes; what it printed."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode in codes, f"{words}: {result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout


@cache
def make(shape: Shape, seed: int = 0) -> Made:
    """An image of that shape, with some clusters of every kind."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        disk = folder / DISK
        if shape.base is not None:
            (folder / BASE).write_bytes(rng.randbytes(shape.base))
        create(disk, shape)
        if shape.bulk:
            qemu("qemu-io", "-c", f"write -P 1 0 {shape.bulk}", *shape.opened(disk))
        if shape.filled:
            if shape.encryption is None:
                pack(disk, shape, rng)
            fill(disk, shape, rng)
        if shape.snapshot:
            qemu("qemu-img", "snapshot", "-c", SNAPSHOT, *shape.opened(disk))
        if shape.snapshot and shape.filled:
            fill(disk, shape, rng)
        snapshot = _raw(shape, folder, "-l", SNAPSHOT) if shape.snapshot else None
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in (DISK, BASE)}
        return Made(shape, files, _raw(shape, folder), snapshot)


def create(disk: Path, shape: Shape) -> None:
    """Make the image without content."""
    secret = _SECRET if shape.encryption else ()
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", shape.options, disk, str(shape.size))
    if shape.encryption == "luks":
        encrypt_by_luks(disk, KEY.encode(), _SECRET[1])


def fill(disk: Path, shape: Shape, rng: random.Random) -> None:
    """Write data and zeros to random places by qemu-io."""
    clusters = shape.size // shape.cluster_size
    commands: list[str] = []
    for _ in range(6):
        start, most = rng.randrange(clusters), max(1, clusters // 6)
        length = shape.cluster_size * min(rng.randint(1, most), clusters - start)
        kind = rng.choice(["write", "write", "write -z", "write -z -u", "partly"])
        at = start * shape.cluster_size
        if kind == "partly":
            commands += ["-c", f"write -P {rng.randrange(1, 255)} {at} {SECTOR}"]
        else:
            pattern = "" if "-z" in kind else f"-P {rng.randrange(1, 255)}"
            commands += ["-c", f"{kind} {pattern} {at} {length}"]
    qemu("qemu-io", *commands, *shape.opened(disk))


def pack(disk: Path, shape: Shape, rng: random.Random) -> None:
    """Write compressed clusters to random places, several to a host cluster."""
    clusters = shape.size // shape.cluster_size
    commands: list[str] = []
    most = min(12, ((1 << shape.refcount_bits) - 1) // 2) if shape.snapshot else 12
    for number in rng.sample(range(shape.bulk // shape.cluster_size, clusters), min(most, clusters // 2)):
        at = number * shape.cluster_size
        commands += ["-c", f"write -c -P {rng.randrange(1, 255)} {at} {shape.cluster_size}"]
    qemu("qemu-io", "-f", "qcow2", *commands, disk)


def _raw(shape: Shape, folder: Path, *which: str) -> bytes:
    """The live disk or a snapshot as QEMU reads it."""
    out = folder / "out.raw"
    qemu("qemu-img", "convert", "-O", "raw", *which, *shape.opened(folder / DISK), out)
    content = out.read_bytes()
    out.unlink()
    return content
