"""Encrypted images by QEMU's tools: made, filled, changed and read with a passphrase from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.tools import attempt, run
from tests.luks_images import encrypt_by_luks

PASSPHRASE = b"pass, phrase"


@dataclass(frozen=True)
class Locked:
    """An encrypted image, the file that holds its passphrase, and the encrypted image below it."""

    image: Path
    key: Path
    below: Locked | None = None

    def secrets(self, number: int = 0) -> list[str]:
        """The words that give QEMU's tools every passphrase of the chain."""
        words = ["--object", f"secret,id=key{number},file={self.key}"]
        return words + (self.below.secrets(number + 1) if self.below else [])

    def options(self, prefix: str = "", number: int = 0) -> str:
        """How QEMU's tools open the image."""
        words = (
            f"{prefix}driver=qcow2,{prefix}file.filename={self.image},{prefix}encrypt.key-secret=key{number}"
        )
        return words + ("," + self.below.options(f"{prefix}backing.", number + 1) if self.below else "")

    def io(self, *commands: str) -> None:
        """Run qemu-io commands; each must succeed."""
        words = [word for command in commands for word in ("-c", command)]
        result = run("qemu-io", *self.secrets(), *words, "--image-opts", self.options())
        assert "failed" not in result.stdout, result.stdout

    def as_raw(self, raw: Path, *words: str) -> Path:
        """What QEMU reads, of the live disk or by `-l` of a snapshot."""
        run("qemu-img", "convert", "-O", "raw", *words, *self.secrets(), "--image-opts", self.options(), raw)
        return raw

    def fill(self, raw: Path) -> None:
        """Write a raw file's content to the disk by QEMU."""
        run("qemu-img", "convert", "-n", *self.secrets(), "--target-image-opts", raw, self.options())

    def fill_compressed(self, raw: Path) -> None:
        """Write a raw file's content to the disk by QEMU, as compressed clusters where they shrink."""
        words = ("convert", "-n", "-c", *self.secrets(), "--target-image-opts")
        run("qemu-img", *words, raw, self.options())

    def take_snapshot(self, name: str) -> None:
        run("qemu-img", "snapshot", "-c", name, *self.secrets(), "--image-opts", self.options())

    def assert_sound_and_same(self, raw: Path) -> None:
        """Fail unless QEMU finds no fault and the content of a raw file."""
        run("qemu-img", "check", *self.secrets(), "--image-opts", self.options())
        compare = ("qemu-img", "compare", *self.secrets(), "--image-opts", self.options())
        assert run(*compare, f"driver=raw,file.filename={raw}").stdout == "Images are identical.\n"


def locked(
    folder: Path, name: str, size: int, kind: str = "luks", *, volume: Mapping[str, object] | None = None,
    **fields: object,
) -> Locked:  # fmt: skip
    """A new encrypted image; `fields` are creation options, `volume` has those of the LUKS area."""
    key = folder / f"{name}.key"
    key.write_bytes(PASSPHRASE + name.encode())
    made = Locked(folder / f"{name}.qcow2", key)
    secret = f"secret,id=key,file={key}"
    options = fields if kind == "luks" else {"encrypt.format": kind, "encrypt.key-secret": "key", **fields}
    words = ["-o", ",".join(f"{k}={v}" for k, v in options.items())] if options else []
    run("qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, *words, made.image, str(size))
    if kind == "luks":
        encrypt_by_luks(made.image, key.read_bytes(), secret, **(volume or {}))
    return made


def refused_by_qemu(made: Locked) -> bool:
    """Whether the passphrase in the key file does not open the image."""
    return attempt("qemu-img", "check", *made.secrets(), "--image-opts", made.options()).returncode != 0
