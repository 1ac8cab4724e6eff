"""`vmrun disk create`: empty images, and overlays over others. User side of the VMM process."""

import os
from pathlib import Path

from devices.block.image import SECTOR_SIZE
from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_header import COMPRESSION_ZLIB
from vmrun.disk.files import image_errors, image_format, open_chain
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import ANYWHERE, MAX_BACKING_FILES
from vmrun.host.new_file import new_file
from vmrun.machine.config import DiskConfig

DEFAULT_CLUSTER_SIZE = 65536


def check_size(path: Path, size: int) -> None:
    if size % SECTOR_SIZE or not 0 < size < 1 << 63:
        raise UserError(f"{path}: a disk of {size} bytes: give whole sectors of {SECTOR_SIZE} bytes")


def create(
    path: Path,
    size: int | None = None,
    fmt: str | None = None,
    cluster_size: int | None = None,
    base: str | None = None,
    base_format: str | None = None,
) -> int:
    """Make an empty image at `path` and return its size in bytes.

    With `base` it is an overlay, as large as the base unless `size` says otherwise. As in QEMU, a relative
    `base` counts from the directory of `path`.
    """
    fmt = image_format(path, fmt)
    if fmt == "raw" and (base is not None or cluster_size is not None):
        what = "backing file" if base is not None else "clusters"
        raise UserError(f"{path}: a raw image has no {what}: make it qcow2 (--format qcow2)")
    if base is None:
        if base_format is not None:
            raise UserError("--backing-format: there is no --backing")
        if size is None:
            raise UserError(f"{path}: how large? Add --size, as in --size 10G")
    else:
        base_size, base_format = _look_at_base(path, base, base_format)
        base = f"./{base}" if ":" in base.split("/", 1)[0] else base
        size = base_size if size is None else size
    check_size(path, size)
    with new_file(path) as fd, image_errors(path):
        if fmt == "raw":
            os.ftruncate(fd, size)
        else:
            create_qcow2(
                fd,
                size,
                cluster_size or DEFAULT_CLUSTER_SIZE,
                backing_file=base,
                backing_format=base_format,
                compression_type=COMPRESSION_ZLIB,
            )
    return size


def _look_at_base(path: Path, base: str, base_format: str | None) -> tuple[int, str]:
    """The size and format of the base, which must be one that can be booted from."""
    if not base or any(ord(character) < 32 for character in base):
        raise UserError(f"--backing {base!r}: the name has control characters")
    where = Path(os.path.join(path.parent, base))
    if not where.exists() and Path(base).exists():
        raise UserError(
            f"--backing {base}: a relative name counts from the directory of the new image, {path.parent}: "
            f"give {os.path.relpath(base, path.parent)}",
            EXIT_IMAGE,
        )
    base_format = image_format(where, base_format, "--backing-format")
    with open_chain(DiskConfig(where, base_format, read_only=True, backing=ANYWHERE)) as (disk, image):
        if len(disk.backing) >= MAX_BACKING_FILES:
            raise UserError(
                f"--backing {base}: has {len(disk.backing)} backing files below it already", EXIT_IMAGE
            )
        return image.size, base_format
