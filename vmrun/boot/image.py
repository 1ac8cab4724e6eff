"""Kernel and initramfs files as bytes at offsets: a file on disk, or what came out of a decompressor. VMM
process.

Files are read, not mapped: a file that somebody truncates meanwhile gives a short read and a clear error
here, where a mapping would give the VMM a SIGBUS.
"""

import os
import stat
from pathlib import Path
from typing import Protocol, Self

from vmrun.errors import EXIT_IMAGE, UserError


class Image(Protocol):
    """`size` bytes. `name` is what error messages call it."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`: fewer when the image ends before."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. UserError when the image ends before."""


class FileImage:
    """A regular file. Owns its descriptor; a context manager closes it."""

    def __init__(self, path: Path, what: str) -> None:
        """Open `path`; `what` says what the user meant it to be. UserError (EXIT_IMAGE) when it cannot be
        read.
        """
        self.name = f"{what} {path}"
        try:
            # O_NONBLOCK: a FIFO must be refused below, not waited for here.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise UserError(f"{self.name}: {reason.lower()}", EXIT_IMAGE) from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise UserError(f"{self.name}: not a regular file", EXIT_IMAGE)
        self.size = status.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and (chunk := os.pread(self._fd, size - len(data), offset + len(data))):
            data += chunk
        return bytes(data)

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            # Linux transfers at most 2 GiB less a page at a time; a short read is no end of file yet.
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise UserError(f"{self.name}: ends {len(view) - done} bytes too early", EXIT_IMAGE)
            done += count


class MemoryImage:
    """Bytes in memory."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > self.size:
            raise UserError(f"{self.name}: ends {offset + len(view) - self.size} bytes too early", EXIT_IMAGE)
        view[:] = memoryview(self._data)[offset : offset + len(view)]
