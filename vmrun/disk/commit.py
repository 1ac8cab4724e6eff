"""`vmrun disk commit`: what an overlay has, into its backing file. User side of the VMM process.

The order makes it safe to kill at any time: first everything is written to the backing file, then that is
flushed, and only then the overlay lets go of its clusters. Until it has, it hides what is below it, so that
the overlay always reads the same; committing again finishes the work.
"""

from pathlib import Path

from devices.block.image import DATA, ZEROES, Image
from devices.block.qcow2 import Qcow2Image
from vmrun.disk.convert import CHUNK, Progress
from vmrun.disk.files import open_file, open_images
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import ANYWHERE, backing_config
from vmrun.host.disks import DiskBusyError, MachineDisk, OpenDisk
from vmrun.machine.config import DiskConfig


def commit(path: Path, fmt: str | None = None, progress: Progress | None = None) -> Path:
    """Write the data of the overlay at `path` into its backing file, empty the overlay, and return the
    backing file's path. A backing file that is smaller grows to the overlay's size.
    """
    with open_file(path, fmt, write=True) as overlay:
        config = backing_config(path, overlay.header, ANYWHERE) if overlay.header is not None else None
        if config is None:
            raise UserError(f"disk {path}: has no backing file to commit to", EXIT_IMAGE)
        base = _open_base(DiskConfig(config.path, config.format, backing=ANYWHERE), overlay)
        try:
            with open_images([overlay, base, *base.backing]) as image:
                if isinstance(image, Qcow2Image) and image.backing is not None:
                    _commit(image, image.backing, progress)
        finally:
            base.close()
        return config.path


def _open_base(config: DiskConfig, overlay: OpenDisk) -> MachineDisk:
    try:
        return MachineDisk(config)
    except DiskBusyError as error:
        # Our own lock on the overlay says no like a stranger's.
        status = error.path.stat()
        if (status.st_dev, status.st_ino) == overlay.identity:
            raise UserError(
                f"disk {overlay.config.path}: its backing file {error.path} is itself or an image above it",
                EXIT_IMAGE,
            ) from None
        raise


def _commit(image: Qcow2Image, base: Image, progress: Progress | None) -> None:
    if image.size > base.size:
        base.grow(image.size)
    buffer = memoryview(bytearray(CHUNK))
    offset = 0
    while offset < image.size:
        kind, _, run = image.extent(offset, image.size - offset)
        if kind == DATA:
            run = min(run, CHUNK)
            image.readv(offset, [buffer[:run]])
            base.writev(offset, [buffer[:run]])
        elif kind == ZEROES:
            base.write_zeroes(offset, run, unmap=True)
        offset += run
        if progress is not None:
            progress(offset, image.size)
    base.flush()
    image.empty()
