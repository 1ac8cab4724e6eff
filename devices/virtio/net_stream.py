"""The virtio network device whose network is a process at the other end of a stream socket: passt(1), for a
network without root. Worker process.

What a tap's driver does is done here: a stream has no virtio_net_hdr and no offloads, and takes a part of a
frame, or none, when it is full. Frames of the guest pass `devices.net.filter` first, as a private copy; its
DHCP requests are answered here, as those of any card with a lease, and passt hears of none.
"""

from __future__ import annotations

from devices.net.frames import ETHERNET_HEADER
from devices.net.stream import FrameStream
from devices.virtio.net import BATCH, RECEIVE_QUEUE, NetDevice
from devices.worker.ring import DRAINED, MORE, NEED_SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.net.dhcp import Lease
    from devices.net.filter import OutboundFilter
    from devices.virtio.net import Posted
    from devices.virtio.queue import SplitQueue


class StreamNetDevice(NetDevice):
    """A network card with one queue pair. Owns `fd`, a connected stream socket. `mac` and `mtu` as in
    NetDevice.
    """

    __slots__ = ("_outbound", "_stream")

    def __init__(
        self, fd: int, mac: bytes, mtu: int | None = None, *, lease: Lease | None, outbound: OutboundFilter
    ) -> None:
        self._outbound = outbound
        super().__init__(fd, mac, mtu, lease=lease)

    def _open(self, fd: int) -> int:
        self._stream = FrameStream(super()._open(fd))
        return self._stream.input_fd

    def source_fd(self, index: int) -> int:
        return self._stream.output_fd if index != RECEIVE_QUEUE else super().source_fd(index)

    def release(self, index: int, queue: SplitQueue) -> None:
        super().release(index, queue)
        if index == RECEIVE_QUEUE:
            self._stream.settle()

    def close(self) -> None:
        if self._tap_fd >= 0:
            self._stream.close()
        super().close()

    def _read(self, posted: Posted) -> int:
        frame = self._stream.receive()
        return self._deliver(frame, posted) if len(frame) >= ETHERNET_HEADER else 0

    def _transmit(self, queue: SplitQueue) -> int:
        for _ in range(BATCH):
            # A frame that is not sent yet keeps the next one in the guest.
            if not self._stream.flush():
                return NEED_SOURCE
            chain = queue.pop()
            if chain is None:
                return DRAINED
            self._send(chain)
            queue.push(chain.head, 0)
        return MORE

    def _write(self, frame: list[memoryview]) -> None:
        packet = self._outbound.pass_on(b"".join(frame))
        if packet:
            self._stream.send(packet)
