"""Writes cpio archives in the "newc" format, which the Linux kernel unpacks as an initramfs.

The format is in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. The same tree gives
the same bytes: inode numbers are counted, owners are root, times are 0. Runs wherever the kit is built.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import BinaryIO

from vmrun.guestkit.tree import Entry

_MAGIC = "070701"
_ALIGNMENT = 4
_TRAILER = "TRAILER!!!"


def write(archive: BinaryIO, entries: Iterable[Entry]) -> None:
    """Write `entries`, parents before children, and the trailer; the archive is not compressed."""
    number = 0
    for number, entry in enumerate(entries, start=1):
        _member(archive, entry.path, entry.mode, number, entry.data, entry.device)
    _member(archive, _TRAILER, 0, number + 1, b"", 0)


def _member(archive: BinaryIO, path: str, mode: int, inode: int, data: bytes, device: int) -> None:
    name = os.fsencode(path) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (
        inode, mode, 0, 0, links, 0, len(data), 0, 0, os.major(device), os.minor(device), len(name), 0,
    )  # fmt: skip
    header = (_MAGIC + "".join(f"{field:08X}" for field in fields)).encode()
    archive.write(_padded(header + name))
    archive.write(_padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
