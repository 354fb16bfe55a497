"""How errors are answered, and which lines of the FUSE binding are no errors."""

from __future__ import annotations

import errno
import logging
import os

import pyfuse3
import pytest

from qcowfs import errors
from qcowfs.daemon.replies import answers, errno_of

pyfuse3_log = logging.getLogger("pyfuse3")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (errors.ReadOnlyError("x"), errno.EROFS),
        (errors.UsageError("x"), errno.EINVAL),
        (errors.UnsupportedFeature("x"), errno.EOPNOTSUPP),
        (errors.CorruptImage("x"), errno.EIO),
        (errors.ImageInUse("x"), errno.EBUSY),
        (errors.BadPassphrase("x"), errno.EACCES),
        (errors.BackingFileError("x"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("without a number"), errno.EIO),
        (ValueError("unforeseen"), errno.EIO),
    ],
)
async def test_every_error_has_its_errno_and_the_mount_lives_on(error: Exception, number: int) -> None:
    @answers
    async def handler() -> None:
        raise error

    assert errno_of(error) == number
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handler()
    assert caught.value.errno == number


def test_an_answer_that_nobody_waits_for_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pyfuse3_log.error("fuse_release(): fuse_reply_* failed with %s", os.strerror(errno.ENOENT))
    assert caplog.records == []


@pytest.mark.parametrize(
    "text", ["fuse_read(): fuse_reply_* failed with Bad address", "No such file or directory"]
)
def test_what_else_the_binding_says_is_heard(text: str, caplog: pytest.LogCaptureFixture) -> None:
    pyfuse3_log.error("%s", text)
    assert [record.getMessage() for record in caplog.records] == [text]
