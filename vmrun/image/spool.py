"""Where the contents of files wait between an archive and the disk: one file without a name.

Nothing has to be cleaned after a crash, and no archive chooses a name in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vmrun.image.limits import Limits

CHUNK = 1 << 20


class Spool:
    """Append-only. `limits.size` bounds it."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        self._limits = limits
        self.fd = _unnamed_file(directory)
        self.size = 0

    def append(self, read: Callable[[int], bytes], length: int, what: str) -> int:
        """Take `length` bytes from `read`, and return where they are."""
        start = self.size
        if length > self._limits.size - start:
            raise self._limits.over_size(what)
        left = length
        while left:
            data = read(min(left, CHUNK))
            if not data:
                raise EOFError
            self._write(data)
            left -= len(data)
        return start

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, self.size)
            self.size += written
            view = view[written:]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unnamed_file(directory: Path) -> int:
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        # Not every file system has O_TMPFILE: overlayfs of older kernels, NFS.
        import tempfile

        fd, name = tempfile.mkstemp(dir=directory)
        os.unlink(name)
        return fd
