"""The same run with each of several kernels, side by side as the host's memory and processors allow. Owner's
process.
"""

import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmrun.errors import EXIT_VMM
from vmrun.host.overlays import temporary_directory

MEMORY_SHARE = 2  # of what is available, one part in so many is for guests
OUTPUT_LIMIT = 64 << 20  # bytes of each stream of a run that are kept
PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Row:
    kernel: Path
    code: int
    seconds: float


class Spool:
    """The last `limit` bytes of a stream, in `file`: the guest may print without end."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._fd = file.fileno()
        self._limit = limit
        self.size = 0  # of all there was

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            at = self.size % self._limit
            written = os.pwrite(self._fd, rest[: self._limit - at], at)
            self.size += written
            rest = rest[written:]

    @property
    def lost(self) -> int:
        """How many bytes there were before those that are kept."""
        return max(0, self.size - self._limit)

    def pieces(self) -> Iterator[bytes]:
        """What is kept, in order."""
        position = self.lost
        while position < self.size:
            at = position % self._limit
            count = min(PIECE, self._limit - at, self.size - position)
            piece = os.pread(self._fd, count, at)
            yield piece
            position += len(piece)


def run_each(kernels: Sequence[Path], memory: int, arguments: Sequence[str]) -> int:
    """`vmrun run` with each kernel; `arguments` are all the others. What each prints comes as one piece when
    it has ended; a table at the end, on stderr. Returns the highest exit code.
    """
    printing = threading.Lock()
    with ThreadPoolExecutor(_at_once(len(kernels), memory)) as pool:
        rows = list(pool.map(lambda kernel: _run(kernel, arguments, printing), kernels))
    width = max(len(str(row.kernel)) for row in rows)
    print(f"{'KERNEL':<{width}}  CODE  SECONDS", file=sys.stderr)
    for row in rows:
        print(f"{row.kernel!s:<{width}}  {row.code:>4}  {row.seconds:>7.1f}", file=sys.stderr)
    return max(row.code for row in rows)


def _at_once(count: int, memory: int) -> int:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fit = available // MEMORY_SHARE // max(memory, 1)
    return max(1, min(count, fit, len(os.sched_getaffinity(0))))


def _run(kernel: Path, arguments: Sequence[str], printing: threading.Lock) -> Row:
    began = time.monotonic()
    command = [sys.executable, "-m", "vmrun", "run", "--kernel", os.fspath(kernel), *arguments]
    try:
        place = temporary_directory()
        with tempfile.TemporaryFile(dir=place) as out, tempfile.TemporaryFile(dir=place) as err:
            spools = Spool(out, OUTPUT_LIMIT), Spool(err, OUTPUT_LIMIT)
            status = _spool(command, spools)
            code = status if status >= 0 else 128 - status
            # So that what others print does not come in between.
            with printing:
                for stream, spool in zip((sys.stdout, sys.stderr), spools, strict=True):
                    if not spool.size:
                        continue
                    stream.flush()
                    stream.buffer.write(f"== {kernel}\n".encode())
                    if spool.lost:
                        stream.buffer.write(f"[vmrun: {spool.lost} bytes of output left out]\n".encode())
                    for piece in spool.pieces():
                        stream.buffer.write(piece)
                    stream.flush()
    except OSError as error:
        print(f"vmrun: {kernel}: {error.strerror}", file=sys.stderr)
        code = EXIT_VMM
    return Row(kernel, code, time.monotonic() - began)


def _spool(command: Sequence[str], spools: Sequence[Spool]) -> int:
    """Run `command` with its stdout and stderr in `spools`: its exit code, or minus a signal."""
    pipe = subprocess.PIPE
    with (
        selectors.DefaultSelector() as waiting,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process,
    ):
        try:
            for stream, spool in zip((process.stdout, process.stderr), spools, strict=True):
                if stream is not None:
                    waiting.register(stream, selectors.EVENT_READ, spool)
            while waiting.get_map():
                for key, _ in waiting.select():
                    if data := os.read(key.fd, PIECE):
                        key.data.append(data)
                    else:
                        waiting.unregister(key.fileobj)
        except BaseException:
            process.kill()
            raise
    return process.returncode


def without_kernels(words: Sequence[str]) -> list[str]:
    """The words of a command line but for `--kernel FILE` and what names the command."""
    kept: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            return [*kept, word, *left]
        if word == "--kernel":
            next(left, None)
        elif not word.startswith("--kernel="):
            kept.append(word)
    return kept
