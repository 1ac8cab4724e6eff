"""The virtio network device over a tap descriptor (virtio 1.2, section 5.1). Worker process.

Frames go between the tap and guest memory without a copy and without being looked at. Receive and transmit
are two queues, each processed by a thread of its own. No offload is offered, so every virtio_net_hdr says
nothing: the guest's is skipped and ours are zero, and no number the guest wrote into one reaches the kernel.

The tap was opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, its header size set to 12 bytes and its offloads
to none, by whoever made the descriptor.
"""

from __future__ import annotations

import os
import struct

from devices.errors import GuestError
from devices.virtio.blk import scatter, split
from devices.worker.ring import DRAINED, MORE, NEED_SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.virtio.queue import Chain, SplitQueue

# Feature bits, section 5.1.3.
VIRTIO_NET_F_MTU = 1 << 3
VIRTIO_NET_F_MAC = 1 << 5
VIRTIO_NET_F_STATUS = 1 << 16
VIRTIO_F_VERSION_1 = 1 << 32

VIRTIO_NET_S_LINK_UP = 1

RECEIVE_QUEUE = 0
TRANSMIT_QUEUE = 1

ETHERNET_HEADER = 14
# The largest MTU a Linux interface takes, with an Ethernet header and one VLAN tag.
MAX_FRAME = 65535 + ETHERNET_HEADER + 4
IOV_MAX = 1024
# Frames moved between two looks at whether the ring is to stop, and between two interrupts.
BATCH = 64

# struct virtio_net_hdr_v1 as the tap has it; a driver without VERSION_1 uses the same without num_buffers
# (5.1.6.1).
TAP_HEADER_SIZE = 12
LEGACY_HEADER_SIZE = 10
_RECEIVED = bytes(10) + b"\1\0"  # no flags, no segmentation, num_buffers 1
_SENT = bytes(TAP_HEADER_SIZE)
# struct virtio_net_config, section 5.1.4, up to mtu.
_config = struct.Struct("<6sHHH")


class _Posted:
    """A receive buffer of the guest that waits for a frame: `buffers` is what the tap is read into."""

    __slots__ = ("buffers", "head", "header", "room")

    def __init__(self, chain: Chain, header_size: int) -> None:
        self.head = chain.head
        self.header, frame = split(chain.writable, header_size)
        del frame[IOV_MAX - 2 :]
        self.room = sum([len(view) for view in frame])
        # The tap cuts a frame that does not fit and does not say so: a byte in the last buffer is how it
        # shows.
        self.buffers: list[memoryview | bytearray] = [bytearray(TAP_HEADER_SIZE), *frame, bytearray(1)]


class NetDevice:
    """A network card with one queue pair. Owns `tap_fd`, which it makes non-blocking. `mac` is six bytes."""

    __slots__ = ("_config", "_header_size", "_posted", "_tap_fd", "features", "queue_count")

    def __init__(self, tap_fd: int, mac: bytes, mtu: int | None = None) -> None:
        """`mtu` is what the guest is told to use at most, 68 to 65535; None tells it nothing."""
        if len(mac) != 6 or mac[0] & 1:
            raise ValueError("a MAC is six bytes and not a multicast address")
        if mtu is not None and not 68 <= mtu <= 65535:
            raise ValueError(f"MTU {mtu} is not in 68 to 65535")
        os.set_blocking(tap_fd, False)
        self._tap_fd = tap_fd
        self._header_size = TAP_HEADER_SIZE
        self._posted: _Posted | None = None
        self.queue_count = 2
        self.features = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS
        if mtu is not None:
            self.features |= VIRTIO_NET_F_MTU
        self._config = _config.pack(mac, VIRTIO_NET_S_LINK_UP, 1, mtu or 0)

    def set_features(self, features: int) -> None:
        self._header_size = TAP_HEADER_SIZE if features & VIRTIO_F_VERSION_1 else LEGACY_HEADER_SIZE

    def read_config(self, offset: int, size: int) -> bytes:
        return self._config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Legacy drivers may write the MAC (5.1.4.3); here it is the host's to choose."""
        raise GuestError("the configuration of this network card is not writable")

    def source_fd(self, index: int) -> int:
        return self._tap_fd if index == RECEIVE_QUEUE else -1

    def process(self, index: int, queue: SplitQueue) -> int:
        """A tap that is gone (its interface was deleted) raises OSError on the receiving side."""
        return self._receive(queue) if index == RECEIVE_QUEUE else self._transmit(queue)

    def release(self, index: int, queue: SplitQueue) -> None:
        """Make the buffer that still waits for a frame available again: the queue may go on elsewhere."""
        if index == RECEIVE_QUEUE and self._posted is not None:
            queue.in_flight.discard(self._posted.head)
            queue.next_avail = (queue.next_avail - 1) & 0xFFFF
            self._posted = None

    def close(self) -> None:
        if self._tap_fd >= 0:
            os.close(self._tap_fd)
            self._tap_fd = -1

    def _receive(self, queue: SplitQueue) -> int:
        """The tap is read only into a buffer of the guest: while there is none, frames wait in the tap's
        own queue.
        """
        for _ in range(BATCH):
            posted = self._posted
            if posted is None:
                chain = queue.pop()
                if chain is None:
                    return DRAINED
                if chain.writable_size < self._header_size + ETHERNET_HEADER:
                    queue.push(chain.head, 0)  # no frame fits into this
                    continue
                posted = self._posted = _Posted(chain, self._header_size)
            try:
                size = os.readv(self._tap_fd, posted.buffers) - TAP_HEADER_SIZE
            except BlockingIOError:
                return NEED_SOURCE
            if not 0 < size <= posted.room:
                continue  # too long for this buffer: the frame is dropped, the buffer takes the next one
            scatter(_RECEIVED[: self._header_size], posted.header)
            self._posted = None
            queue.push(posted.head, self._header_size + size)
        return MORE

    def _transmit(self, queue: SplitQueue) -> int:
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return DRAINED
            self._send(chain)
            queue.push(chain.head, 0)
        return MORE

    def _send(self, chain: Chain) -> None:
        """A frame that cannot be sent is dropped, as on a wire."""
        if not ETHERNET_HEADER <= chain.readable_size - self._header_size <= MAX_FRAME:
            return
        _, frame = split(chain.readable, self._header_size)
        if len(frame) >= IOV_MAX:
            frame = [memoryview(b"".join(frame))]
        try:
            os.writev(self._tap_fd, [_SENT, *frame])
        except OSError:
            pass  # the interface is down or out of memory, or calls this no frame
