"""The key material of encrypted images: which passphrase belongs to which image of a chain.

Owns the order in which sources of passphrases are asked, and what is said of passphrases that nothing here
needs. Must not know what a passphrase opens. A passphrase
is the whole content of its source, a newline at the end included, as with QEMU's secret objects. It is never
part of a message, a log line or a printed object.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from qcowfs.errors import UsageError
from qcowfs.text import printable

log = logging.getLogger(__name__)

MAX_KEY_SIZE = 8 << 20
"""Bytes that a key file may have; as much as cryptsetup takes."""
CREDENTIAL = "qcowfs.key"
"""The credential that opens any image; that of one image is called as its file, with `.key`."""

_MOST_SHOWN = 8

Ask = Callable[[str], bytes | None]
"""From an image's label to the passphrase that somebody typed, None if there is nobody to ask."""


class Keys:
    """Passphrases by image; without any sources it has none."""

    def __init__(
        self,
        by_name: Mapping[str, bytes] | None = None,
        default: bytes | None = None,
        credentials: Path | None = None,
        ask: Ask | None = None,
    ) -> None:
        """`by_name` has those for images of a path or file name, `default` is for all others.

        After both come files in the folder `credentials`, as systemd fills it, and at last `ask`.
        """
        self._by_name = dict(by_name or {})
        self._default = default
        self._credentials = credentials
        self._ask = ask
        self._known: dict[Path, bytes | None] = {}
        self._opened: dict[Path, bool] = {}

    def get(self, image: str, label: str, kind: str, ask: Ask | None = None) -> bytes:
        """The passphrase of the image whose file is `image`; `ask` is instead of the usual one.

        Raises `UsageError` that says how to give one, in the name of `label`; `kind` is its encryption.
        """
        path = Path(image)
        self.note(image, encrypted=True)
        for name, passphrase in self._by_name.items():
            if _is_called(path, name):
                return passphrase
        if self._default is not None:
            return self._default
        found = self._credential(path)
        if found is None:
            found = self._typed(path, label, ask or self._ask)
        if found is None:
            raise UsageError(
                f"{label}: is encrypted ({kind}); give its passphrase by --key-file FILE, by --key-fd N, or "
                f"as the systemd credential {CREDENTIAL}"
            )
        return found

    def note(self, image: str, *, encrypted: bool) -> None:
        """Take notice of a file that is opened, or about to be made, and of whether it is encrypted."""
        self._opened[Path(image)] = encrypted

    def check_use(self) -> None:
        """Hold what was given against the files that were noted, once all of them are.

        Raises `UsageError` for a name that none of them has. What is given for a file that needs none is
        worth a warning only.
        """
        for name in self._by_name:
            called = [path for path in self._opened if _is_called(path, name)]
            if not called:
                raise UsageError(f"--key-file {_shown(name)}=FILE: names none of {self._shown_files()}")
            for path in called:
                if not self._opened[path]:
                    log.warning("%s: is not encrypted; the passphrase given for it is not used", _shown(path))
        if self._default is not None and self._opened and not any(self._opened.values()):
            log.warning("%s: not encrypted; the passphrase given is not used", self._shown_files())

    def _shown_files(self) -> str:
        names = [_shown(path) for path in self._opened]
        more = len(names) - _MOST_SHOWN
        return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more files" if more > 0 else "")

    def _typed(self, path: Path, label: str, ask: Ask | None) -> bytes | None:
        """What somebody types for the image; nobody is asked twice for one image."""
        place = path.resolve()
        if place not in self._known and ask is not None:
            self._known[place] = ask(label)
        return self._known.get(place)

    def _credential(self, path: Path) -> bytes | None:
        if self._credentials is None:
            return None
        files = [self._credentials / f"{path.name}.key", self._credentials / CREDENTIAL]
        return next((read_key(file) for file in files if file.is_file()), None)


def _is_called(path: Path, name: str) -> bool:
    return name == path.name or Path(name).resolve() == path.resolve()


def _shown(name: str | Path) -> str:
    return printable(os.fsencode(name))


def read_key(path: Path) -> bytes:
    """The whole content of a key file; raises `UsageError` if it is too large, `OSError` as the host does."""
    with path.open("rb") as file:
        return checked_key(file.read(MAX_KEY_SIZE + 1), str(path))


def checked_key(passphrase: bytes, source: str) -> bytes:
    """The passphrase, unless it is too large to be one; then raises `UsageError` that names its source."""
    if len(passphrase) > MAX_KEY_SIZE:
        raise UsageError(f"{source}: a key has at most {MAX_KEY_SIZE >> 20} MiB")
    return passphrase
