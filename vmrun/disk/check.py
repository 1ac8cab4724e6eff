"""`vmrun disk check`: whether an image's tables agree, and getting leaked space back. User side of the VMM
process.
"""

import os
from pathlib import Path
from typing import Any

from devices.block.qcow2_check import Report, check_qcow2
from devices.block.qcow2_header import (
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_FIELD,
    Header,
)
from devices.errors import ImageError
from vmrun.disk.convert import Progress
from vmrun.disk.files import image_errors, image_format, open_file, open_images
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import ANYWHERE
from vmrun.host.disks import MachineDisk, OpenDisk
from vmrun.machine.config import DiskConfig

EXIT_LEAKS = 3  # as qemu-img check has it


class Checked:
    """`report` is how the image is now; `repaired` how many leaked clusters it had before."""

    __slots__ = ("corrupt", "dirty", "repaired", "report")

    def __init__(self, report: Report, disk: OpenDisk) -> None:
        features = disk.header.incompatible_features if disk.header is not None else 0
        self.report = report
        self.repaired = 0
        self.corrupt = bool(report.corruptions or features & INCOMPATIBLE_CORRUPT)
        self.dirty = bool(features & INCOMPATIBLE_DIRTY)

    @property
    def code(self) -> int:
        """What the command exits with."""
        if self.corrupt:
            return EXIT_IMAGE
        return EXIT_LEAKS if self.report.leaks else 0

    def as_json(self, path: Path) -> dict[str, Any]:
        """With the keys of `qemu-img check --output=json`, as far as they go."""
        report = self.report
        found: dict[str, Any] = {
            "filename": str(path),
            "format": "qcow2",
            "check-errors": 0,
            "image-end-offset": report.image_end,
            "total-clusters": report.total_clusters,
        }
        for key, count in (
            ("allocated-clusters", report.allocated_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("compressed-clusters", report.compressed_clusters),
            ("leaks", report.leaks),
            ("corruptions", report.corruptions),
            ("leaks-fixed", self.repaired),
        ):
            if count:
                found[key] = count
        return found


def check(
    path: Path, fmt: str | None = None, repair: bool = False, progress: Progress | None = None
) -> Checked:
    """Check the qcow2 image at `path`.

    With `repair` leaked clusters are given back, unless the image is corrupt. Of an image that was not closed
    (lazy refcounts) all refcounts are made again.
    """
    before = _check(path, fmt, progress)
    if not repair or not (before.dirty or (before.report.leaks and not before.corrupt)):
        return before
    _repair(path, fmt)
    after = _check(path, fmt, progress)
    after.repaired = before.report.leaks - after.report.leaks
    return after


def _check(path: Path, fmt: str | None, progress: Progress | None) -> Checked:
    with open_file(path, fmt) as disk:
        if disk.header is None:
            raise UserError(f"disk {path}: a raw image has no tables that could be checked")
        return Checked(check_qcow2(disk.fd, progress), disk)


def _repair(path: Path, fmt: str | None) -> None:
    """Say in the header that the refcounts are not to be trusted, then open the image as one that was not
    closed: that makes them again from the tables, and may be interrupted at any time.
    """
    disk = MachineDisk(DiskConfig(path, image_format(path, fmt), backing=ANYWHERE))
    try:
        with image_errors(path):
            header = Header(disk.fd)
            if header.version < 3:
                raise ImageError("version 2 cannot be repaired safely here: run qemu-img check -r leaks")
            features = header.incompatible_features | INCOMPATIBLE_DIRTY
            os.pwrite(disk.fd, features.to_bytes(8, "big"), INCOMPATIBLE_FIELD)
            os.fdatasync(disk.fd)
        with open_images([disk, *disk.backing]):
            pass
    finally:
        disk.close()
