"""Opening images for `vmrun disk`: locked, with all that lies below them. User side of the VMM process."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from devices.block.image import Image
from devices.block.open import open_image
from devices.errors import ImageError
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import ANYWHERE, FORMATS
from vmrun.host.disks import SUFFIXES, MachineDisk, OpenDisk
from vmrun.machine.config import DiskConfig


def image_format(path: Path, stated: str | None, option: str = "--format") -> str:
    """The format of the image at `path`: as stated with `option`, or by suffix, never by content."""
    if stated is not None:
        if stated not in FORMATS:
            raise UserError(f"{option} {stated}: give one of {', '.join(FORMATS)}")
        return stated
    found = SUFFIXES.get(path.suffix.lower())
    if found is None and path.is_dir():
        raise UserError(f"{path}: is a directory, not a disk", EXIT_IMAGE)
    if found is None:
        raise UserError(f"{path}: the suffix does not tell the format: add {option} raw or {option} qcow2")
    return found


@contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """What is wrong with an image, or with the host, becomes one line that names the file."""
    try:
        yield
    except ImageError as error:
        raise UserError(f"disk {path}: {error}", EXIT_IMAGE) from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"disk {path}: {error.strerror or error}") from None


@contextmanager
def open_file(path: Path, stated: str | None = None, write: bool = False) -> Iterator[OpenDisk]:
    """The file alone: for what needs nothing but its own metadata."""
    disk = OpenDisk(DiskConfig(path, image_format(path, stated), read_only=not write, backing=ANYWHERE))
    try:
        with image_errors(path):
            yield disk
    finally:
        disk.close()


@contextmanager
def open_chain(config: DiskConfig) -> Iterator[tuple[MachineDisk, Image]]:
    """The disk as a guest would have it, over its backing files."""
    disk = MachineDisk(config)
    try:
        with open_images([disk, *disk.backing]) as image:
            yield disk, image
    finally:
        disk.close()


@contextmanager
def open_images(files: Sequence[OpenDisk]) -> Iterator[Image]:
    """The image of the first of `files`, over those of the others. They stay the caller's."""
    with image_errors(files[0].config.path):
        image = _open_images(files)
        try:
            yield image
        except BaseException:
            try:
                image.close()
            except (ImageError, OSError):
                pass  # The first error is what the user hears of.
            raise
        image.close()


def _open_images(files: Sequence[OpenDisk]) -> Image:
    """Opened from the last one up: each owns what is below it."""
    file = files[0]
    backing = _open_images(files[1:]) if len(files) > 1 else None
    # An image closes the descriptor it gets; the lock belongs to all copies of it.
    fd = os.dup(file.fd)
    try:
        with image_errors(file.config.path):
            return open_image(file.config.format, fd, file.config.read_only, backing)
    except BaseException:
        os.close(fd)
        if backing is not None:
            backing.close()
        raise
