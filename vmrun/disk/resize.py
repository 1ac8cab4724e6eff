"""`vmrun disk resize`: a larger disk in the same image. User side of the VMM process."""

import os
import stat
from pathlib import Path

from vmrun.disk.create import check_size
from vmrun.disk.files import image_format, open_chain
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import ANYWHERE
from vmrun.machine.config import DiskConfig


def resize(path: Path, size: int, relative: bool = False, fmt: str | None = None) -> int:
    """Make the disk at `path` `size` bytes, or with `relative` so many more, and return its new size. What is
    new reads as zeroes.
    """
    with open_chain(DiskConfig(path, image_format(path, fmt), backing=ANYWHERE)) as (disk, image):
        size += image.size if relative else 0
        check_size(path, size)
        if size < image.size:
            raise UserError(
                f"disk {path}: has {image.size} bytes: making a disk smaller would cut off what is at its end"
            )
        if image.size != size and disk.header is None and not stat.S_ISREG(os.fstat(disk.fd).st_mode):
            raise UserError(f"disk {path}: a block device is resized by its own tools", EXIT_IMAGE)
        image.grow(size)
        return size
