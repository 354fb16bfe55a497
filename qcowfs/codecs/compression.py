"""Inflating compressed clusters: raw deflate and zstd.

Owns the choice of library and the bounds on output and memory. Must not know where the bytes come from.
Implements the data part of "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from qcowfs.errors import CorruptImage, UnsupportedFeature
from qcowfs.format.header import COMPRESSION_DEFLATE, COMPRESSION_ZSTD

Inflater = Callable[[bytes | memoryview, int], bytes]

DEFLATE_WINDOW_BITS = -15
"""Raw deflate of any window: the format allows 32 KiB though QEMU writes 4 KiB."""

ZSTD_MAX_WINDOW_LOG = 27
"""What zstd itself accepts by default; memory is touched only as far as output is made."""


@cache
def inflater(compression_type: int) -> Inflater:
    """The function `(stored bytes, cluster size) -> cluster` for a header's compression type.

    The function stops at `cluster size` bytes, ignores what follows, and raises `CorruptImage` where
    the stored bytes do not yield that many. It releases the GIL and may run in any thread.
    """
    if compression_type == COMPRESSION_DEFLATE:
        return _deflate_inflater()
    if compression_type == COMPRESSION_ZSTD:
        return _zstd_inflater()
    raise UnsupportedFeature(f"compression type {compression_type} is unknown")


def _deflate_inflater() -> Inflater:
    library = _deflate_library()
    new, error_class = library.decompressobj, library.error

    def inflate(stored: bytes | memoryview, size: int) -> bytes:
        try:
            cluster: bytes = new(DEFLATE_WINDOW_BITS).decompress(stored, size)
        except error_class as error:
            raise CorruptImage(f"compressed cluster does not inflate: {error}") from None
        return _complete(cluster, size)

    return inflate


def _deflate_library() -> Any:  # noqa: ANN401 - two modules of one shape, one of them untyped
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return zlib
    return isal_zlib  # twice as fast as zlib


def _zstd_inflater() -> Inflater:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTD_MAX_WINDOW_LOG}

    def inflate(stored: bytes | memoryview, size: int) -> bytes:
        try:
            decompressor = zstd.ZstdDecompressor(options=options)
            cluster = decompressor.decompress(stored, max_length=size)
        except zstd.ZstdError as error:
            raise CorruptImage(f"compressed cluster does not inflate: {error}") from None
        return _complete(cluster, size)

    return inflate


def _complete(cluster: bytes, size: int) -> bytes:
    if len(cluster) < size:
        raise CorruptImage(f"compressed cluster inflates to {len(cluster)} bytes of {size}")
    return cluster
