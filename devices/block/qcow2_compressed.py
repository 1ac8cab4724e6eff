"""Compressed clusters of a qcow2 image: reading them. Worker process.

QEMU docs/interop/qcow2.txt, "Compressed Clusters Descriptor". Only zlib: zstd would be a second decompressor
here, but its library is not importable in a worker, so `Header.compression_type` refuses it when the image is
opened.
"""

from __future__ import annotations

import os
import zlib

from devices.block.qcow2_header import COMPRESSION_ZLIB, Header
from devices.errors import ImageError

CACHE_BYTES = 4 << 20


class CompressedReader:
    """Inflates clusters, and remembers the last few: a guest reads the pages of a cluster one after the
    other.
    """

    __slots__ = ("_cache", "_cache_limit", "_cluster_size", "_fd")

    def __init__(self, fd: int, header: Header) -> None:
        if header.compression_type != COMPRESSION_ZLIB:
            raise ImageError(
                "qcow2 images compressed with zstd are not supported: "
                "run qemu-img convert -O qcow2 -o compression_type=zlib"
            )
        self._fd = fd
        self._cluster_size = 1 << header.cluster_bits
        self._cache: dict[int, bytes] = {}
        self._cache_limit = max(1, min(64, CACHE_BYTES >> header.cluster_bits))

    def read(self, offset: int, size: int) -> bytes:
        """The cluster whose raw deflate stream is in the `size` bytes at `offset`; what follows the stream is
        ignored.
        """
        data = self._cache.get(offset)
        if data is None:
            data = self._inflate(os.pread(self._fd, size, offset), offset)
            if len(self._cache) >= self._cache_limit:
                del self._cache[next(iter(self._cache))]
            self._cache[offset] = data
        return data

    def _inflate(self, stream: bytes, offset: int) -> bytes:
        try:
            # The limit is what stops a bomb: zlib never makes more than one cluster of it.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, self._cluster_size)
        except zlib.error as error:
            raise ImageError(f"the compressed qcow2 cluster at {offset:#x} is damaged: {error}") from None
        if len(data) != self._cluster_size:
            raise ImageError(f"the compressed qcow2 cluster at {offset:#x} is cut off")
        return data

    def forget(self) -> None:
        """The host clusters of compressed data are about to be used for something else."""
        self._cache.clear()
