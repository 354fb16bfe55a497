"""Orders to a mount: one line of JSON written to its hidden file, answered by one that is read from there.

Owns the words of orders and answers, for both sides. Must not know how an order is carried out. Loads no
FUSE, so that commands may send orders.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowfs import errors
from qcowfs.daemon.mountpoint import FACTS_FILE
from qcowfs.disk.info import describe_snapshot
from qcowfs.metadata.snapshots import find_snapshot

if TYPE_CHECKING:
    from qcowfs.daemon.control import Control

LONGEST_ORDER = 1 << 20
LONGEST_ANSWER = 64 << 20
Order = dict[str, Any]


def send(mount_point: Path, order: Order) -> Any:  # noqa: ANN401 - JSON values
    """Give an order to the mount there; what it answers.

    Raises the error that the daemon ran into, of the same class, or `OSError`; `ReadOnlyError` where the
    mount obeys nobody.
    """
    try:
        fd = os.open(mount_point / FACTS_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise errors.ReadOnlyError(f"{mount_point}: is mounted read-only") from None
    try:
        os.write(fd, json.dumps(order).encode())
        answer = json.loads(_read_all(fd))
    finally:
        os.close(fd)
    if "error" in answer:
        kind = getattr(errors, answer["error"], None)
        if kind is None:
            raise OSError(answer.get("errno"), answer["text"])
        raise kind(answer["text"])
    return answer["result"]


def _read_all(fd: int) -> bytes:
    found = bytearray()
    while part := os.pread(fd, 1 << 16, len(found)):
        found += part
    return bytes(found)


async def obey(control: Control, text: bytes) -> bytes:
    """Carry out an order; the answer, also for an error."""
    try:
        result = await _carry_out(control, json.loads(text))
    except errors.QcowError as error:
        return json.dumps({"error": type(error).__name__, "text": str(error)}).encode()
    except OSError as error:
        return json.dumps({"error": "", "errno": error.errno, "text": error.strerror}).encode()
    except (ValueError, KeyError, TypeError) as error:
        return json.dumps({"error": "UsageError", "text": f"not an order: {error!r}"}).encode()
    return json.dumps({"result": result}).encode()


async def _carry_out(control: Control, order: Order) -> Any:  # noqa: ANN401 - JSON values
    image, what = control.image, order["do"]
    if what == "list":
        files = (control.tree.file_of(snapshot)[0] for snapshot in image.snapshots)
        return [describe_snapshot(s, os.fsdecode(f)) for s, f in zip(image.snapshots, files, strict=True)]
    if what == "create":
        file = await control.create(os.fsencode(order["name"]))
        assert file.snapshot  # noqa: S101 - it was made of one
        return os.fsdecode(control.tree.file_of(file.snapshot)[0])
    if what == "resize":
        size = order["size"] if not order["relative"] else image.active.size + order["size"]
        return await control.resize(size, shrink=order["shrink"])
    snapshot = find_snapshot(image.snapshots, order["snapshot"])
    if what == "delete":
        return await control.delete(snapshot)
    if what == "rename":
        return await control.rename(snapshot, os.fsencode(order["name"]))
    if what == "revert":
        return await control.revert(snapshot, force=order["force"])
    raise errors.UsageError(f"unknown order {what!r}")
