"""Assertions that many tests share."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_exactly(kind: type[Exception], text: str) -> Iterator[None]:
    """Assert that the body raises just that class with just that text."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert str(caught.value) == text


@contextmanager
def little_memory(limit: int = 8 << 20) -> Iterator[None]:
    """Assert that the peak of what is allocated inside stays below the limit."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit
