"""How a command ends: one line on standard error, and an exit code.

Owns the exit codes. Must not know any command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qcowfs import errors

EXIT_OK = 0
EXIT_HOST = 1
EXIT_USAGE = 2
EXIT_CODES: dict[type[errors.QcowError], int] = {
    errors.UsageError: EXIT_USAGE,
    errors.UnsupportedFeature: 3,
    errors.CorruptImage: 4,
    errors.ImageInUse: 5,
    errors.BackingFileError: 6,
    errors.MountError: 7,
    errors.BadPassphrase: 8,
}
EXIT_INTERRUPTED = 130


def guarded(run: Callable[[], int]) -> int:
    """Run a command's body; errors become one line on standard error and an exit code."""
    try:
        return run()
    except errors.QcowError as error:
        complain(str(error))
        return exit_code(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        return EXIT_HOST
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


@contextmanager
def raise_single() -> Iterator[None]:
    """Raise the first plain exception of a group, which is how task nurseries end."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def exit_code(error: errors.QcowError) -> int:
    """The exit code for an error, by its class."""
    return next((EXIT_CODES[c] for c in type(error).__mro__ if c in EXIT_CODES), EXIT_HOST)


def complain(text: str) -> None:
    """One line to standard error in the program's name."""
    print(f"qcowfs: {text}", file=sys.stderr, flush=True)
