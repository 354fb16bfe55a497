"""Inflating and compressing clusters: raw deflate and zstd.

Owns the choice of library and level, and the bounds on output and memory. Must not know where bytes
come from. Implements the data part of "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from qcowfs.errors import CorruptImage, UnsupportedFeature, UsageError
from qcowfs.format.header import COMPRESSION_DEFLATE, COMPRESSION_NAMES, COMPRESSION_ZSTD

Cluster = bytes | bytearray | memoryview
Compressor = Callable[[Cluster], bytes]
Inflater = Callable[[bytes | memoryview, int], bytes]

DEFLATE_WINDOW_BITS = -15
"""Raw deflate of any window: the format allows 32 KiB though QEMU writes 4 KiB."""

ZSTD_MAX_WINDOW_LOG = 27
"""What zstd itself accepts by default; memory is touched only as far as output is made."""

WRITTEN_WINDOW_BITS = 12
"""Deflate with a window of 4 KiB, since QEMU reads no larger one."""

QUICK_LEVELS = range(1, 4)
"""Deflate levels for which a quicker library is used where it is installed."""
DEFAULT_LEVELS = {COMPRESSION_DEFLATE: 3, COMPRESSION_ZSTD: 2}
MOST_LEVELS = {COMPRESSION_DEFLATE: 9, COMPRESSION_ZSTD: 19}


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


@cache
def compressor(compression_type: int, level: int | None = None) -> Compressor:
    """The function `cluster -> stored bytes` for a header's compression type, at a level from 1 on.

    It releases the GIL and may run in any thread. Raises `UsageError` for a level that does not exist.
    """
    level = DEFAULT_LEVELS[compression_type] if level is None else level
    if not 1 <= level <= MOST_LEVELS[compression_type]:
        name = COMPRESSION_NAMES[compression_type]
        raise UsageError(f"level {level}: {name} has levels 1 to {MOST_LEVELS[compression_type]}")
    if compression_type == COMPRESSION_ZSTD:
        return _zstd_compressor(level)
    return _deflater(level)


def _deflater(level: int) -> Compressor:
    if level in QUICK_LEVELS:
        try:
            from isal import igzip_lib
        except ImportError:
            pass
        else:
            memory = igzip_lib.MEM_LEVEL_EXTRA_LARGE
            return lambda cluster: igzip_lib.compress(
                cluster, level, igzip_lib.COMP_DEFLATE, memory, WRITTEN_WINDOW_BITS
            )
    import zlib

    def deflate(cluster: Cluster) -> bytes:
        stream = zlib.compressobj(level, zlib.DEFLATED, -WRITTEN_WINDOW_BITS, 9)
        return stream.compress(cluster) + stream.flush()

    return deflate


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


def _zstd() -> Any:  # noqa: ANN401 - two modules of one shape
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _zstd_compressor(level: int) -> Compressor:
    """One compressor a thread, which makes a frame of each cluster."""
    zstd, mine = _zstd(), threading.local()

    def compress(cluster: Cluster) -> bytes:
        stream = getattr(mine, "stream", None)
        if stream is None:
            stream = mine.stream = zstd.ZstdCompressor(level)
        stored: bytes = stream.compress(cluster, stream.FLUSH_FRAME)
        return stored

    return compress


def _zstd_inflater() -> Inflater:
    zstd = _zstd()
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
