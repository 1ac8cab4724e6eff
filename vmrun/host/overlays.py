"""Overlays: files that take a machine's writes while the disk below them stays as it is. VMM process.

Such a file is made without a name (open(2), O_TMPFILE). A throw-away one never gets any, so nothing is left
of it whatever ends the machine; one that is to stay is given its name when all else is done
(`vmrun.host.new_file.give_name`). It belongs to
the machine over all its lives: a reset does not lose what the guest has written.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from devices.block.image import SECTOR_SIZE
from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_header import MAX_BACKING_NAME
from devices.errors import ImageError
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.disks import OpenDisk
from vmrun.host.new_file import open_unnamed
from vmrun.machine.config import DiskConfig, VhostUserDisk

AnyDisk = DiskConfig | VhostUserDisk


def create_overlay(base: DiskConfig, directory: Path) -> int:
    """The descriptor of an unnamed, empty overlay above `base`, in `directory`; the caller's.

    UserError when `base` cannot be opened, or `directory` not be written to.
    """
    path = base.path.absolute()
    if len(os.fsencode(path)) > MAX_BACKING_NAME:
        raise UserError(f"disk {path}: its path is too long for a backing file's", EXIT_IMAGE)
    fd = open_unnamed(directory)
    try:
        # The name is for others: the VMM was told what is below, and does not ask the header.
        create_qcow2(fd, _size(base), backing_file=os.fspath(path), backing_format=base.format)
    except ImageError as error:
        os.close(fd)
        raise UserError(f"disk {path}: {error}", EXIT_IMAGE) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def free_name(base: Path, label: str = "") -> Path:
    """A file name beside `base` that nobody has: disk.qcow2 gives disk.1.qcow2, or disk.LABEL.qcow2."""
    # What was made here before is told by its number, so that names do not grow from overlay to overlay.
    stem, _, tail = base.stem.rpartition(".")
    stem = stem if stem and tail.isdecimal() else base.stem
    candidates = [f"{stem}.{label}.qcow2"] if label else []
    number = 1
    while True:
        for name in candidates or [f"{stem}.{number}.qcow2"]:
            path = base.with_name(name)
            if not path.exists() and not path.is_symlink():
                return path
        candidates = [f"{stem}.{label}-{number + 1}.qcow2"] if label else []
        number += 1


def temporary_directory() -> Path:
    """Where throw-away overlays are: $TMPDIR, else /var/tmp, which is on a disk where /tmp may be memory."""
    return Path(
        os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
    )


class ThrowAways:
    """The throw-away overlays of one machine: a context manager that owns them. `disks` are the
    configurations with them.
    """

    def __init__(self, disks: Sequence[AnyDisk]) -> None:
        with ExitStack() as stack:
            self.disks = tuple(self._with_overlay(disk, stack) for disk in disks)
            self._stack = stack.pop_all()

    def _with_overlay(self, disk: AnyDisk, stack: ExitStack) -> AnyDisk:
        if not isinstance(disk, DiskConfig) or not disk.throw_away or disk.overlay is not None:
            return disk
        fd = create_overlay(replace(disk, throw_away=False), temporary_directory())
        stack.callback(os.close, fd)
        return replace(disk, overlay=fd)

    def __enter__(self) -> "ThrowAways":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _size(base: DiskConfig) -> int:
    """Of the guest's disk, in bytes."""
    disk = OpenDisk(replace(base, read_only=True))
    try:
        if disk.header is not None:
            return int(disk.header.size)
        return -(-os.lseek(disk.fd, 0, os.SEEK_END) // SECTOR_SIZE) * SECTOR_SIZE
    finally:
        disk.close()
