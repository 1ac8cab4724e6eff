"""What lies below a qcow2 image: the backing file its header names, as a disk to open. VMM process.

The name is the image's, and whoever made the image chose it: opening a disk image means reading every file
its headers name, with the rights of the user. So nothing is guessed: a name is a plain path, and the format
is stated.
"""

import os
from pathlib import Path

from devices.block.qcow2_header import Header
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.config import DiskConfig

FORMATS = ("raw", "qcow2")
MAX_BACKING_FILES = 16  # below one disk: each is a descriptor in the worker and a level of its recursion


def backing_config(path: Path, header: Header) -> DiskConfig | None:
    """The backing file of the qcow2 image at `path`, if it has one. UserError for one that is not followed.

    A relative name is relative to the directory of `path`, as in QEMU: of a symbolic link the link's own.
    """
    name = header.backing_file
    if name is None:
        return None
    where = f"disk {path}: its backing file {name!r}"
    if ":" in name.split("/", 1)[0] or any(ord(character) < 32 for character in name):
        # "json:{...}", "nbd://host/name", "file:x": QEMU's other ways to name a file.
        raise UserError(
            f"{where} is not a plain path (no colon before the first slash, no control characters): "
            f"change it with qemu-img rebase -u -F FORMAT -b PATH {path}",
            EXIT_IMAGE,
        )
    if header.backing_format is None:
        raise UserError(
            f"{where} has no stated format, and formats are not guessed: "
            f"state it with qemu-img rebase -u -F raw|qcow2 -b {name} {path}",
            EXIT_IMAGE,
        )
    if header.backing_format not in FORMATS:
        raise UserError(
            f"{where} has the format {header.backing_format!r}: only {' and '.join(FORMATS)} are known",
            EXIT_IMAGE,
        )
    return DiskConfig(Path(os.path.join(path.parent, name)), header.backing_format, read_only=True)
