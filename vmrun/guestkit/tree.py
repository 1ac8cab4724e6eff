"""What is in the guest's root directory: the same entries go into the initramfs and onto the disk.

All programs are in /bin and its other names are links to it, so that a path of any usual form is found with
one directory look-up. The initramfs keeps only what a shell needs: each entry costs the guest kernel time
at boot and busybox's shell finds its own applets without links.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

_PROFILE = b"""\
PS1='\\h:\\w\\$ '
export PS1
"""
_PASSWD = b"root::0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
_GROUP = b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"
_HOSTS = b"127.0.0.1 localhost\n"


@dataclass(frozen=True)
class Entry:
    """A file, directory, symbolic link (`data` is its target) or device node. `path` has no leading slash."""

    path: str
    mode: int
    data: bytes = b""
    device: int = 0


def directory(path: str, permissions: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | permissions)


def file(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | permissions, data)


def link(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, permissions: int) -> Entry:
    return Entry(path, stat.S_IFCHR | permissions, device=os.makedev(major, minor))


def initramfs(init: bytes, busybox: bytes, agent: bytes) -> Iterator[Entry]:
    """The tree of the initramfs: the kernel starts `init` as /init, and that starts `agent`."""
    yield directory("dev")
    # The kernel opens /dev/console before PID 1 can mount devtmpfs.
    yield character_device("dev/console", 5, 1, 0o600)
    yield file("init", init, 0o755)
    yield from _common(busybox, agent)
    yield link("bin/sh", "busybox")


def disk(
    init: bytes,
    busybox: bytes,
    agent: bytes,
    applets: list[str],
    programs: dict[str, bytes],
    scripts: dict[str, bytes],
) -> Iterator[Entry]:
    """The tree of the disk: `init` is /bin/init, every applet has its link but those for which `programs` has
    something better, `scripts` go to /etc/vmrun.
    """
    yield directory("dev")
    yield from _common(busybox, agent)
    yield file("bin/init", init, 0o755)
    for name in sorted(programs):
        yield file(f"bin/{name}", programs[name], 0o755)
    for applet in sorted(set(applets) - {"busybox", "init", *programs}):
        yield link(f"bin/{applet}", "busybox")
    yield directory("home")
    yield directory("mnt")
    yield directory("usr/local")
    yield directory("usr/local/bin")
    yield directory("etc/vmrun")
    for name in sorted(scripts):
        yield file(f"etc/vmrun/{name}", scripts[name], 0o755)


def _common(busybox: bytes, agent: bytes) -> Iterator[Entry]:
    yield directory("bin")
    yield file("bin/busybox", busybox, 0o755)
    yield file("bin/vmrun-agent", agent, 0o755)
    yield link("sbin", "bin")
    yield directory("usr")
    yield link("usr/bin", "../bin")
    yield link("usr/sbin", "../bin")
    yield directory("proc", 0o555)
    yield directory("sys", 0o555)
    yield directory("run")
    yield directory("tmp", 0o1777)
    yield directory("root", 0o700)
    yield directory("var")
    yield link("var/run", "../run")
    yield directory("etc")
    yield file("etc/passwd", _PASSWD)
    yield file("etc/group", _GROUP)
    yield file("etc/hosts", _HOSTS)
    yield file("etc/profile", _PROFILE)
