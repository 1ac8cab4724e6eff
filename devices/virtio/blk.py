"""The virtio block device over a disk image (virtio 1.2, section 5.2). Worker process.

The guest chooses where a request's header, data and status lie and may change all of it at any time. So the
header is copied before it is looked at, data goes between guest memory and the image without being read, and
every request that has a place for its status gets one, whatever was in it.
"""

from __future__ import annotations

import struct

from devices.errors import GuestError, ImageError
from devices.worker.ring import DRAINED, MORE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.block.image import Image
    from devices.virtio.queue import Chain, SplitQueue

# Feature bits, section 5.2.3.
VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_BLK_SIZE = 1 << 6
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_TOPOLOGY = 1 << 10
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14

# Request types and status, section 5.2.6.
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

SECTOR_SIZE = 512
# A queue of 128 entries less header and status, which is what drivers without indirect descriptors can use.
SEG_MAX = 126
SERIAL_SIZE = 20
MAX_SEGMENT_SECTORS = (1 << 31) // SECTOR_SIZE
MAX_SEGMENTS = 32
# Requests served between two looks at whether the ring is to stop: a guest that never lets it run dry must
# not win.
BATCH = 128
# Nor may it take minutes: descriptors may name the same memory again and again, up to 4 GiB for a request.
BATCH_BYTES = 64 << 20

_header = struct.Struct("<IIQ")
_capacity = struct.Struct("<Q")
_segment = struct.Struct("<QII")
# struct virtio_blk_config, section 5.2.4, up to write_zeroes_may_unmap and its padding.
_config = struct.Struct("<Q I I HBB I BBHI BBH III II B3x")


class BlkDevice:
    """A disk with one request queue. Owns `image`. `serial` is at most 20 bytes, what the guest sees as
    its id.
    """

    __slots__ = ("_capacity", "_config", "_image", "_serial", "_write_through", "features", "queue_count")

    def __init__(self, image: Image, serial: bytes = b"") -> None:
        self._image = image
        self._serial = serial[:SERIAL_SIZE].ljust(SERIAL_SIZE, b"\0")
        self._capacity = image.size // SECTOR_SIZE
        self._write_through = True
        self.queue_count = 1
        self.features = (
            VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_TOPOLOGY
        )
        if image.read_only:
            self.features |= VIRTIO_BLK_F_RO
        else:
            self.features |= VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
        block_sectors = max(1, image.block_size // SECTOR_SIZE)
        self._config = _config.pack(
            self._capacity,
            0,  # size_max: not offered
            SEG_MAX,
            *(0, 0, 0),  # geometry: not offered
            SECTOR_SIZE,
            block_sectors.bit_length() - 1,  # logical blocks per physical block, as a power of two
            0,
            min(block_sectors, 0xFFFF),  # min_io_size
            0,
            *(0, 0, 1),  # writeback, unused, num_queues
            *(MAX_SEGMENT_SECTORS, MAX_SEGMENTS, max(1, image.discard_granularity // SECTOR_SIZE)),
            *(MAX_SEGMENT_SECTORS, MAX_SEGMENTS),
            1,  # write_zeroes_may_unmap
        )

    def set_features(self, features: int) -> None:
        """A driver that did not accept FLUSH never flushes: its writes are stable when they complete
        (5.2.6.2).
        """
        self._write_through = not features & VIRTIO_BLK_F_FLUSH

    def read_config(self, offset: int, size: int) -> bytes:
        return self._config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        raise GuestError("the configuration of this disk is not writable")  # CONFIG_WCE is not offered

    def configure(self, offset: int, data: bytes) -> None:
        """A new capacity: the image grows to it."""
        if offset or len(data) != _capacity.size:
            raise GuestError("of this disk only the capacity can be changed")
        (capacity,) = _capacity.unpack(data)
        try:
            self._image.grow(capacity * SECTOR_SIZE)
        except (OSError, ImageError) as error:
            raise GuestError(f"the disk cannot grow to {capacity} sectors: {error}") from None
        self._capacity = capacity
        self._config = data + self._config[_capacity.size :]

    def source_fd(self, index: int) -> int:
        return -1

    def process(self, index: int, queue: SplitQueue) -> int:
        moved = 0
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return DRAINED
            queue.push(chain.head, self._serve(chain))
            moved += chain.readable_size + chain.writable_size
            if moved >= BATCH_BYTES:
                break
        return MORE

    def release(self, index: int, queue: SplitQueue) -> None:
        """Every request is finished before the next is taken."""

    def close(self) -> None:
        """Everything written is on stable storage when this returns. Raises OSError or ImageError when it
        is not.
        """
        self._image.close()

    def _serve(self, chain: Chain) -> int:
        """Carry out one request. Returns how many bytes of it were written, status included."""
        if chain.readable_size < _header.size:
            raise GuestError(f"block request with a header of {chain.readable_size} bytes")
        if not chain.writable_size:
            raise GuestError("block request without a place for its status")
        header, outgoing = split(chain.readable, _header.size)
        incoming, status = split(chain.writable, chain.writable_size - 1)
        kind, _, sector = _header.unpack(b"".join(header))
        written = 0
        try:
            if kind == VIRTIO_BLK_T_IN:
                written = chain.writable_size - 1
                answer = self._read(sector, written, incoming)
            elif kind == VIRTIO_BLK_T_OUT:
                answer = self._write(sector, chain.readable_size - _header.size, outgoing)
            elif kind == VIRTIO_BLK_T_FLUSH:
                self._image.flush()
                answer = VIRTIO_BLK_S_OK
            elif kind == VIRTIO_BLK_T_GET_ID:
                written = scatter(self._serial, incoming)
                answer = VIRTIO_BLK_S_OK
            elif kind in (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES):
                answer = self._deallocate(kind, chain.readable_size - _header.size, outgoing)
            else:
                answer = VIRTIO_BLK_S_UNSUPP
        except (OSError, ImageError):
            answer = VIRTIO_BLK_S_IOERR
        if answer != VIRTIO_BLK_S_OK:
            written = 0
        status[0][0] = answer
        return written + 1

    def _in_range(self, sector: int, size: int) -> bool:
        return size % SECTOR_SIZE == 0 and sector + size // SECTOR_SIZE <= self._capacity

    def _read(self, sector: int, size: int, buffers: list[memoryview]) -> int:
        if not self._in_range(sector, size):
            return VIRTIO_BLK_S_IOERR
        if size:
            self._image.readv(sector * SECTOR_SIZE, buffers)
        return VIRTIO_BLK_S_OK

    def _write(self, sector: int, size: int, buffers: list[memoryview]) -> int:
        if self._image.read_only or not self._in_range(sector, size):
            return VIRTIO_BLK_S_IOERR
        if size:
            self._image.writev(sector * SECTOR_SIZE, buffers)
        if self._write_through:
            self._image.flush()
        return VIRTIO_BLK_S_OK

    def _deallocate(self, kind: int, size: int, buffers: list[memoryview]) -> int:
        """DISCARD and WRITE_ZEROES: all segments are checked before the first is carried out (5.2.6.2)."""
        if self._image.read_only:
            return VIRTIO_BLK_S_IOERR
        if not size or size % _segment.size or size > MAX_SEGMENTS * _segment.size:
            return VIRTIO_BLK_S_IOERR
        known_flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if kind == VIRTIO_BLK_T_WRITE_ZEROES else 0
        segments = list(_segment.iter_unpack(b"".join(buffers)))
        for sector, count, flags in segments:
            if flags & ~known_flags:
                return VIRTIO_BLK_S_UNSUPP
            if count > MAX_SEGMENT_SECTORS or not self._in_range(sector, count * SECTOR_SIZE):
                return VIRTIO_BLK_S_IOERR
        for sector, count, flags in segments:
            if kind == VIRTIO_BLK_T_DISCARD:
                self._image.discard(sector * SECTOR_SIZE, count * SECTOR_SIZE)
            else:
                self._image.write_zeroes(sector * SECTOR_SIZE, count * SECTOR_SIZE, bool(flags))
        if self._write_through:
            self._image.flush()
        return VIRTIO_BLK_S_OK


def split(views: list[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `at` bytes of `views`, and the rest; neither has empty views in it."""
    before: list[memoryview] = []
    after: list[memoryview] = []
    for view in views:
        size = len(view)
        if size <= at:
            if size:
                before.append(view)
            at -= size
        elif at:
            before.append(view[:at])
            after.append(view[at:])
            at = 0
        else:
            after.append(view)
    return before, after


def scatter(data: bytes, views: list[memoryview]) -> int:
    """Copy `data` into `views` as far as they go. Returns how many bytes that was."""
    done = 0
    for view in views:
        piece = data[done : done + len(view)]
        view[: len(piece)] = piece
        done += len(piece)
        if done == len(data):
            break
    return done
