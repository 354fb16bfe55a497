"""How an exception is answered: the one table from errors to errno.

Owns that table, the decorator that applies it to every request handler, and what is said of an answer that
nobody waits for. Must not know what a request does.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from qcowfs import errors
from qcowfs.daemon import shim

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def _nobody_asks(_: int) -> None:
    """Without the compiled session nothing depends on how many requests wait."""


_note_waiting: Callable[[int], None] = _nobody_asks if shim.session is None else shim.session.note_waiting

ERRNO_OF: dict[type[errors.QcowError], int] = {
    errors.ReadOnlyError: errno.EROFS,
    errors.UsageError: errno.EINVAL,
    errors.UnsupportedFeature: errno.EOPNOTSUPP,
    errors.CorruptImage: errno.EIO,
    errors.ImageInUse: errno.EBUSY,
    errors.BadPassphrase: errno.EACCES,
    errors.BackingFileError: errno.EIO,
    errors.SnapshotGone: errno.ESTALE,
}


class _UnheardAnswers(logging.Filter):
    """Keeps pyfuse3 from calling it an error that a request was given up before its answer.

    The kernel says ENOENT of such an answer. It gives requests up when the mount goes, so a mount that is
    taken away lazily, or right after a file was closed, now and then ends with one.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether pyfuse3's line is about anything else."""
        text = record.getMessage()
        unheard = "fuse_reply" in text and text.endswith(os.strerror(errno.ENOENT))
        if unheard:
            log.debug("nobody waits for an answer: %s", text)
        return not unheard


logging.getLogger("pyfuse3").addFilter(_UnheardAnswers())


def errno_of(error: Exception) -> int:
    """The errno that a caller gets: the host's own, the table's, else EIO."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((ERRNO_OF[c] for c in type(error).__mro__ if c in ERRNO_OF), errno.EIO)


def answers(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn whatever a handler raises into an errno; what nobody foresaw is logged, the mount lives on."""

    @wraps(handler)
    async def answering(*args: P.args, **kwargs: P.kwargs) -> T:
        _note_waiting(1)  # while it waits, the scheduler is needed
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except errors.CorruptImage as error:  # logged where it was found
            raise pyfuse3.FUSEError(errno_of(error)) from None
        except (errors.QcowError, OSError) as error:
            log.error("%s: %s", handler.__name__, error)  # noqa: TRY400 - one line, no traceback
            raise pyfuse3.FUSEError(errno_of(error)) from None
        except Exception:
            log.exception("%s failed in a way nobody foresaw; answered with EIO", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            _note_waiting(-1)

    return answering
