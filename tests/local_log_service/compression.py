"""The compressions of bodies."""

import zlib
from typing import Iterator

import lz4.block
import zstd

from .errors import ServiceError

_FAILURES = (lz4.block.LZ4BlockError, zlib.error, zstd.Error, ValueError)
_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"  # what it begins with
_ZSTD_RUN = 1  # the kind of a block that is one byte, many times


def _zstd_frames(data: bytes) -> Iterator[bytes]:
    """Yield each of the frames that ``data`` consists of; raise ValueError where it does not (RFC 8878, 3.1.1).

    The library decompresses one frame of any form, but not several of which one does not state its size, as encoders
    of streams don't.
    """
    start = 0
    while start < len(data):
        if not data.startswith(_ZSTD_FRAME, start) or start + 5 > len(data):
            raise ValueError("no frame of zstd")
        descriptor = data[start + 4]
        has_window, has_checksum = not descriptor & 0x20, descriptor & 4
        of_size = (0 if has_window else 1, 2, 4, 8)[descriptor >> 6]
        position = start + 5 + has_window + (0, 1, 2, 4)[descriptor & 3] + of_size
        is_last = False
        while not is_last:
            if position + 3 > len(data):
                raise ValueError("a frame of zstd is cut short")
            header = int.from_bytes(data[position : position + 3], "little")
            is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            position += 3 + (1 if kind == _ZSTD_RUN else size)
        position += 4 if has_checksum else 0
        yield data[start:position]
        start = position


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
        if kind == "zstd":
            return b"".join(map(zstd.decompress, _zstd_frames(data)))
    except _FAILURES:
        raise ServiceError("PostBodyUncompressError")
    raise ServiceError("InvalidCompressType", "x-log-compresstype {} is unsupported".format(kind))


def accepted(accept_encoding: str) -> str:
    """Return the compression for an answer to a client that accepts these, "" for none."""
    return next((kind for kind in ("lz4", "zstd") if kind in accept_encoding), "")


def compress(kind: str, data: bytes) -> bytes:
    """Return the body of an answer, compressed."""
    if kind == "zstd":
        return zstd.compress(data, 1)
    return lz4.block.compress(data, store_size=False)
