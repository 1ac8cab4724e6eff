"""What the ports of the virtio console are connected to: UNIX stream sockets, on the main loop. VMM process.

`PortLink` joins a port to one connected socket at a time, `PortListener` joins ports to those who connect to
a path. No byte is kept in this process: sockets and guest memory are all the buffers there are. A
client that does not read stops the guest's writers; a guest that does not read stops the client's.

A stream is as long as both ends have it open. When the guest closes its end, or its driver goes, the client
gets what was written and then the end of file. When the client goes, the guest is told (in Linux the port
polls as hung up and reads as ended); what the guest wrote and nobody took is kept for the next client. The
next client's stream may thus begin with the rest of a message for the last one, and so may the guest's: after
PORT_OPEN, and after a restore, both must be able to find the first whole message, say by a greeting that
cannot be part of another. What a client sent before it went waits for a guest that is slow; of a guest that
takes nothing of it for some seconds, the next client may have the port, and the rest is lost. A client that
only shuts down its writing half still gets all the output; the guest cannot be told of that, the protocol has
no word for it.
"""

import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from devices.virtio.console_ports import Port
from vmrun.control.runtime import bounded_socket_path
from vmrun.machine.loop import EventLoop

UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)
BACKLOG = 16  # clients that wait for their turn
FAREWELL_READ = 1 << 20  # bytes from a client that are thrown away when the guest has closed
ACCEPT_AGAIN_SECONDS = 1.0
UNHEARD_SECONDS = 5.0  # for a guest to take something of what one who is gone has left
MAX_BUFFERS = 1024  # UIO_MAXIOV: more are refused, and a guest may make a chain of more


class PortLink:
    """A `PortHost`: the host's end of `port`. Owns the socket it is connected to.

    `on_free` is called on the main loop whenever another connection could take the place of this one.
    """

    def __init__(self, loop: EventLoop, port: Port, on_free: Callable[[], None] = lambda: None) -> None:
        self.port = port
        self.on_free = on_free
        self._loop = loop
        self._connection: socket.socket | None = None
        self._hung_up = False  # the client is gone; there may be bytes of it that the guest has not taken
        self._unheard = False  # and will not take them, it seems
        self._ended = False  # there is nothing more to read
        port.host = self

    @property
    def free(self) -> bool:
        """Whether a client can have the port: there is none, or one that is gone and left words that no
        program in the guest listens to, though a hostile one may have the port open.
        """
        deaf = self._unheard or not self.port.guest_open
        return self._connection is None or (self._hung_up and deaf)

    def connect(self, connection: socket.socket) -> None:
        """Join `connection`, a UNIX stream socket, to the port, and own it. RuntimeError when the port is not
        `free`. Main loop.
        """
        if not self.free:
            raise RuntimeError(f"port {self.port.name} is in use")
        self._drop()
        connection.setblocking(False)
        self._connection = connection
        self._hung_up = self._unheard = self._ended = False
        self._loop.watch_hangup(connection.fileno(), self._hangup)
        self.port.host_opened()

    def close(self) -> None:
        """Let go of the client, if there is one. Main loop, or when that does not run any more."""
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._loop.unwatch(connection.fileno())
            connection.close()
            self.port.host_closed()

    def _leave(self, connection: socket.socket) -> None:
        """`connection` is over, unless it was over before and this is another."""
        if connection is self._connection:
            self._drop()
            self.on_free()

    # What the device calls.

    def send(self, buffers: list[memoryview]) -> int:
        connection = self._connection
        if connection is None or self._hung_up:
            return 0
        try:
            taken = connection.sendmsg(buffers[:MAX_BUFFERS], (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            taken = 0
        except (BrokenPipeError, ConnectionResetError):
            # What it sent before it went may still be of interest.
            self._loop.call_soon(partial(self._gone, connection))
            return 0
        if taken < sum(map(len, buffers)):
            self._loop.watch_writable(connection.fileno(), self._writable)
        return taken

    def receive_into(self, buffers: list[memoryview]) -> int:
        connection = self._connection
        if connection is None or self._ended:
            return 0
        try:
            count = connection.recvmsg_into(buffers[:MAX_BUFFERS])[0]
        except BlockingIOError:
            self._loop.watch(connection.fileno(), self._readable)
            return 0
        except ConnectionResetError:
            count = 0
        if not count:
            self._ended = True
            if self._hung_up or _hung_up(connection):
                self._loop.call_soon(partial(self._leave, connection))
        return count

    def guest_closed(self) -> None:
        connection = self._connection
        if connection is not None:
            self._loop.call_soon(partial(self._farewell, connection))

    # What the main loop calls.

    def _readable(self) -> None:
        if self._connection is not None:
            # Not again until the guest has taken this, or it would be all that the loop does.
            self._loop.watch(self._connection.fileno(), None)
            self.port.input_ready()

    def _writable(self) -> None:
        if self._connection is not None:
            self._loop.watch_writable(self._connection.fileno(), None)
            self.port.room()

    def _hangup(self) -> None:
        # The descriptor's number may have been another's when the loop was told.
        connection = self._connection
        if connection is not None and _hung_up(connection):
            self._gone(connection)

    def _gone(self, connection: socket.socket) -> None:
        """The client is gone, and what it sent is still to be delivered."""
        if connection is not self._connection:
            return
        self._loop.unwatch(connection.fileno())
        self._hung_up = True
        if self._ended or not _unread(connection):
            self._leave(connection)
            return
        self.port.input_ready()
        self._await_ear(connection)
        if self.free:
            self.on_free()

    def _await_ear(self, connection: socket.socket) -> None:
        left = _unread(connection)

        def look() -> None:
            if connection is not self._connection:
                return
            if _unread(connection) < left:
                self._await_ear(connection)
            else:
                self._unheard = True
                self.on_free()

        self._loop.call_later(UNHEARD_SECONDS, look)

    def _farewell(self, connection: socket.socket) -> None:
        """The guest has closed. The client reads the end of file, if it has not sent too much that nobody
        read: then it is told that.
        """
        if connection is not self._connection:
            return
        try:
            connection.shutdown(socket.SHUT_RDWR)
            left = FAREWELL_READ
            while left > 0 and (piece := connection.recv(min(left, 1 << 16))):
                left -= len(piece)
        except OSError:
            pass  # it is gone already, or there is nothing to read
        self._leave(connection)


class PortListener:
    """Lets the clients that connect to `path` have the ports, each one of its own. Those for whom there is
    none wait their turn, in the order in which they come.

    Owns the listening socket, the path and a `PortLink` for each port. Only root and the owner of this
    process are let in.
    """

    def __init__(self, loop: EventLoop, ports: Sequence[Port], path: Path) -> None:
        self.links = [PortLink(loop, port, self._listen) for port in ports]
        self.path = path
        self._loop = loop
        self._closed = self._held = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            directory_fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._socket.bind(bounded_socket_path(path, directory_fd))
            finally:
                os.close(directory_fd)
            self._socket.listen(BACKLOG)
            self._listen()
        except BaseException:
            self._socket.close()
            raise

    def hold(self) -> None:
        """Let nobody in before `admit`: those who come wait their turn. Whoever has `links` may use them."""
        self._held = True

    def admit(self) -> None:
        self._held = False
        self._listen()

    @property
    def _free(self) -> PortLink | None:
        """For the next client."""
        if self._held or self._closed:
            return None
        return next((link for link in self.links if link.free), None)

    def _listen(self) -> None:
        if self._free is not None:
            self._loop.watch(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        link = self._free
        if link is None:
            # Those who come now wait in the socket's queue, which wakes nobody.
            self._loop.unwatch(self._socket.fileno())
            return
        try:
            client, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError:
            # No descriptors or no memory. The client stays in the queue, and would wake us again and again.
            self._loop.unwatch(self._socket.fileno())
            self._loop.call_later(ACCEPT_AGAIN_SECONDS, self._listen)
            return
        _, uid, _ = UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        if uid not in (0, os.geteuid()):
            client.close()
            return
        link.connect(client)
        if self._free is None:
            self._loop.unwatch(self._socket.fileno())

    def close(self) -> None:
        """Stop listening, remove the path, let go of the clients."""
        if self._closed:
            return
        self._closed = True
        self._loop.unwatch(self._socket.fileno())
        with closing(self._socket):
            self.path.unlink(missing_ok=True)
        for link in self.links:
            link.close()


def _hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def _unread(connection: socket.socket) -> int:
    """How many bytes wait to be read: SIOCINQ, unix(7)."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0])
