"""What lies below a qcow2 image: the backing file its header names, as a disk to open. VMM process.

The name is the image's, and whoever made the image chose it, or whoever broke out into the worker that writes
it: a guest could read any file of ours through it. So it is followed only into the directory that the user
allows, the disk's own if nothing else is said; and nothing is guessed: a name is a plain path, and the format
is stated.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from devices.block.qcow2_header import Header
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.config import DiskConfig

FORMATS = ("raw", "qcow2")
ANYWHERE = (Path("/"),)  # for a user who names the image and what is to be done with it, as with qemu-img
MAX_BACKING_FILES = 16  # below one disk: each is a descriptor in the worker and a level of its recursion


def backing_config(path: Path, header: Header, allowed: Sequence[Path]) -> DiskConfig | None:
    """The backing file of the qcow2 image at `path`, if it has one. UserError for one that is not followed.

    It must lie in one of the directories `allowed` or below, symbolic links resolved.

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
    backing = Path(os.path.join(path.parent, name))
    resolved = backing.resolve()
    if not any(resolved.is_relative_to(directory.resolve()) for directory in allowed):
        raise UserError(
            f"{where} is not in {' or '.join(map(str, allowed))}: if you trust the image, allow it with "
            f"--disk {path},backing={resolved.parent}",
            EXIT_IMAGE,
        )
    return DiskConfig(backing, header.backing_format, read_only=True)
