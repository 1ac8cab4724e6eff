"""Compressed clusters of a qcow2 image: reading them. Worker process.

QEMU docs/interop/qcow2.txt, "Compressed Clusters Descriptor": raw deflate streams or zstd frames, as the
header says for the whole image.
"""

from __future__ import annotations

import os
import zlib

from devices.block import zstd
from devices.block.qcow2_header import COMPRESSION_ZSTD, Header
from devices.errors import ImageError

CACHE_BYTES = 4 << 20


class CompressedReader:
    """Inflates clusters, and remembers the last few: a guest reads the pages of a cluster one after the
    other.
    """

    __slots__ = ("_cache", "_cache_limit", "_cluster_size", "_fd", "_zstd")

    def __init__(self, fd: int, header: Header) -> None:
        """ImageError when the host lacks the library it takes."""
        self._zstd = header.compression_type == COMPRESSION_ZSTD
        if self._zstd:
            zstd.load()
        self._fd = fd
        self._cluster_size = 1 << header.cluster_bits
        self._cache: dict[int, bytes] = {}
        self._cache_limit = max(1, min(64, CACHE_BYTES >> header.cluster_bits))

    def read(self, offset: int, size: int) -> bytes:
        """The cluster whose stream is in the `size` bytes at `offset`; what follows the stream is ignored."""
        data = self._cache.get(offset)
        if data is None:
            data = self._inflate(os.pread(self._fd, size, offset), offset)
            if len(self._cache) >= self._cache_limit:
                del self._cache[next(iter(self._cache))]
            self._cache[offset] = data
        return data

    def _inflate(self, stream: bytes, offset: int) -> bytes:
        try:
            # The limit is what stops a bomb: neither makes more than one cluster of it.
            if self._zstd:
                data = zstd.decompress(stream, self._cluster_size)
            else:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, self._cluster_size)
        except (zlib.error, ValueError) as error:
            raise ImageError(f"the compressed qcow2 cluster at {offset:#x} is damaged: {error}") from None
        if len(data) != self._cluster_size:
            raise ImageError(f"the compressed qcow2 cluster at {offset:#x} is cut off")
        return data

    def forget(self) -> None:
        """The host clusters of compressed data are about to be used for something else."""
        self._cache.clear()
