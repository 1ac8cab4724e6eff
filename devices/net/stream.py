"""Ethernet frames over a connected UNIX stream socket, as QEMU's `-netdev stream` and passt(1) have them:
four bytes of length, big-endian, then the frame. Worker process.

Input is peeked at, and taken out of the socket in whole frames only, after they were delivered: who lets go
of the socket leaves it at the start of a frame, with all that is not delivered. Output goes out with one call
for a frame; of one that the kernel does not take whole the rest waits here, and is lost with a worker that is
killed. What reads the stream would take the next frame's beginning for that rest, and for a frame what comes
then: payload, which the guest chooses and no filter has seen. So such a worker has no successor on the socket
(`vmrun.machine.workers`).

What is at the other end may have been taken over: a length it says is believed up to MAX_FRAME.
"""

from __future__ import annotations

import os
import select
from _socket import MSG_DONTWAIT, MSG_PEEK, socket

from devices.net.frames import ETHERNET_HEADER

LENGTH_SIZE = 4
VLAN_TAG = 4
# The largest MTU a Linux interface takes, with an Ethernet header and one VLAN tag.
MAX_FRAME = 65535 + ETHERNET_HEADER + VLAN_TAG
# Room for one frame of any size, or for some dozens of the usual one.
BUFFER_SIZE = 2 * (LENGTH_SIZE + MAX_FRAME)

GONE = "what serves this card's network is gone"


class FrameStream:
    """Whole frames in and out of the connected stream socket `fd`, which stays the caller's.

    One thread receives and one sends. `input_fd` is readable when there may be more to receive, once for each
    arrival; `output_fd` when there is room to send.
    """

    __slots__ = (
        "_end",
        "_fd",
        "_hung_up",
        "_input",
        "_output",
        "_scratch",
        "_socket",
        "_start",
        "_unsent",
        "_view",
    )

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._socket = socket(fileno=fd)
        self._view = memoryview(bytearray(BUFFER_SIZE))
        self._scratch = memoryview(bytearray(BUFFER_SIZE))
        # What the socket has, from its start: `_start` bytes of it are delivered, up to `_end` is seen.
        self._start = self._end = 0
        self._unsent = memoryview(b"")
        self._hung_up = False
        # Edge-triggered: half a frame stays in the socket, and must not keep the receiving thread awake.
        self._input = select.epoll()
        self._input.register(fd, select.EPOLLIN | select.EPOLLET)
        self._output = select.epoll()
        self._output.register(fd, select.EPOLLOUT)

    @property
    def input_fd(self) -> int:
        return self._input.fileno()

    @property
    def output_fd(self) -> int:
        return self._output.fileno()

    def receive(self) -> memoryview:
        """The next frame, of 0 to MAX_FRAME bytes, good until the next call.

        Raises BlockingIOError when there is no whole one, and OSError when there will be none any more.
        """
        while True:
            body = self._start + LENGTH_SIZE
            if body <= self._end:
                size = int.from_bytes(self._view[self._start : body], "big")
                if size > MAX_FRAME:
                    raise OSError(0, f"what serves this card's network sent a frame of {size} bytes")
                if body + size <= self._end:
                    self._start = body + size
                    return self._view[body : self._start]
            self._look()

    def _look(self) -> None:
        """See more of what the socket has than half a frame. Raises as `receive` does."""
        half = self._end - self._start
        self.settle()
        # Before the look: what arrives after it is a new edge.
        for _, events in self._input.poll(0):
            self._hung_up = self._hung_up or bool(events & select.EPOLLHUP)
        seen = self._socket.recvmsg_into([self._view], 0, MSG_PEEK | MSG_DONTWAIT)[0]
        if not seen or (seen <= half and self._hung_up):
            raise OSError(0, GONE)
        if seen <= half:
            raise BlockingIOError
        self._end = seen

    def settle(self) -> None:
        """Take out of the socket what was delivered, and forget the rest, which is still in there."""
        left = self._start
        self._start = self._end = 0
        while left:
            taken = self._socket.recvmsg_into([self._scratch[:left]], 0, MSG_DONTWAIT)[0]
            if not taken:
                raise OSError(0, GONE)
            left -= taken

    def send(self, frame: bytes) -> None:
        """Send `frame`, of at most MAX_FRAME bytes, now or with the next `flush`. After a `flush` that said
        True.
        """
        self._unsent = memoryview(len(frame).to_bytes(LENGTH_SIZE, "big") + frame)
        self.flush()

    def flush(self) -> bool:
        """Whether everything is sent. Otherwise ask again when `output_fd` is readable. OSError when the rest
        of a frame cannot be sent: nothing may be sent after that.
        """
        while self._unsent:
            try:
                sent = os.write(self._fd, self._unsent)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                sent = len(self._unsent)  # nobody is there; the receiving thread says so
            self._unsent = self._unsent[sent:]
        return True

    def close(self) -> None:
        self._socket.detach()
        self._input.close()
        self._output.close()
