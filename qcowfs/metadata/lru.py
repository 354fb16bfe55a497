"""A store bounded in bytes that drops what was used least recently.

Owns order and bound. Must not know what is stored; several caches may share one store, so that their sum is
bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedStore(Generic[K, V]):
    """Values by key; each has a cost in bytes, and the sum of costs stays within `limit`."""

    def __init__(self, limit: int, least: int = 1) -> None:
        """Hold at most `limit` bytes, but always the newest `least` values."""
        self._limit = limit
        self._least = least
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._used = 0

    @property
    def bytes_used(self) -> int:
        """The sum of the costs of all values."""
        return self._used

    def get(self, key: K) -> V | None:
        """The value if it is still here, marked as just used."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, cost: int) -> None:
        """Add or replace a value, dropping the least recently used ones until all fit."""
        replaced = self._entries.pop(key, None)
        self._used += cost - (replaced[1] if replaced else 0)
        self._entries[key] = (value, cost)
        while self._used > self._limit and len(self._entries) > self._least:
            _, (_, dropped) = self._entries.popitem(last=False)
            self._used -= dropped
