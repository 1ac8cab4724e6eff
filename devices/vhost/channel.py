"""One vhost-user connection: whole messages with their file descriptors over a stream socket. Both ends use
it.

The peer is hostile from either side: a compromised worker talks to the VMM, and anybody may connect to a back
end. So sizes are bounded before anything is allocated, descriptors are close-on-exec from the first moment
and closed when anything is wrong, and whoever must not hang gives a timeout for the whole message, not for
each byte of it.
"""

from __future__ import annotations

import os
import select
import struct
import time
from _socket import (  # what `socket` adds costs a worker 5 ms of start-up
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SHUT_RDWR,
    SOL_SOCKET,
)

from devices.vhost.messages import HEADER, MAX_MEM_TABLE_REGIONS, VERSION, VERSION_MASK, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Sequence

MAX_PAYLOAD = 4096
MAX_FDS = MAX_MEM_TABLE_REGIONS

_ANCILLARY_SPACE = CMSG_SPACE(MAX_FDS * 4)


class Message:
    """One received message. It owns `fds` until somebody takes them; `close` closes those nobody took."""

    __slots__ = ("fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds

    def take_fd(self) -> int:
        """The first descriptor left; the caller owns it from now on."""
        return self.fds.pop(0)

    def close(self) -> None:
        _close_all(self.fds)


class Channel:
    """Sends and receives messages on `sock`, a connected AF_UNIX stream socket, which it owns.

    One thread at a time may send, and one receive. A timeout is in seconds for the whole message: None waits
    for ever (and makes no system call but the one needed), 0 does not wait. Besides what each method says,
    `OSError` is the host's failure.
    """

    __slots__ = ("_fds", "_received", "_sock")

    def __init__(self, sock: socket) -> None:
        self._sock = sock
        self._received = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Send one message; `fds` stay the caller's.

        Raises EOFError when the peer is gone, TimeoutError when it does not read (the stream is torn then).
        """
        data = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        rights = [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        deadline = _deadline(timeout)
        send_flags = MSG_NOSIGNAL if deadline is None else MSG_NOSIGNAL | MSG_DONTWAIT
        while data:
            if deadline is not None:
                self._wait(select.POLLOUT, deadline)
            try:
                sent = self._sock.sendmsg([data], rights, send_flags)
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                raise EOFError("the peer closed the connection") from None
            data = data[sent:]
            rights = []  # they went with the first byte

    def receive(self, timeout: float | None = None) -> Message:
        """The next message.

        Raises EOFError when the peer closed between two messages, ProtocolError for anything that is no
        message, and TimeoutError, after which another call goes on where this one stopped.
        """
        deadline = _deadline(timeout)
        try:
            self._fill(HEADER.size, deadline)
            request, flags, size = HEADER.unpack_from(self._received)
            if flags & VERSION_MASK != VERSION:
                raise ProtocolError(f"message of version {flags & VERSION_MASK}, not {VERSION}")
            if size > MAX_PAYLOAD:
                raise ProtocolError(f"message of {size} bytes; {MAX_PAYLOAD} is the most")
            self._fill(HEADER.size + size, deadline)
        except TimeoutError:
            raise
        except BaseException:
            _close_all(self._fds)
            raise
        message = Message(request, flags, bytes(self._received[HEADER.size :]), self._fds)
        self._received.clear()
        self._fds = []
        return message

    def shutdown(self) -> None:
        """End the conversation both ways, waking whoever waits on either end. For any thread."""
        try:
            self._sock.shutdown(SHUT_RDWR)
        except OSError:
            pass  # it was over already

    def close(self) -> None:
        _close_all(self._fds)
        self._sock.close()

    def _fill(self, size: int, deadline: float | None) -> None:
        """Receive until `size` bytes of the current message are here, and never a byte of the next one."""
        receive_flags = MSG_CMSG_CLOEXEC if deadline is None else MSG_CMSG_CLOEXEC | MSG_DONTWAIT
        while len(self._received) < size:
            if deadline is not None:
                self._wait(select.POLLIN, deadline)
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    size - len(self._received), _ANCILLARY_SPACE, receive_flags
                )
            except BlockingIOError:
                continue
            except ConnectionResetError:
                data, ancillary, flags = b"", [], 0
            for level, kind, rights in ancillary:
                if level == SOL_SOCKET and kind == SCM_RIGHTS:
                    count = len(rights) // 4
                    self._fds.extend(struct.unpack_from(f"={count}i", rights))
            if flags & MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise ProtocolError(f"message with more than {MAX_FDS} file descriptors")
            if not data:
                if self._received:
                    raise ProtocolError("the peer closed the connection in the middle of a message")
                raise EOFError("the peer closed the connection")
            self._received += data

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        remaining = deadline - time.monotonic()
        if not poll.poll(max(0.0, remaining) * 1000):
            raise TimeoutError("no answer in time")


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
