"""Raw images: the disk is the file, byte for byte. Worker process."""

from __future__ import annotations

import errno
import os

from devices.block.image import DATA, SECTOR_SIZE, ZEROES, Image
from devices.block.transfer import (
    punch_hole,
    read_into,
    total_size,
    write_from,
    write_zero_bytes,
    zero_range,
)


class RawImage(Image):
    """A raw file or block device.

    A file whose length is not whole sectors is seen rounded up, its end as zeroes.
    """

    __slots__ = ("_fd", "_length", "_sync_failed")

    def __init__(self, fd: int, read_only: bool) -> None:
        # Seeking finds the size of block devices too, where st_size is 0.
        self._length = os.lseek(fd, 0, os.SEEK_END)
        self._sync_failed = False
        self.size = -(-self._length // SECTOR_SIZE) * SECTOR_SIZE
        self.read_only = read_only
        self.block_size = SECTOR_SIZE
        self.discard_granularity = 4096
        self._fd = fd

    def readv(self, offset: int, buffers: list[memoryview]) -> None:
        size = total_size(buffers)
        self.check_range(offset, size)
        done = read_into(self._fd, buffers, offset, size)
        if done < size and offset + done < self._length:
            # Zeroes here would be silent corruption.
            raise OSError(errno.EIO, "somebody made the image file shorter")

    def writev(self, offset: int, buffers: list[memoryview]) -> None:
        self.check_writable()
        size = total_size(buffers)
        self.check_range(offset, size)
        write_from(self._fd, buffers, offset, size)
        if offset + size > self._length:
            self._length = offset + size

    def discard(self, offset: int, size: int) -> None:
        self.check_writable()
        self.check_range(offset, size)
        if size:
            punch_hole(self._fd, offset, size)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        self.check_writable()
        self.check_range(offset, size)
        if not size:
            return
        if unmap and punch_hole(self._fd, offset, size):
            return
        if not zero_range(self._fd, offset, size):
            write_zero_bytes(self._fd, offset, size)

    def extent(self, offset: int, size: int) -> tuple[int, int, int]:
        kind = DATA
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            if start > offset:
                kind, end = ZEROES, start
            else:
                end = os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                kind, end = ZEROES, self.size  # no data from here on
            elif error.errno == errno.EINVAL:
                end = self.size  # a block device does not tell
            else:
                raise
        return kind, offset, min(size, end - offset)

    def grow(self, size: int) -> None:
        self.check_growth(size)
        length = os.lseek(self._fd, 0, os.SEEK_END)  # whoever asks may have made it longer already
        if length < size:
            os.ftruncate(self._fd, size)  # EINVAL on a block device: only its owner can make it larger
            length = size
        self.flush()
        self._length = length
        self.size = size

    def flush(self) -> None:
        if self.read_only:
            return
        if self._sync_failed:
            # The kernel reports a failed write-back once and then forgets it: a later success would be a lie.
            raise OSError(errno.EIO, "an earlier flush of the image failed")
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._sync_failed = True
            raise

    def close(self) -> None:
        fd = self._fd
        if fd < 0:
            return
        try:
            self.flush()
        finally:
            self._fd = -1
            os.close(fd)
