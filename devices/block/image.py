"""What every disk format offers the block device. Worker process.

A format is handed open descriptors and never opens anything, so that it works in a process that cannot. One
thread uses an image at a time. The format owns its descriptor from the moment its constructor returns.
"""

from __future__ import annotations

import errno

from devices.errors import ImageError

SECTOR_SIZE = 512

# What `Image.extent` finds.
ABSENT = 0  # nothing in this image: its backing image decides, and without one there are zeroes
ZEROES = 1
DATA = 2


class Image:
    """A virtual disk of `size` bytes.

    Errors: ImageError when the image itself is damaged or refuses (one line), OSError when the host failed.
    Either one fails the request that met it; the image stays usable as far as it can.

    What is promised to a guest: a read sees every write that was completed before it. After `flush` returned,
    all writes completed before survive the death of this process, a crash of the host and a power cut.
    """

    __slots__ = ("block_size", "discard_granularity", "read_only", "size")

    backing: Image | None = None  # what is read where this image has nothing
    size: int
    read_only: bool
    block_size: int  # bytes: what a guest does well to align to
    discard_granularity: int  # bytes: a smaller or unaligned discard frees nothing

    def readv(self, offset: int, buffers: list[memoryview]) -> None:
        """Fill all `buffers` from byte `offset`.

        They may be guest memory: what is in them is never read back.
        """
        raise NotImplementedError

    def writev(self, offset: int, buffers: list[memoryview]) -> None:
        """Write all `buffers` at byte `offset`.

        The guest may change them meanwhile: they go to data and nowhere else.
        """
        raise NotImplementedError

    def discard(self, offset: int, size: int) -> None:
        """The guest no longer wants these bytes.

        They may read as zeroes or unchanged, but never as older data.
        """
        raise NotImplementedError

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """These bytes read as zeroes from now on. `unmap` allows giving their space back to the host."""
        raise NotImplementedError

    def extent(self, offset: int, size: int) -> tuple[int, int, int]:
        """What this image itself, without what lies below it, has at `offset`, which is inside the disk:
        ABSENT, ZEROES or DATA; where in the file, or -1 when it has no place or is compressed; and for how
        many bytes, at most `size`, that is known. The next ones may be the same.
        """
        raise NotImplementedError

    def grow(self, size: int) -> None:
        """Make the disk `size` bytes, whole sectors and no less than it has; what is new reads as zeroes.

        No request is under way. Durable when this returns.
        """
        raise NotImplementedError

    def check_growth(self, size: int) -> None:
        self.check_writable()
        if size % SECTOR_SIZE or size < self.size:
            raise ImageError(f"a disk of {self.size} bytes cannot grow to {size}")

    def flush(self) -> None:
        """Returns when everything completed so far is on stable storage."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush if writable, then close the descriptor, also when the flush failed.

        A second call does nothing.
        """
        raise NotImplementedError

    def check_range(self, offset: int, size: int) -> None:
        """The block device checks what a guest asks; this one holds whoever calls."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ImageError(f"request for {size} bytes at {offset} is outside the disk of {self.size} bytes")

    def check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the image is open read-only")
