"""The same run with each of several kernels, side by side as the host's memory and processors allow. Owner's
process.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vmrun.errors import EXIT_VMM

MEMORY_SHARE = 2  # of what is available, one part in so many is for guests


@dataclass(frozen=True, slots=True)
class Row:
    kernel: Path
    code: int
    seconds: float


def run_each(kernels: Sequence[Path], memory: int, arguments: Sequence[str]) -> int:
    """`vmrun run` with each kernel; `arguments` are all the others. What each prints comes as one piece when
    it has ended; a table at the end, on stderr. Returns the highest exit code.
    """
    with ThreadPoolExecutor(_at_once(len(kernels), memory)) as pool:
        rows = list(pool.map(lambda kernel: _run(kernel, arguments), kernels))
    width = max(len(str(row.kernel)) for row in rows)
    print(f"{'KERNEL':<{width}}  CODE  SECONDS", file=sys.stderr)
    for row in rows:
        print(f"{row.kernel!s:<{width}}  {row.code:>4}  {row.seconds:>7.1f}", file=sys.stderr)
    return max(row.code for row in rows)


def _at_once(count: int, memory: int) -> int:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fit = available // MEMORY_SHARE // max(memory, 1)
    return max(1, min(count, fit, len(os.sched_getaffinity(0))))


def _run(kernel: Path, arguments: Sequence[str]) -> Row:
    began = time.monotonic()
    command = [sys.executable, "-m", "vmrun", "run", "--kernel", os.fspath(kernel), *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        for stream, data in ((sys.stdout, done.stdout), (sys.stderr, done.stderr)):
            if data:
                # One write, so that what others print does not come in between.
                stream.flush()
                stream.buffer.write(f"== {kernel}\n".encode() + data)
                stream.flush()
    except OSError as error:
        print(f"vmrun: {kernel}: {error.strerror}", file=sys.stderr)
        code = EXIT_VMM
    return Row(kernel, code, time.monotonic() - began)


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
