"""The exception tree: what can be wrong, and with whom.

Owns the meaning of each error class. Must not know anything else of the project: who raises an error,
which errno or exit code it becomes (`daemon.replies`, `cli.main`), or how it is logged.
"""

from __future__ import annotations


class QcowError(Exception):
    """Whatever qcowfs refuses or cannot do; its text is one line that a user can act on."""


class UsageError(QcowError):
    """The call is wrong: an option, an argument, a name that does not exist."""


class NotQcow2(UsageError):
    """The file is something else than a qcow2 image."""


class ReadOnlyError(UsageError):
    """A change was asked of something that is open read-only."""


class UnsupportedFeature(QcowError):
    """The image is sound but needs a feature that this program does not have; names the feature."""


class CorruptImage(QcowError):
    """The image breaks a rule of the format; names image, offsets and the rule."""


class MetadataOverlap(CorruptImage):
    """A write was refused since it would have landed on metadata."""


class ImageInUse(QcowError):
    """Another process holds the image in a way that excludes this use; names the holder if known."""


class BadPassphrase(QcowError):
    """The key that was given does not open the encrypted image."""


class SnapshotGone(QcowError):
    """A snapshot was deleted while it was open."""


class BackingFileError(QcowError):
    """A file below the image (backing or data file) is missing, refused by policy or unreadable."""


class MountError(QcowError):
    """The file system could not be mounted or unmounted; says what to change."""
