"""Telling systemd how the daemon is.

Owns the notification protocol. Must not know why.
"""

from __future__ import annotations

import os
import socket


def notify_systemd(**state: str) -> None:
    """Send `READY="1"`, `STATUS="..."` and the like; nothing where systemd does not listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    message = "\n".join(f"{name}={value}" for name, value in state.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        connection.sendto(message.encode("utf-8", "backslashreplace"), address)
