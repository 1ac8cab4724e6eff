"""Which requests a back end has taken and not yet answered, in memory that outlives it. Worker process.

vhost-user.rst, "Inflight I/O tracking", split virtqueues. The back end makes the buffer, the front end keeps
its descriptor and hands it to the next back end when this one dies: what was in flight is then carried out
again, in its old order, and nothing is answered twice. Only the two ends share the buffer; the guest cannot
reach it. The used ring is the guest's, though, so `QueueTracker.recover` believes its index within bounds
only.

The marks are set by `devices.virtio.queue.SplitQueue`, which answers one request at a time: a batch is one
descriptor, the list of a batch ends where it begins, and `next` is never needed. It is followed all the same,
for the sake of a back end before us that did batch.
"""

from __future__ import annotations

import mmap
import os

from devices.errors import GuestError
from devices.vhost.messages import ProtocolError

VERSION = 1
# struct QueueRegionSplit: features u64, version, desc_num, last_batch_head, used_idx u16, then the states.
HEADER_SIZE = 16
VERSION_FIELD = 4  # in 16-bit words, as the other fields
ENTRIES_FIELD = 5
LAST_BATCH_HEAD_FIELD = 6
USED_IDX_FIELD = 7
# struct DescStateSplit: inflight u8, padding u8[5], next u16, counter u64. Two 64-bit words.
STATE_SIZE = 16
INFLIGHT_MASK = 0xFF
NEXT_SHIFT = 48
ALIGNMENT = 64  # a queue's region starts in a cache line of its own


def queue_region_size(entries: int) -> int:
    """Bytes for one queue of `entries` descriptors."""
    return -(-(HEADER_SIZE + STATE_SIZE * entries) // ALIGNMENT) * ALIGNMENT


class QueueTracker:
    """The region of one queue. Views of it must be gone before the buffer is unmapped: see `release`."""

    __slots__ = ("counter", "entries", "header", "states")

    def __init__(self, region: memoryview, entries: int) -> None:
        self.entries = entries
        self.counter = 0
        with region[:HEADER_SIZE] as header:
            self.header = header.cast("H")
        with region[HEADER_SIZE : HEADER_SIZE + STATE_SIZE * entries] as states:
            self.states = states.cast("Q")

    def recover(self, size: int, used_idx: int) -> list[int] | None:
        """The heads that are in flight in a ring of `size` entries, oldest first; None for a new region.

        `used_idx` is what the used ring says. Raises ProtocolError for a region that is none, and GuestError
        when the used ring is not where any back end can have left it: the guest wrote to it.
        """
        header, states = self.header, self.states
        if size > self.entries:
            raise ProtocolError(f"a ring of {size} entries, but {self.entries} in its in-flight region")
        if not header[VERSION_FIELD]:
            header[ENTRIES_FIELD] = self.entries
            header[USED_IDX_FIELD] = used_idx
            header[VERSION_FIELD] = VERSION
            return None
        if header[VERSION_FIELD] != VERSION or header[ENTRIES_FIELD] != self.entries:
            raise ProtocolError(f"in-flight region of version {header[VERSION_FIELD]}")
        # The back end before us may have died after it moved the used index, its marks still there.
        behind = (used_idx - header[USED_IDX_FIELD]) & 0xFFFF
        if behind > size:
            raise GuestError(f"the used index {used_idx} is {behind} past the last one a device wrote")
        head = header[LAST_BATCH_HEAD_FIELD]
        for _ in range(behind):
            if head >= size:
                raise GuestError(f"head {head} in the last batch is past the end of the queue")
            state = states[2 * head]
            states[2 * head] = state & ~INFLIGHT_MASK
            head = state >> NEXT_SHIFT
        header[USED_IDX_FIELD] = used_idx
        heads = [head for head in range(size) if states[2 * head] & INFLIGHT_MASK]
        heads.sort(key=lambda head: states[2 * head + 1])
        if heads:
            self.counter = (states[2 * heads[-1] + 1] + 1) & 0xFFFF_FFFF_FFFF_FFFF
        return heads

    def release(self) -> None:
        self.header.release()
        self.states.release()


class InflightBuffer:
    """The mapped buffer of all queues. Owns the mapping, not the descriptor."""

    __slots__ = ("_mapping", "_view", "entries", "queue_count", "size")

    def __init__(self, fd: int, size: int, offset: int, queue_count: int, entries: int) -> None:
        """Raises ProtocolError when the descriptor or the numbers cannot be such a buffer."""
        needed = queue_region_size(entries) * queue_count
        try:
            # Touching a page past the end of the file would be SIGBUS.
            if not 0 < needed <= size or offset + size > os.fstat(fd).st_size:
                raise ProtocolError(f"in-flight buffer of {size} bytes for {queue_count} queues of {entries}")
            self._mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, offset=offset)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"in-flight buffer cannot be mapped: {error}") from None
        self._view = memoryview(self._mapping)
        self.size = size
        self.queue_count = queue_count
        self.entries = entries

    def tracker(self, index: int) -> QueueTracker | None:
        """The region of queue `index`, or None when the buffer has none for it."""
        if index >= self.queue_count:
            return None
        size = queue_region_size(self.entries)
        with self._view[index * size : (index + 1) * size] as region:
            return QueueTracker(region, self.entries)

    def close(self) -> None:
        """Raises BufferError while a tracker is not released."""
        self._view.release()
        self._mapping.close()


def create_buffer(queue_count: int, entries: int) -> tuple[int, int]:
    """A new, empty buffer: (descriptor, size in bytes). The caller owns the descriptor. Raises OSError."""
    size = queue_region_size(entries) * queue_count
    fd = os.memfd_create("vhost-inflight", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd, size
