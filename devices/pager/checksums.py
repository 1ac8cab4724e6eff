"""The checksum file beside a snapshot's memory: which chunks hold data, and each one's CRC-32. VMM and pager.

All numbers are little-endian. A header (`_HEADER`), one byte for each chunk of memory (1: data, 0: nothing
but zeros), a CRC-32 for each chunk (0 where there is no data), and the CRC-32 of everything before. It stays
as it is in the file: reading it takes no time that grows with the number of chunks but that of one CRC.
"""

from __future__ import annotations

import struct
import zlib

CHUNK_SIZE = 65536  # bytes of guest memory that are checked, and brought in, together

MAGIC = b"vmrunMEM"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQ")  # magic, version, chunk size, bytes of memory, chunks with data
_CRC = struct.Struct("<I")

MAX_RANGES = 256  # each splits a mapping, of which Linux grants a process 65,530
_SMALL_GAP = 16  # chunks: not worth a range of its own


class Checksums:
    """The file's contents, checked. `size` is the memory's, in bytes."""

    __slots__ = ("_crcs", "_raw", "chunks", "data_chunks", "kinds", "size")

    def __init__(self, raw: bytes) -> None:
        """Raises ValueError, whose text completes "the checksum file ...", for anything but a whole one."""
        if len(raw) < _HEADER.size + _CRC.size:
            raise ValueError("is truncated")
        magic, version, chunk_size, size, data_chunks = _HEADER.unpack_from(raw)
        if magic != MAGIC:
            raise ValueError("is not one of vmrun's")
        if version != VERSION or chunk_size != CHUNK_SIZE:
            raise ValueError(
                f"is of version {version} with chunks of {chunk_size} bytes, which is unknown here"
            )
        chunks = -(-size // CHUNK_SIZE)
        if len(raw) != _HEADER.size + chunks * (1 + _CRC.size) + _CRC.size:
            raise ValueError(f"has {len(raw)} bytes, which does not fit {size} bytes of memory")
        if zlib.crc32(memoryview(raw)[: -_CRC.size]) != _CRC.unpack_from(raw, len(raw) - _CRC.size)[0]:
            raise ValueError("is damaged")
        self._raw = raw
        self._crcs = _HEADER.size + chunks
        self.size = size
        self.chunks = chunks
        self.data_chunks = data_chunks
        self.kinds = raw[_HEADER.size : self._crcs]
        if self.kinds.count(1) != data_chunks or self.kinds.count(0) != chunks - data_chunks:
            raise ValueError("contradicts itself")

    def is_data(self, chunk: int) -> bool:
        return self.kinds[chunk] == 1

    def length(self, chunk: int) -> int:
        """Bytes in `chunk`: the last one may be short."""
        left: int = self.size - chunk * CHUNK_SIZE
        return min(CHUNK_SIZE, left)

    def matches(self, chunk: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether `data` is what was in `chunk` when the snapshot was taken."""
        expected = _CRC.unpack_from(self._raw, self._crcs + chunk * _CRC.size)[0]
        return len(data) == self.length(chunk) and zlib.crc32(data) == expected

    def ranges(self) -> list[tuple[int, int]]:
        """The parts of memory that hold data, as (offset, size) in bytes: some have chunks without data in
        them, since there are at most MAX_RANGES of them.
        """
        extents = []
        start = self.kinds.find(1)
        while start >= 0:
            end = self.kinds.find(0, start)
            end = self.chunks if end < 0 else end
            extents.append((start, end))
            start = self.kinds.find(1, end)
        gap = _SMALL_GAP
        while True:
            merged: list[tuple[int, int]] = []
            for start, end in extents:
                if merged and start - merged[-1][1] < gap:
                    merged[-1] = (merged[-1][0], end)
                else:
                    merged.append((start, end))
            if len(merged) <= MAX_RANGES:
                break
            extents, gap = merged, 2 * gap
        return [
            (start * CHUNK_SIZE, min(end * CHUNK_SIZE, self.size) - start * CHUNK_SIZE)
            for start, end in merged
        ]


def build(size: int, kinds: bytes | bytearray, crcs: list[int]) -> bytes:
    """The contents of a checksum file: a byte of `kinds` and a number of `crcs` for each chunk."""
    body = _HEADER.pack(MAGIC, VERSION, CHUNK_SIZE, size, kinds.count(1)) + bytes(kinds)
    body += struct.pack(f"<{len(crcs)}I", *crcs)
    return body + _CRC.pack(zlib.crc32(body))
