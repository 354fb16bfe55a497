"""LUKS images for tests: an image without content that QEMU made, given a LUKS area of ours.

QEMU's own way takes long, and at times for ever: it measures its processor time to choose LUKS's effort.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

from qcowfs.codecs.luks_keys import make_luks_volume
from qcowfs.format import extensions as ext
from qcowfs.format.extensions import Extension
from qcowfs.format.header import CRYPT_LUKS, Header
from qcowfs.format.luks import pack_pointer

ITER_TIME = 0.001


def encrypt_by_luks(image: Path, passphrase: bytes, secret: str, **fields: object) -> None:
    """Turn an empty image into one encrypted by LUKS; QEMU then counts the area's clusters.

    `secret` is how QEMU's tools are given the passphrase, `fields` are those of `make_luks_volume`.
    """
    data = bytearray(image.read_bytes())
    header = Header.unpack(bytes(data))
    size = header.geometry.cluster_size
    volume = make_luks_volume(passphrase, iter_time=ITER_TIME, **fields)  # type: ignore[arg-type]
    offset = header.geometry.cluster_round_up(len(data))
    pointer = Extension(ext.ENCRYPTION_HEADER, pack_pointer(offset, volume.length))
    kept = tuple(e for e in header.extensions if e.kind != ext.FEATURE_NAMES)
    first = replace(header, crypt_method=CRYPT_LUKS, extensions=(*kept, pointer)).pack()
    data[:size] = first.ljust(size, b"\0")
    area = volume.area.ljust(header.geometry.cluster_round_up(volume.length), b"\0")
    image.write_bytes(bytes(data).ljust(offset, b"\0") + area)
    encryption = {"format": "luks", "key-secret": "key"}
    alone = {"driver": "qcow2", "file.filename": str(image), "backing": None, "encrypt": encryption}
    opened = f"json:{json.dumps(alone)}"
    command = ["qemu-img", "check", "-q", "-r", "all", "--object", secret, opened]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
