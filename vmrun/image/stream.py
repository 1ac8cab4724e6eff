"""Reading compressed archives forward only: decompressed, hashed and bounded on the way.

`vmrun.boot.decompress` undoes whole kernels in memory; a layer may be larger than memory, so nothing here
holds more than a few blocks of it.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, Protocol, cast

from vmrun.boot.decompress import compression
from vmrun.guestkit.progress import Progress
from vmrun.image.limits import RATIO_FREE, Limits, refused

if TYPE_CHECKING:
    import lzma

BLOCK = 1 << 18
_ZSTD_WINDOW = 128 << 20  # `zstd --ultra -22`; the frame chooses how much memory its decoder takes
_XZ_MEMORY = 256 << 20


class Reader(Protocol):
    """`read(n)` returns at most n bytes, and b"" only at the end."""

    def read(self, size: int) -> bytes: ...


class FileSlice:
    """A part of an open file, which other slices may share: reads do not move its offset."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd = fd
        self.position = start
        """Where in the file the next read begins."""
        self._end = start + size

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, max(0, min(size, self._end - self.position)), self.position)
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        """As a read of `size` bytes that nobody looks at; raises EOFError beyond the end."""
        if size > self._end - self.position:
            raise EOFError
        self.position += size
        return size


class Hashed:
    """Counts and hashes what is read through it, and tells `progress` of every MiB."""

    def __init__(self, source: Reader, algorithm: str = "sha256", progress: Progress | None = None) -> None:
        self._source = source
        self._hash = hashlib.new(algorithm)
        self._progress = progress
        self.count = 0

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        before = self.count >> 20
        self.count += len(data)
        if self._progress is not None:
            for _ in range((self.count >> 20) - before):
                self._progress.advance()
        return data

    def read_rest(self) -> None:
        while self.read(BLOCK):
            pass

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Decompressed:
    """What `source` holds after its compression, told by its magic number, is undone; it may have none.

    Members that follow each other are one stream, as for gzip(1), xz(1) and zstd(1). `before`: bytes of other
    streams of the image, which count against the same limit.
    """

    def __init__(self, source: Reader, what: str, limits: Limits, before: int = 0) -> None:
        self._what = what
        self._limits = limits
        self._left = limits.streams - before
        self._input = _Input(source)
        self._count = 0
        head = self._input.peek(512)
        # The first bytes of a tar are a name, which may look like a magic number.
        self.method = None if head[257:262] == b"ustar" else compression(head)
        try:
            self._decoder = _decoder(self.method, self._input)
        except _errors() as error:
            raise self._damaged(error) from None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; UserError for damaged data, and beyond the limits."""
        try:
            data = self._decoder.read(min(size, BLOCK))
        except MemoryError:
            raise refused(f"{self._what}: its {self.method} data asks for too much memory") from None
        except _errors() as error:
            raise self._damaged(error) from None
        self._count += len(data)
        if self._count > self._left:
            raise self._limits.over_size(self._what)
        if self._count > RATIO_FREE and self._count > self._input.count * self._limits.ratio:
            raise self._limits.over_ratio(self._what)
        return data

    def _damaged(self, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        return refused(f"{self._what}: damaged {self.method} data: {error}")


class _Input:
    """A reader that can give the same first bytes twice, and counts."""

    def __init__(self, source: Reader) -> None:
        self._source = source
        self._kept = b""
        self.count = 0

    def peek(self, size: int) -> bytes:
        while len(self._kept) < size:
            data = self._source.read(size - len(self._kept))
            if not data:
                break
            self._kept += data
        return self._kept

    def read(self, size: int = BLOCK) -> bytes:
        data = self._kept[:size] if self._kept else self._source.read(size)
        self._kept = self._kept[len(data) :]
        self.count += len(data)
        return data


def _errors() -> tuple[type[Exception], ...]:
    """What the decoders raise for damaged data; OSError is gzip's and bz2's, without an errno."""
    import lzma
    import zlib

    import zstandard

    return (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError)


def _decoder(method: str | None, source: _Input) -> Reader:
    # The decoders' types ask for whole files (`cast`), their code for `read` alone.
    if method is None:
        return source
    if method == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=cast(Any, source), mode="rb")
    if method == "bzip2":
        import bz2

        return bz2.BZ2File(cast(Any, source))
    if method == "xz":
        return _XzReader(source)
    if method == "zstd":
        return _ZstdReader(source)
    raise EOFError(f"{method} is no compression for archives: use gzip, zstd, xz or bzip2")


class _XzReader:
    """lzma.LZMAFile, which has no way to limit the decoder's memory."""

    def __init__(self, source: _Input) -> None:
        self._source = source
        self._decoder = self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        import lzma

        return lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof:
                # Streams may follow, and padding of zero bytes before and after each.
                rest = self._decoder.unused_data.lstrip(b"\0")
                while not rest:
                    data = self._source.read()
                    if not data:
                        return b""
                    rest = data.lstrip(b"\0")
                self._decoder = self._new()
            elif self._decoder.needs_input:
                rest = self._source.read()
                if not rest:
                    raise EOFError("it ends too early")
            else:
                rest = b""
            data = self._decoder.decompress(rest, size)
            if data:
                return data


class _ZstdReader:
    """zstandard's stream_reader, which takes the end of the input for the end of the data anywhere."""

    # The decoder gives all that its input holds: a block of 4 bytes holds up to 128 KiB (RFC 8878, 3.1.1.2).
    _INPUT = 1024

    def __init__(self, source: _Input) -> None:
        import zstandard

        self._source = source
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._decoder = self._decompressor.decompressobj()
        self._ready = memoryview(b"")

    def read(self, size: int) -> bytes:
        while not self._ready:
            data = self._decoder.unused_data if self._decoder.eof else b""
            data = data or self._source.read(self._INPUT)
            if self._decoder.eof:
                if not data:
                    return b""
                self._decoder = self._decompressor.decompressobj()
            elif not data:
                raise EOFError("it ends too early")
            self._ready = memoryview(self._decoder.decompress(data))
        data = bytes(self._ready[:size])
        self._ready = self._ready[size:]
        return data
