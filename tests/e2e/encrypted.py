"""Encrypted images by QEMU's tools: made, filled, changed and read with a passphrase from a file."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.tools import attempt, run

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

    def take_snapshot(self, name: str) -> None:
        run("qemu-img", "snapshot", "-c", name, *self.secrets(), "--image-opts", self.options())

    def assert_sound_and_same(self, raw: Path) -> None:
        """Fail unless QEMU finds no fault and the content of a raw file."""
        run("qemu-img", "check", *self.secrets(), "--image-opts", self.options())
        compare = ("qemu-img", "compare", *self.secrets(), "--image-opts", self.options())
        assert run(*compare, f"driver=raw,file.filename={raw}").stdout == "Images are identical.\n"


def locked(folder: Path, name: str, size: int, kind: str = "luks", **fields: object) -> Locked:
    """A new encrypted image; `fields` are creation options, those of encryption with `encrypt_`."""
    key = folder / f"{name}.key"
    key.write_bytes(PASSPHRASE + name.encode())
    made = Locked(folder / f"{name}.qcow2", key)
    create(made, size, kind, **fields)
    return made


def create(made: Locked, size: int, kind: str, **fields: object) -> None:
    """Make the image; again where QEMU finds its clock too coarse to choose LUKS's effort, or never ends."""
    options: dict[str, object] = {"encrypt.format": kind, "encrypt.key-secret": "key0"}
    if kind == "luks":
        options["encrypt.iter-time"] = 10
    options |= {
        name.replace("encrypt_", "encrypt.").replace("__", "-"): value for name, value in fields.items()
    }
    words = ",".join(f"{name}={value}" for name, value in options.items())
    command = ("create", "-q", "-f", "qcow2", *made.secrets(), "-o", words, str(made.image), str(size))
    for _ in range(30):
        with suppress(subprocess.TimeoutExpired):
            result = subprocess.run(
                ("qemu-img", *command), capture_output=True, text=True, check=False, timeout=3
            )
            assert result.returncode == 0 or "accurate CPU usage" in result.stderr, result.stderr
            if result.returncode == 0:
                return
    raise AssertionError("QEMU never made the image")


def refused_by_qemu(made: Locked) -> bool:
    """Whether the passphrase in the key file does not open the image."""
    return attempt("qemu-img", "check", *made.secrets(), "--image-opts", made.options()).returncode != 0
