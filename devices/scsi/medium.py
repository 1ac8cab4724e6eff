"""The disc: a file of 2048-byte blocks, read straight into the initiator's buffers. VMM process."""

import os

from devices.block.transfer import read_into, slice_buffers
from devices.errors import ImageError

BLOCK_SIZE = 2048

# What 80 minutes of CD hold, 75 blocks a second. What is larger is a DVD.
_CD_BLOCKS = 80 * 60 * 75


class Medium:
    """A disc over the file or block device `fd`, which stays the caller's. `blocks` is its size.

    A file that ends within a block is seen with zeroes after it, so that none of it is lost. Raises
    ImageError when the file is empty.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._length = os.lseek(fd, 0, os.SEEK_END)
        if not self._length:
            raise ImageError("the file is empty: a CD has at least one block")
        self.blocks = -(-self._length // BLOCK_SIZE)
        self.is_dvd = self.blocks > _CD_BLOCKS

    def read(self, address: int, count: int, buffers: list[memoryview]) -> bool:
        """Read `count` blocks from `address` to the start of `buffers`, which have room for them. False when
        the host cannot: the device failed, or somebody made the file shorter.
        """
        offset, size = address * BLOCK_SIZE, count * BLOCK_SIZE
        try:
            done = read_into(self._fd, slice_buffers(buffers, 0, size), offset, size)
        except OSError:
            return False
        return done == size or offset + done >= self._length
