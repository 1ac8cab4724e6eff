"""Overlays: files that take a machine's writes while the disk below them stays as it is. VMM process.

Such a file is made without a name (open(2), O_TMPFILE). A throw-away one never gets any, so nothing is left
of it whatever ends the machine; one that is to stay is given its name when all else is done
(`vmrun.host.new_file.give_name`). It belongs to the machine over all its lives: a reset does not lose what
the guest has written.
"""

import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from devices.block.qcow2_header import MAX_BACKING_NAME, Header
from devices.errors import ImageError
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.disks import OpenDisk
from vmrun.host.new_file import give_name, open_unnamed
from vmrun.machine.config import DiskConfig, VhostUserDisk

AnyDisk = DiskConfig | VhostUserDisk


def create_overlay(
    base: DiskConfig, directory: Path, size: int | None = None, path: Path | None = None
) -> int:
    """The descriptor of an unnamed, empty overlay above `base`, in `directory`; the caller's. `size` in bytes
    is that of `base`, for who knows it, and has `base` locked perhaps. `path` is where `base` is going to be.

    UserError when `base` cannot be opened, or `directory` not be written to.
    """
    if size is None:
        with closing(OpenDisk(replace(base, read_only=True))) as disk:
            size = disk.size
    path = (path or base.path).absolute()
    if len(os.fsencode(path)) > MAX_BACKING_NAME:
        raise UserError(f"disk {path}: its path is too long for a backing file's", EXIT_IMAGE)
    from devices.block.qcow2_create import create_qcow2  # here: most machines have no overlays

    fd = open_unnamed(directory)
    try:
        # The name is for others: the VMM was told what is below, and does not ask the header.
        create_qcow2(fd, size, backing_file=os.fspath(path), backing_format=base.format)
    except ImageError as error:
        os.close(fd)
        raise UserError(f"disk {path}: {error}", EXIT_IMAGE) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def free_name(base: Path, label: str = "") -> Path:
    """A file name beside `base` that nobody has: disk.qcow2 gives disk.1.qcow2, or disk.LABEL.qcow2."""
    stem = _stem(base)
    candidates = [f"{stem}.{label}.qcow2"] if label else []
    number = 1
    while True:
        for name in candidates or [f"{stem}.{number}.qcow2"]:
            path = base.with_name(name)
            if not path.exists() and not path.is_symlink():
                return path
        candidates = [f"{stem}.{label}-{number + 1}.qcow2"] if label else []
        number += 1


def _stem(base: Path) -> str:
    # What was made here before is told by its number, so that names do not grow from overlay to overlay.
    stem, _, tail = base.stem.rpartition(".")
    return stem if stem and tail.isdecimal() else base.stem


def images_above(base: Path) -> list[Path]:
    """The images beside `base` that were named after it here and have it for their backing file. Whoever
    writes to `base` destroys what is in them.
    """
    from glob import escape

    found = []
    for path in sorted(base.parent.glob(f"{escape(_stem(base))}.*.qcow2")):
        with suppress(OSError, ImageError):
            if path.is_file() and not path.samefile(base):
                with open(path, "rb", buffering=0) as file:
                    backing = Header(file.fileno()).backing_file
                if backing is not None and base.samefile(path.parent / backing):
                    found.append(path)
    return found


def close_overlays(disks: Sequence[AnyDisk]) -> None:
    """Close the descriptors that configurations carry, for who gave them away."""
    for disk in disks:
        if isinstance(disk, DiskConfig) and disk.overlay is not None:
            os.close(disk.overlay)


def named(disks: Sequence[AnyDisk], label: str) -> tuple[AnyDisk, ...]:
    """Give the overlays that are to stay names beside what they are above. Raises UserError and OSError."""
    given = []
    for disk in disks:
        if isinstance(disk, DiskConfig) and disk.overlay is not None and not disk.throw_away:
            path = free_name(disk.path, label)
            give_name(disk.overlay, path)
            backing = tuple(dict.fromkeys((disk.path.parent, *disk.backing)))
            disk = replace(disk, path=path, format="qcow2", backing=backing, overlay=None)
        given.append(disk)
    return tuple(given)


def temporary_directory() -> Path:
    """Where throw-away overlays are: $TMPDIR, else /var/tmp, which is on a disk where /tmp may be memory."""
    import tempfile

    return Path(
        os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
    )


class Overlays:
    """The unnamed overlays of one machine: a context manager that owns them. `disks` are the configurations
    with them: those that have one already, which is taken over, and throw-away ones, which get one here.
    """

    def __init__(self, disks: Sequence[AnyDisk]) -> None:
        self._fds: set[int] = set()
        try:
            self.disks = tuple(self._with_overlay(disk) for disk in disks)
        except BaseException:
            self.close()
            raise

    def _with_overlay(self, disk: AnyDisk) -> AnyDisk:
        if isinstance(disk, DiskConfig) and disk.overlay is not None:
            self._fds.add(disk.overlay)
            return disk
        if not isinstance(disk, DiskConfig) or not disk.throw_away:
            return disk
        fd = create_overlay(replace(disk, throw_away=False), temporary_directory())
        self._fds.add(fd)
        return replace(disk, overlay=fd)

    def take(self, disks: Sequence[AnyDisk]) -> None:
        """The machine's disks are now `disks`: their overlays are taken over, others are closed."""
        fds = {disk.overlay for disk in disks if isinstance(disk, DiskConfig) and disk.overlay is not None}
        for fd in self._fds - fds:
            os.close(fd)
        self._fds = fds

    def close(self) -> None:
        self.take(())

    def __enter__(self) -> "Overlays":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
