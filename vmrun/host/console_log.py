"""What a guest printed lately, in two files of bounded size: PATH, and PATH.1 before that. VMM process, main
loop.
"""

import os
from pathlib import Path
from types import TracebackType

LOG_LIMIT = 1 << 20  # bytes of each of the two files


class ConsoleLog:
    """Owns the open file. Keeps at least the last `limit` bytes appended, and at most twice that."""

    def __init__(self, path: Path, *, limit: int = LOG_LIMIT) -> None:
        self._path = path
        self._older = path.with_name(path.name + ".1")
        self._limit = limit
        self._size = 0
        self._lost = 0
        self._fd = self._open()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def append(self, data: bytes) -> None:
        """Never fails: what a full file system does not take is counted, and the log says so later."""
        if self._lost:
            data = f"\r\n[vmrun: {self._lost} bytes of console output lost]\r\n".encode() + data
        try:
            rest = memoryview(data)
            while rest:
                if self._size >= self._limit:
                    self._rotate()
                written = os.write(self._fd, rest[: self._limit - self._size])
                self._size += written
                rest = rest[written:]
            self._lost = 0
        except OSError:
            self._lost += len(data)

    def _rotate(self) -> None:
        os.rename(self._path, self._older)
        fd = self._open()
        os.close(self._fd)
        self._fd = fd
        self._size = 0

    def read(self) -> bytes:
        """All that is kept."""
        return read_log(self._path)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "ConsoleLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path) -> bytes:
    """The log at `path`, whose writer does not write meanwhile."""
    kept = b""
    for file in (path.with_name(path.name + ".1"), path):
        try:
            kept += file.read_bytes()
        except FileNotFoundError:
            pass
    return kept
