"""`vmrun disk map`: where the bytes of a disk are, as `qemu-img map` has it. User side of the VMM process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from devices.block.extents import extents
from devices.block.image import ABSENT
from vmrun.disk.files import image_format, open_chain
from vmrun.host.backing import ANYWHERE
from vmrun.machine.config import DiskConfig


def disk_map(path: Path, fmt: str | None = None) -> Iterator[dict[str, Any]]:
    """Each run: start, length, depth, present, zero, data, and offset where it has a place in a file.

    `filename` is the file `offset` is in. Only metadata are read.
    """
    config = DiskConfig(path, image_format(path, fmt), read_only=True, backing=ANYWHERE)
    with open_chain(config) as (disk, image):
        files = [disk, *disk.backing]
        for extent in extents(image):
            found: dict[str, Any] = {
                "start": extent.start,
                "length": extent.length,
                "depth": extent.depth,
                "present": extent.kind != ABSENT,
                "zero": not extent.is_data,
                "data": extent.is_data,
            }
            if extent.offset >= 0:
                found["offset"] = extent.offset
                found["filename"] = str(files[extent.depth].config.path)
            yield found
