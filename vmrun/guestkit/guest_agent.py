"""Builds the guest agent (agent/*.c) and an initramfs whose /init it is.

It is cached by itself, under a hash of its sources and of the C library's identity: a change to it costs a
second and no kernel. With the initramfs any disk boots with the agent, without holding it: the kernel command
line names the disk as always (agent/boot.c).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vmrun.guestkit import cache, cpio, host, tree
from vmrun.guestkit.progress import Progress, Silent

SOURCES = Path(__file__).with_name("agent")
_C_LIBRARY = Path("/usr/lib/x86_64-linux-gnu/libc.a")
_COMPILE = [
    "gcc", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Os", "-static", "-no-pie",
    "-Wl,-z,noseparate-code,--build-id=none,-s",
]  # fmt: skip


@dataclass(frozen=True)
class GuestAgent:
    program: Path
    """A static program for the guest, in the end at /sbin/vmrun-agent or wherever an image wants it."""
    initramfs: Path
    """An uncompressed cpio archive with the program as /init, which mounts root= and serves there."""


def find() -> GuestAgent | None:
    """The agent that `build` would return, if it is there already."""
    directory = cache.find(_name())
    return _agent(directory) if directory else None


def build(progress: Progress | None = None) -> GuestAgent:
    """The agent, built first where it is not in the cache: a few seconds the first time.

    Raises UserError when Debian packages are missing or the compiler fails, and OSError when the cache cannot
    be written.
    """
    teller = Silent() if progress is None else progress
    return find() or _agent(cache.find_or_make(_name(), lambda into: _make(into, teller)))


def compile_program(program: Path) -> None:
    """Leave the agent's program at `program`."""
    host.run([*_COMPILE, "-o", program, *sorted(SOURCES.glob("*.c"))], program.parent)


def inputs() -> list[bytes]:
    """What the agent is made from."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    return [
        " ".join(_COMPILE).encode(),
        *(path.name.encode() + b"\0" + path.read_bytes() for path in sources),
    ]


def _make(into: Path, progress: Progress) -> None:
    host.check()
    progress.step("building the guest agent")
    compile_program(into / "vmrun-agent")
    entries = [
        tree.directory("dev"),
        # The kernel opens /dev/console before PID 1 can mount devtmpfs.
        tree.character_device("dev/console", 5, 1, 0o600),
        tree.directory("proc", 0o555),
        tree.directory("sys", 0o555),
        tree.file("init", (into / "vmrun-agent").read_bytes(), 0o755),
    ]
    with (into / "initramfs.cpio").open("wb") as archive:
        cpio.write(archive, entries)


def _agent(directory: Path) -> GuestAgent:
    return GuestAgent(program=directory / "vmrun-agent", initramfs=directory / "initramfs.cpio")


def _name() -> str:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    modules = [Path(__file__), here / "cpio.py", here / "tree.py"]
    for part in [*inputs(), *(path.read_bytes() for path in modules)]:
        digest.update(hashlib.sha256(part).digest())
    try:
        about = _C_LIBRARY.stat()
    except FileNotFoundError:
        pass  # `check` names the package when it comes to building
    else:
        # dpkg gives a file the time of its package version.
        digest.update(f"{about.st_size} {int(about.st_mtime)}".encode())
    return f"agent-{digest.hexdigest()[:16]}"
