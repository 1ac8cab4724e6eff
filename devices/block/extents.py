"""Where the bytes of a disk are: runs of data, zeroes and nothing, down the chain of backing images. Command
line; only metadata is read.
"""

from __future__ import annotations

from devices.block.image import ABSENT, DATA, Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Extent:
    """`length` bytes from `start`, all of one kind (ABSENT, ZEROES, DATA) in one image, `depth` files down.

    `offset` is where they are in that file; -1 for no place, and for compressed data. ABSENT reads as zeroes:
    no image of the chain has anything there.
    """

    __slots__ = ("depth", "kind", "length", "offset", "start")

    def __init__(self, start: int, length: int, depth: int, kind: int, offset: int) -> None:
        self.start = start
        self.length = length
        self.depth = depth
        self.kind = kind
        self.offset = offset

    @property
    def is_data(self) -> bool:
        return self.kind == DATA

    def continues(self, before: Extent) -> bool:
        """Whether both are one run."""
        expected = before.offset + before.length if before.offset >= 0 else -1
        return self.depth == before.depth and self.kind == before.kind and self.offset == expected


def extent_at(image: Image, start: int, size: int) -> Extent:
    """The run from `start`, at most `size` bytes; the next one may continue it."""
    depth = 0
    while True:
        kind, offset, size = image.extent(start, size)
        backing = image.backing
        # A backing image may be shorter than what lies on it.
        if kind != ABSENT or backing is None or start >= backing.size:
            return Extent(start, size, depth, kind, offset)
        size = min(size, backing.size - start)
        image = backing
        depth += 1


def extents(image: Image) -> Iterator[Extent]:
    """The whole disk in order, in runs as long as they are."""
    last: Extent | None = None
    start = 0
    while start < image.size:
        extent = extent_at(image, start, image.size - start)
        start += extent.length
        if last is None:
            last = extent
        elif extent.continues(last):
            last.length += extent.length
        else:
            yield last
            last = extent
    if last is not None:
        yield last
