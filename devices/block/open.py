"""From a stated format to an image.

Worker process. The format is never probed: a guest can write any magic it likes.
"""

from __future__ import annotations

from devices.block.image import Image
from devices.block.qcow2 import Qcow2Image
from devices.block.raw import RawImage
from devices.errors import ImageError


def open_image(fmt: str, fd: int, read_only: bool, backing: Image | None = None) -> Image:
    """The image in `fd`, whose owner it becomes, as it does of `backing`.

    After an error both stay the caller's.
    """
    if fmt == "qcow2":
        return Qcow2Image(fd, read_only, backing)
    if fmt == "raw":
        if backing is not None:
            raise ImageError("a raw image has no backing file")
        return RawImage(fd, read_only)
    raise ImageError(f"disk format {fmt!r} is unknown: give raw or qcow2")
