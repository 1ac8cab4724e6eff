"""The front end's requests to a back end, each confirmed before the next one. VMM process; any thread.

vhost-user.rst, "Communication" and "VHOST_USER_PROTOCOL_F_REPLY_ACK". With REPLY_ACK every request is
acknowledged by the back end. Without it a GET_FEATURES follows each request that has no reply, as in QEMU:
requests are handled in order, so its reply confirms what went before, though not that it succeeded.
"""

import socket
import threading
from collections.abc import Sequence

from devices.vhost.channel import Channel, Message
from devices.vhost.messages import NEED_REPLY, REPLY, U64, ProtocolError, Request, request_name


class Refused(ProtocolError):
    """The back end understood the request and acknowledged that it did not carry it out."""


class Connection:
    """Owns `sock`. Each request takes `timeout` seconds at most.

    The methods that talk raise EOFError or OSError when the back end is gone or silent, and ProtocolError
    when its answer is not the one to the question. After any of these but Refused the connection is cut: a
    late answer must not be taken for the next one's.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.reply_ack = False  # to be set once it is negotiated
        self._channel = Channel(sock)
        self._timeout = timeout
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._channel.fileno()

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request that has a reply of its own: the reply's payload."""
        with self._lock:
            return self._exchange(request, payload, fds)

    def ask_fd(self, request: int, payload: bytes) -> tuple[bytes, int]:
        """As `ask`, for a reply that brings a descriptor, which is the caller's."""
        with self._lock:
            reply = self._answer(request, payload, fd_count=1)
            return reply.payload, reply.take_fd()

    def ask_u64(self, request: int) -> int:
        reply = self.ask(request)
        if len(reply) != U64.size:
            raise ProtocolError(f"reply to {request_name(request)} of {len(reply)} bytes")
        (value,) = U64.unpack(reply)
        return int(value)

    def set(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request that has none; it has been carried out when this returns.

        Raises Refused when the back end says that it was not.
        """
        with self._lock:
            if self.reply_ack:
                if self._exchange(request, payload, fds, NEED_REPLY) != bytes(U64.size):
                    raise Refused(f"{request_name(request)} was refused")
            else:
                self._send(request, payload, fds)
                self._exchange(Request.GET_FEATURES)

    def tell(self, request: int, payload: bytes) -> None:
        """A message that nobody acknowledges, REPLY_ACK or not; it has been taken in when this returns."""
        with self._lock:
            self._send(request, payload)
            self._exchange(Request.GET_FEATURES)

    def check_idle(self) -> None:
        """To be called when the socket is readable without a request under way in this thread.

        Unless another thread expects an answer, the back end hung up or talks out of turn: raises as `ask`
        would.
        """
        if not self._lock.acquire(blocking=False):
            return  # it is readable because the thread that asked has its answer
        try:
            if self._channel.fileno() < 0:
                return
            message = self._channel.receive(timeout=0)
            message.close()
        except TimeoutError:
            return  # that thread took it in the meantime; or it is half a message, and spoils the next answer
        finally:
            self._lock.release()
        raise ProtocolError(f"{request_name(message.request)} came unasked")

    def hang_up(self) -> None:
        """Cut the connection: a thread waiting for an answer stops waiting, the back end sees EOF."""
        self._channel.shutdown()

    def close(self) -> None:
        self.hang_up()
        with self._lock:
            self._channel.close()

    def _send(self, request: int, payload: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
        if self._channel.fileno() < 0:
            raise EOFError("the connection is closed")
        try:
            self._channel.send(request, payload, fds, flags, self._timeout)
        except (EOFError, OSError):
            self.hang_up()
            raise

    def _exchange(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> bytes:
        return self._answer(request, payload, fds, flags).payload

    def _answer(
        self, request: int, payload: bytes, fds: Sequence[int] = (), flags: int = 0, fd_count: int = 0
    ) -> Message:
        """The reply; it has exactly `fd_count` descriptors, which are the caller's."""
        self._send(request, payload, fds, flags)
        try:
            try:
                reply = self._channel.receive(self._timeout)
            except TimeoutError:
                raise TimeoutError(f"no answer to {request_name(request)} in {self._timeout:g} s") from None
            if reply.request != request or not reply.flags & REPLY or len(reply.fds) != fd_count:
                reply.close()
                raise ProtocolError(f"{request_name(request)} was answered by something else")
            return reply
        except (EOFError, OSError, ProtocolError):
            self.hang_up()
            raise
