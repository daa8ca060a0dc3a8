"""The compressions of bodies. zstd is one of them where the library is installed that the vendor's SDK uses for it."""

import zlib
from typing import Any

import lz4.block

from .errors import ServiceError

try:
    import zstd
except ImportError:
    zstd: Any = None  # type: ignore[no-redef]

_FAILURES = (lz4.block.LZ4BlockError, zlib.error, ValueError, *(() if zstd is None else (zstd.Error,)))


def decompress(kind: str, data: bytes, raw_size: int) -> bytes:
    """Return the body of a request, raw; of one that is larger than announced maybe only the begin.

    Raises:
        ServiceError: InvalidCompressType, PostBodyUncompressError.
    """
    try:
        if not kind:
            return data
        if kind == "lz4":
            return lz4.block.decompress(data, uncompressed_size=raw_size)
        if kind == "deflate":
            return zlib.decompressobj().decompress(data, raw_size + 1)
        if kind == "zstd" and zstd is not None:
            return zstd.decompress(data)
    except _FAILURES:
        raise ServiceError("PostBodyUncompressError")
    raise ServiceError("InvalidCompressType", "x-log-compresstype {} is unsupported".format(kind))


def accepted(accept_encoding: str) -> str:
    """Return the compression for an answer to a client that accepts these, "" for none."""
    if "lz4" in accept_encoding:
        return "lz4"
    return "zstd" if "zstd" in accept_encoding and zstd is not None else ""


def compress(kind: str, data: bytes) -> bytes:
    """Return the body of an answer, compressed."""
    if kind == "zstd":
        return zstd.compress(data, 1)
    return lz4.block.compress(data, store_size=False)
