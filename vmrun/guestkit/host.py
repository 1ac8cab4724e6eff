"""What the host must have for a build, by Debian package, and running its programs."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmrun.errors import EXIT_VMM, UserError
from vmrun.guestkit import cache

BUSYBOX = Path("/bin/busybox")
SOURCES = Path("/usr/src")
_PROGRAMS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "tar": "tar",
    "xz": "xz-utils",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "qemu-img": "qemu-utils",
}
_HEADERS = {"gelf.h": "libelf-dev", "stdio.h": "libc6-dev"}
# Where mke2fs is for users whose PATH leaves out the administrator's directories.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_KEPT_LINES = 2000


def kernel_source() -> Path | None:
    """The newest linux-source-X.Y.tar.xz that a Debian package put into /usr/src."""

    def version(path: Path) -> list[int]:
        return [int(part) for part in path.name[len("linux-source-") : -len(".tar.xz")].split(".")]

    found = []
    for path in SOURCES.glob("linux-source-*.tar.xz"):
        try:
            found.append((version(path), path))
        except ValueError:
            continue
    return max(found)[1] if found else None


def check() -> None:
    """Raise UserError with the Debian packages to install when something a build needs is missing."""
    missing = {package for program, package in _PROGRAMS.items() if shutil.which(program, path=_PATH) is None}
    missing |= {
        package
        for header, package in _HEADERS.items()
        if not (Path("/usr/include") / header).exists()
        and not (Path("/usr/include/x86_64-linux-gnu") / header).exists()
    }
    if kernel_source() is None:
        missing.add("linux-source")
    if not _is_static_program(BUSYBOX):
        missing.add("busybox-static")
    if missing:
        packages = " ".join(sorted(missing))
        raise UserError(f"the guest kit cannot be built yet; as root: apt-get install {packages}")


def run(
    command: Sequence[str | Path],
    directory: Path,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a program in `directory` to its end; its output goes to `on_line`, line by line.

    Raises UserError when it fails, and leaves the end of its output in the cache as `failed-build.log`.
    """
    kept: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C", "PATH": _PATH, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                kept.append(line.rstrip())
                if on_line is not None:
                    on_line(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        log = cache.directory() / "failed-build.log"
        log.write_text("\n".join(kept) + "\n")
        raise UserError(f"{command[0]} failed with status {process.returncode}; see {log}", EXIT_VMM)


def _is_static_program(path: Path) -> bool:
    """Whether `path` is a 64-bit ELF program without an interpreter (System V ABI, PT_INTERP)."""
    try:
        with path.open("rb") as program:
            header = program.read(64)
            if len(header) < 64 or header[:5] != b"\x7fELF\x02":
                return False
            program.seek(int.from_bytes(header[32:40], "little"))
            size = int.from_bytes(header[54:56], "little")
            count = int.from_bytes(header[56:58], "little")
            kinds = [int.from_bytes(program.read(size)[:4], "little") for _ in range(count)]
    except OSError:
        return False
    return bool(kinds) and 3 not in kinds
