"""The virtio network device over a tap descriptor (virtio 1.2, section 5.1). Worker process.

Frames go between the tap and guest memory without a copy and without being looked at. Receive and transmit
are two queues, each processed by a thread of its own. No offload is offered, so every virtio_net_hdr says
nothing: the guest's is skipped and ours are zero, and no number the guest wrote into one reaches the kernel.

Two settings make it look, and only they (both are OpenBSD vmd's):

- A `locked` card sends no frame from another source MAC, and gets none that is for another station. What is
  not for the guest must not even pass through its memory, so received frames take a copy.
- With a `lease` the guest's DHCP requests are answered here (`devices.net.dhcp`) and go no further. The
  answer is made by the transmit thread and delivered by the receive thread, like a frame from the tap.

The head of a frame that is looked at is a private copy, and that copy is what is sent on: the guest may
change its own between the check and the write.

What is done with the tap itself is in `_open`, `_read` and `_write`; `devices.virtio.net_stream` has others.

The tap was opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, its header size set to 12 bytes and its offloads
to none, by whoever made the descriptor.
"""

from __future__ import annotations

import os
import select
import struct

from devices.errors import GuestError
from devices.net import dhcp
from devices.net.frames import ETHERNET_HEADER, is_for, source_mac
from devices.net.stream import MAX_FRAME, VLAN_TAG
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

# As much of a frame as tells whether it can be a DHCP request: up to the end of its UDP header.
PEEK = 42
# Answers that may wait for receive buffers. A guest that asks without ever listening loses the rest.
MAX_ANSWERS = 16
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


class Posted:
    """A receive buffer of the guest that waits for a frame of at most `room` bytes: `buffers` is what the tap
    is read into.
    """

    __slots__ = ("buffers", "chain", "frame", "header", "room")

    def __init__(self, chain: Chain, header_size: int, max_frame: int) -> None:
        self.chain = chain
        self.header, self.frame = split(chain.writable, header_size)
        del self.frame[IOV_MAX - 2 :]
        self.room = min(sum([len(view) for view in self.frame]), max_frame)
        # The tap cuts a frame that does not fit and does not say so: a byte in the last buffer is how it
        # shows.
        self.buffers: list[memoryview | bytearray] = [bytearray(TAP_HEADER_SIZE), *self.frame, bytearray(1)]


class _Answers:
    """Frames for the guest that come from this process: the transmit thread adds, the receive thread takes.

    Owns `fd`, an epoll instance that is readable when an answer or the tap waits for the receive thread: that
    has one descriptor to wait for.
    """

    __slots__ = ("_bell", "_epoll", "_waiting", "fd")

    def __init__(self, tap_fd: int) -> None:
        self._waiting: list[bytes] = []
        self._epoll = select.epoll()
        self.fd = self._epoll.fileno()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(tap_fd, select.EPOLLIN)
        self._epoll.register(self._bell, select.EPOLLIN)

    def add(self, frame: bytes) -> None:
        """Transmit thread. Drops the frame when too many wait."""
        if len(self._waiting) < MAX_ANSWERS:
            self._waiting.append(frame)
            os.eventfd_write(self._bell, 1)

    def take(self) -> bytes | None:
        """Receive thread: the oldest."""
        return self._waiting.pop(0) if self._waiting else None

    def hush(self) -> bool:
        """Receive thread, before it waits: whether there is nothing to take. What is added from now on wakes
        it.
        """
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass
        return not self._waiting

    def close(self) -> None:
        self._epoll.close()
        os.close(self._bell)


class NetDevice:
    """A network card with one queue pair. Owns `tap_fd`, which it makes non-blocking. `mac` is six bytes."""

    __slots__ = (
        "_answers",
        "_config",
        "_header_size",
        "_input_fd",
        "_lease",
        "_locked",
        "_mac",
        "_max_received",
        "_mtu",
        "_posted",
        "_private",
        "_tap_fd",
        "features",
        "queue_count",
    )

    def __init__(
        self,
        tap_fd: int,
        mac: bytes,
        mtu: int | None = None,
        *,
        locked: bool = False,
        lease: dhcp.Lease | None = None,
    ) -> None:
        """`mtu` is what the guest is told to use at most, 68 to 65535; None tells it nothing."""
        if len(mac) != 6 or mac[0] & 1:
            raise ValueError("a MAC is six bytes and not a multicast address")
        if mtu is not None and not 68 <= mtu <= 65535:
            raise ValueError(f"MTU {mtu} is not in 68 to 65535")
        self._tap_fd = tap_fd
        self._input_fd = self._open(tap_fd)
        self._mac = mac
        self._mtu = mtu or 0
        self._locked = locked
        self._lease = lease
        self._answers = _Answers(self._input_fd) if lease is not None else None
        # Header and frame, and a byte that only a frame too long for us reaches.
        self._private = bytearray(TAP_HEADER_SIZE + MAX_FRAME + 1 if locked else 0)
        self._header_size = TAP_HEADER_SIZE
        self._max_received = MAX_FRAME
        self._posted: Posted | None = None
        self.queue_count = 2
        self.features = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS
        if mtu is not None:
            self.features |= VIRTIO_NET_F_MTU
        self._config = _config.pack(mac, VIRTIO_NET_S_LINK_UP, 1, self._mtu)

    def _open(self, fd: int) -> int:
        """Make `fd` fit for us. Returns what is readable when it has input."""
        if os.get_blocking(fd):
            os.set_blocking(fd, False)  # not allowed in a worker's sandbox, where it has been done before
        return fd

    def set_features(self, features: int) -> None:
        self._header_size = TAP_HEADER_SIZE if features & VIRTIO_F_VERSION_1 else LEGACY_HEADER_SIZE
        # A driver that took the MTU is promised no longer frame (5.1.4.1).
        self._max_received = MAX_FRAME
        if features & VIRTIO_NET_F_MTU:
            self._max_received = self._mtu + ETHERNET_HEADER + VLAN_TAG

    def read_config(self, offset: int, size: int) -> bytes:
        return self._config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Legacy drivers may write the MAC (5.1.4.3); here it is the host's to choose."""
        raise GuestError("the configuration of this network card is not writable")

    def configure(self, offset: int, data: bytes) -> None:
        raise GuestError("the configuration of this network card is fixed")

    def source_fd(self, index: int) -> int:
        if index != RECEIVE_QUEUE:
            return -1
        return self._input_fd if self._answers is None else self._answers.fd

    def process(self, index: int, queue: SplitQueue) -> int:
        """A tap that is gone (its interface was deleted) raises OSError on the receiving side."""
        return self._receive(queue) if index == RECEIVE_QUEUE else self._transmit(queue)

    def release(self, index: int, queue: SplitQueue) -> None:
        """Make the buffer that still waits for a frame available again: the queue may go on elsewhere."""
        if index == RECEIVE_QUEUE and self._posted is not None:
            queue.unpop(self._posted.chain)
            self._posted = None

    def close(self) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None
        if self._tap_fd >= 0:
            os.close(self._tap_fd)
            self._tap_fd = -1

    def _receive(self, queue: SplitQueue) -> int:
        """The tap is read only into a buffer of the guest: while there is none, frames wait in the tap's
        own queue.
        """
        answers = self._answers
        for _ in range(BATCH):
            posted = self._posted
            if posted is None:
                chain = queue.pop()
                if chain is None:
                    return DRAINED
                if chain.writable_size < self._header_size + ETHERNET_HEADER:
                    queue.push(chain.head, 0)  # no frame fits into this
                    continue
                posted = self._posted = Posted(chain, self._header_size, self._max_received)
            answer = answers.take() if answers is not None else None
            try:
                size = self._deliver(answer, posted) if answer is not None else self._read(posted)
            except BlockingIOError:
                if answers is None or answers.hush():
                    return NEED_SOURCE
                continue
            if not 0 < size <= posted.room:
                continue  # too long: the frame is dropped, the buffer takes the next one
            scatter(_RECEIVED[: self._header_size], posted.header)
            self._posted = None
            queue.push(posted.chain.head, self._header_size + size)
        return MORE

    def _read(self, posted: Posted) -> int:
        """Read a frame into the guest's buffer. Returns its size, or 0 for one that is not for the guest."""
        if not self._locked:
            return os.readv(self._tap_fd, posted.buffers) - TAP_HEADER_SIZE
        size = os.readv(self._tap_fd, [self._private]) - TAP_HEADER_SIZE
        destination = bytes(self._private[TAP_HEADER_SIZE : TAP_HEADER_SIZE + 6])
        if size < ETHERNET_HEADER or not is_for(self._mac, destination):
            return 0
        return self._deliver(bytes(self._private[TAP_HEADER_SIZE : TAP_HEADER_SIZE + size]), posted)

    @staticmethod
    def _deliver(frame: bytes | memoryview, posted: Posted) -> int:
        if len(frame) <= posted.room:
            scatter(frame, posted.frame)  # type: ignore[arg-type]  # what it slices, a memoryview has too
        return len(frame)

    def _transmit(self, queue: SplitQueue) -> int:
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return DRAINED
            self._send(chain)
            queue.push(chain.head, 0)
        return MORE

    def _send(self, chain: Chain) -> None:
        """A frame that cannot or may not be sent is dropped, as on a wire."""
        if not ETHERNET_HEADER <= chain.readable_size - self._header_size <= MAX_FRAME:
            return
        _, frame = split(chain.readable, self._header_size)
        if self._locked or self._lease is not None:
            frame = self._inspect(frame)
            if not frame:
                return
        self._write(frame)

    def _write(self, frame: list[memoryview]) -> None:
        if len(frame) >= IOV_MAX:
            frame = [memoryview(b"".join(frame))]
        try:
            os.writev(self._tap_fd, [_SENT, *frame])
        except OSError:
            pass  # the interface is down or out of memory, or calls this no frame

    def _inspect(self, frame: list[memoryview]) -> list[memoryview]:
        """What to send of `frame`; nothing when it is forged, or answered here."""
        before, after = split(frame, PEEK)
        head = b"".join(before)
        if self._locked and source_mac(head) != self._mac:
            return []
        frame = [memoryview(head), *after]
        if self._lease is not None and self._answers is not None and dhcp.may_be_request(head):
            # Whole and private, so that what was found to be no request is what the tap gets.
            request = b"".join(frame)
            answer = dhcp.answer(request, self._lease)
            if answer is not None:
                self._answers.add(answer)
                return []
            frame = [memoryview(request)]
        return frame
