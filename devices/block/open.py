"""From a stated format to an image.

Worker process. The format is never probed: a guest can write any magic it likes.
"""

from __future__ import annotations

from devices.block.image import Image
from devices.block.qcow2 import Qcow2Image
from devices.block.raw import RawImage
from devices.errors import ImageError


def open_image(
    fmt: str, fd: int, read_only: bool, backing: Image | None = None, journal: int | None = None
) -> Image:
    """The image in `fd`, whose owner it becomes, as it does of `backing` and `journal`.

    After an error all of them stay the caller's. `journal` is a memfd that the changes of an image survive
    this process in (devices.block.qcow2_journal), for formats that keep tables in memory.
    """
    if fmt == "qcow2":
        return Qcow2Image(fd, read_only, backing, journal)
    if fmt == "raw":
        if journal is not None:
            raise ImageError("a raw image needs no restart journal")
        if backing is not None:
            raise ImageError("a raw image has no backing file")
        return RawImage(fd, read_only)
    raise ImageError(f"disk format {fmt!r} is unknown: give raw or qcow2")
