"""What a guest printed lately, in two files of bounded size: PATH, and PATH.1 before that. VMM process, main
loop.
"""

import os
from pathlib import Path
from types import TracebackType

LOG_LIMIT = 1 << 20  # bytes of each of the two files


class ConsoleLog:
    """Owns both files, which stay open: a VMM that has confined itself opens none. Keeps at least the last
    `limit` bytes appended, and at most twice that.
    """

    def __init__(self, path: Path, *, limit: int = LOG_LIMIT) -> None:
        self._limit = limit
        self._size = 0
        self._lost = 0
        self._fd = _open(path)
        try:
            self._older_fd = _open(_older(path))
        except BaseException:
            os.close(self._fd)
            raise

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
        rest = memoryview(_read(self._fd))
        os.ftruncate(self._older_fd, 0)
        try:
            while rest:
                rest = rest[os.write(self._older_fd, rest) :]
        finally:
            # Also when the older file could not be written: the younger would not be either.
            os.ftruncate(self._fd, 0)
            self._size = 0

    def read(self) -> bytes:
        """All that is kept."""
        return _read(self._older_fd) + _read(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._older_fd)

    def __enter__(self) -> "ConsoleLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path) -> bytes:
    """The log at `path`, whose writer does not write meanwhile."""
    kept = b""
    for file in (_older(path), path):
        try:
            kept += file.read_bytes()
        except FileNotFoundError:
            pass
    return kept


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _read(fd: int) -> bytes:
    kept = b""
    while piece := os.pread(fd, LOG_LIMIT, len(kept)):
        kept += piece
    return kept
