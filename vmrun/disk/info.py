"""`vmrun disk info`: what the header and the file system say about an image. User side of the VMM process.

The keys are those of `qemu-img info --output=json`, for programs that read both.
"""

import os
from pathlib import Path
from typing import Any

from devices.block.qcow2_header import (
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_ZSTD,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    Header,
)
from devices.block.raw import RawImage
from vmrun.disk.files import image_format, open_file
from vmrun.host.backing import ANYWHERE
from vmrun.host.disks import MachineDisk, OpenDisk
from vmrun.machine.config import DiskConfig


def info(path: Path, fmt: str | None = None) -> dict[str, Any]:
    """About the image alone: its backing file need not be there."""
    with open_file(path, fmt) as disk:
        return _describe(disk)


def chain_info(path: Path, fmt: str | None = None) -> list[dict[str, Any]]:
    """About the image and all its backing files, nearest first."""
    disk = MachineDisk(DiskConfig(path, image_format(path, fmt), read_only=True, backing=ANYWHERE))
    try:
        return [_describe(file) for file in (disk, *disk.backing)]
    finally:
        disk.close()


def _describe(disk: OpenDisk) -> dict[str, Any]:
    header = disk.header
    found: dict[str, Any] = {
        "filename": str(disk.config.path),
        "format": disk.config.format,
        "virtual-size": header.size if header is not None else RawImage(disk.fd, True).size,
        "actual-size": os.fstat(disk.fd).st_blocks * 512,
        "dirty-flag": header is not None and bool(header.incompatible_features & INCOMPATIBLE_DIRTY),
    }
    if header is not None:
        found["cluster-size"] = 1 << header.cluster_bits
        found["format-specific"] = {"type": "qcow2", "data": _features(header)}
        if header.backing_file is not None:
            found["backing-filename"] = header.backing_file
            found["full-backing-filename"] = os.path.join(disk.config.path.parent, header.backing_file)
            if header.backing_format is not None:
                found["backing-filename-format"] = header.backing_format
    return found


def _features(header: Header) -> dict[str, Any]:
    features: dict[str, Any] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": "zstd" if header.compression_type == COMPRESSION_ZSTD else "zlib",
        "refcount-bits": 1 << header.refcount_order,
    }
    if header.version >= 3:
        features["lazy-refcounts"] = bool(header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS)
        features["corrupt"] = bool(header.incompatible_features & INCOMPATIBLE_CORRUPT)
        features["extended-l2"] = False  # images that have it are refused
    if header.nb_snapshots:
        features["internal-snapshots"] = header.nb_snapshots
    if header.has_bitmaps:
        features["has-bitmaps"] = True
    return features
