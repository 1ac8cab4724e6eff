"""The control socket of one machine: takes requests, asks the machine, answers. VMM process, main loop.

The protocol is docs/control.md. Every client is the owner or root, and still may be broken: sockets never
block, lines, clients, requests under way and output are bounded, and each wake-up serves a client a little.

The server outlives a machine: after a reset it serves the next one under the same name, and in the end it
tells those who wait.
"""

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from vmrun.control.protocol import (
    MAX_LINE,
    MAX_RESPONSE,
    BadRequest,
    Message,
    Request,
    encode,
    failure,
    parse_request,
    request_id,
    response,
)
from vmrun.control.runtime import RuntimeDirectory, bounded_socket_path
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, EXIT_VMM, UserError
from vmrun.host.console_hub import ConsoleHub
from vmrun.machine.loop import EventLoop

MAX_CLIENTS = 32
MAX_PENDING = 16  # requests of one client that wait for something
STREAM_LIMIT = 4 << 20  # bytes held for a slow reader of the console: more than the log can have
READ_SIZE = 1 << 14
ACCEPT_AGAIN_SECONDS = 1.0
MAX_DISKS = 31
MAX_DISK_SIZE = 1 << 62  # bytes

FAREWELL_SECONDS = 2.0  # how long the end of the VMM may wait for clients to take what is theirs

UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


class Controlled(Protocol):
    """What the server asks of a machine. Raises UserError for what cannot be."""

    def status(self) -> Message: ...
    def inspect(self) -> Message: ...
    def stop(self, force: bool) -> None: ...
    def reset(self) -> None: ...
    def pause(self, done: Callable[[str | None], None]) -> None: ...
    def resume(self) -> None: ...
    def resize(self, disk: int, size: int, done: Callable[[str | None], None]) -> None: ...
    def snapshot(self, directory: Path, end: bool, done: Callable[[Message | UserError], None]) -> None: ...


class ControlServer:
    """Owns the listening socket in `directory` and every connection."""

    def __init__(self, directory: RuntimeDirectory, hub: ConsoleHub) -> None:
        self.name = directory.name
        self.hub = hub
        self.machine: Controlled | None = None
        self.loop: EventLoop | None = None
        self.clients: list[Client] = []
        self._resetting: list[tuple[Client, int]] = []
        self._ending: Message | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        directory_fd = os.open(directory.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listener.bind(bounded_socket_path(directory.socket_path, directory_fd))
            self._listener.listen(MAX_CLIENTS)
        except BaseException:
            self._listener.close()
            raise
        finally:
            os.close(directory_fd)
        hub.on_room = self._room_for_input

    def serve(self, loop: EventLoop, machine: Controlled) -> None:
        """Serve `machine` from now on, on `loop`, which is about to run."""
        self.loop = loop
        self.machine = machine
        loop.watch(self._listener.fileno(), self._accept_ready)
        for client in self.clients:
            client.watch()
        resetting, self._resetting = self._resetting, []
        for client in tuple(self.clients):
            for number in client.pending - client.waits:
                if (client, number) not in resetting:
                    client.fail(number, f"machine {self.name} was reset", EXIT_VMM)
        for client, number in resetting:
            client.answer(number, {"state": "running"})
        if resetting:
            self.tell("running")

    def leave(self) -> None:
        """The machine has ended and its loop is gone; another may come."""
        self.loop = self.machine = None

    def _accept(self) -> bool:
        """Take one connection, if there is one."""
        loop = self.loop
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS) and loop is not None:
                # The connection stays in the queue, and would wake us again and again.
                loop.unwatch(self._listener.fileno())
                loop.call_later(
                    ACCEPT_AGAIN_SECONDS, lambda: loop.watch(self._listener.fileno(), self._accept_ready)
                )
            return False
        sock.setblocking(False)
        for client in tuple(self.clients) if len(self.clients) >= MAX_CLIENTS else ():
            client.close_if_gone()
        refusal = None
        _, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        if uid not in (0, os.geteuid()):
            refusal = f"machine {self.name} belongs to somebody else"
        elif len(self.clients) >= MAX_CLIENTS:
            refusal = f"machine {self.name} has {MAX_CLIENTS} clients already"
        client = Client(self, sock)
        if refusal is not None:
            client.send(failure(None, refusal))
            client.close()
        else:
            self.clients.append(client)
            client.watch()
        return True

    def _accept_ready(self) -> None:
        self._accept()

    def forget(self, client: "Client") -> None:
        if client in self.clients:
            self.clients.remove(client)
        self._resetting = [(other, number) for other, number in self._resetting if other is not client]

    def tell(self, event: str, **facts: Any) -> None:
        """Send an event to whoever asked for events."""
        line = encode({"event": event, "time": time.time(), **facts})
        for client in tuple(self.clients):
            if client.wants_events:
                client.send(line)

    def _room_for_input(self) -> None:
        for client in tuple(self.clients):
            client.watch()

    def handle(self, client: "Client", request: Request) -> None:
        """Serve one request. Raises BadRequest and UserError, whose text is the answer."""
        machine = self.machine
        if self._ending is not None and request.command == "wait":
            client.answer(request.id, self._ending)
            return
        if machine is None:
            raise BadRequest(f"machine {self.name} is not running", EXIT_VMM)
        if request.command not in COMMANDS:
            raise BadRequest(f"there is no command {request.command!r}")
        COMMANDS[request.command](self, machine, client, request)

    def _status(self, machine: Controlled, client: "Client", request: Request) -> None:
        request.no_more()
        client.answer(request.id, machine.status())

    def _inspect(self, machine: Controlled, client: "Client", request: Request) -> None:
        request.no_more()
        client.answer(request.id, {**machine.inspect(), "clients": len(self.clients)})

    def _stop(self, machine: Controlled, client: "Client", request: Request) -> None:
        force = request.flag("force")
        request.no_more()
        self.tell("stopping", force=force)
        machine.stop(force)
        client.answer(request.id, {"state": "stopping"})

    def _reset(self, machine: Controlled, client: "Client", request: Request) -> None:
        request.no_more()
        client.begin(request.id)
        try:
            machine.reset()
        except UserError:
            client.pending.discard(request.id)
            raise
        self._resetting.append((client, request.id))
        self.tell("resetting")

    def _pause(self, machine: Controlled, client: "Client", request: Request) -> None:
        request.no_more()
        client.begin(request.id)

        def done(error: str | None) -> None:
            if error is None:
                self.tell("paused")
                client.answer(request.id, {"state": "paused"})
            else:
                client.fail(request.id, error, EXIT_VMM)

        try:
            machine.pause(done)
        except UserError:
            client.pending.discard(request.id)
            raise

    def _resume(self, machine: Controlled, client: "Client", request: Request) -> None:
        request.no_more()
        machine.resume()
        self.tell("resumed")
        client.answer(request.id, {"state": "running"})

    def _resize(self, machine: Controlled, client: "Client", request: Request) -> None:
        disk = request.number("disk", 0, MAX_DISKS)
        size = request.number("size", 0, MAX_DISK_SIZE)
        request.no_more()
        client.begin(request.id)

        def done(error: str | None) -> None:
            if error is None:
                client.answer(request.id, {"size": size})
            else:
                client.fail(request.id, error, EXIT_IMAGE)

        try:
            machine.resize(disk, size, done)
        except UserError:
            client.pending.discard(request.id)
            raise

    def _snapshot(self, machine: Controlled, client: "Client", request: Request) -> None:
        directory = Path(request.text("directory"))
        end = request.flag("end")
        request.no_more()
        client.begin(request.id)

        def done(outcome: Message | UserError) -> None:
            if isinstance(outcome, UserError):
                client.fail(request.id, str(outcome), outcome.code)
            else:
                self.tell("saved", directory=outcome["directory"])
                client.answer(request.id, outcome)

        try:
            machine.snapshot(directory, end, done)
        except UserError:
            client.pending.discard(request.id)
            raise

    def _wait(self, machine: Controlled, client: "Client", request: Request) -> None:
        request.no_more()
        client.begin(request.id)
        client.waits.add(request.id)

    def _events(self, machine: Controlled, client: "Client", request: Request) -> None:
        request.no_more()
        client.wants_events = True
        client.answer(request.id, {})

    def _console(self, machine: Controlled, client: "Client", request: Request) -> None:
        replay = request.number("replay", 0, STREAM_LIMIT)
        request.no_more()
        self.hub.flush()
        kept = self.hub.log.read()[-replay:] if replay else b""
        client.become_stream(request.id, kept, takes_input=True, follow=True)

    def _log(self, machine: Controlled, client: "Client", request: Request) -> None:
        follow = request.flag("follow")
        request.no_more()
        self.hub.flush()
        client.become_stream(request.id, self.hub.log.read(), takes_input=False, follow=follow)

    def finish(self, code: int, reason: str) -> None:
        """The machine has ended for good: tell who waits, see the clients off, and close."""
        self.loop = self.machine = None
        self._ending = {"code": code, "reason": reason}
        self.tell("ended", **self._ending)
        for client in tuple(self.clients):
            client.ended(self._ending)
        # Whoever was too late to be heard in the machine's life, and in time for its end.
        while self._accept():
            pass
        for client in tuple(self.clients):
            client.last_requests()
        deadline = time.monotonic() + FAREWELL_SECONDS
        while busy := [client for client in self.clients if client.output]:
            poll = select.poll()
            for client in busy:
                poll.register(client.sock, select.POLLOUT)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                break
            for client in busy:
                client.flush()
        self.close()

    def close(self) -> None:
        self.loop = self.machine = None
        for client in tuple(self.clients):
            client.close()
        self._listener.close()


class Client:
    """One connection: lines at first, the console's bytes after a `console` or `log` request."""

    def __init__(self, server: ControlServer, sock: socket.socket) -> None:
        self.sock = sock
        self.output = bytearray()
        self.pending: set[int] = set()
        self.waits: set[int] = set()
        self.wants_events = False
        self._server = server
        self._input = b""
        self._lost = 0
        self._is_stream = False
        self._takes_input = False
        self._input_ended = False
        self._closing = False  # once the output is gone
        self._closed = False

    def watch(self) -> None:
        """Tell the loop what this connection waits for."""
        loop = self._server.loop
        if loop is None or self._closed:
            return
        fd = self.sock.fileno()
        # A stream that takes no input is still read: that is how its end is noticed.
        if self._input_ended or self._closing or (self._takes_input and self._server.hub.room <= 0):
            loop.unwatch(fd)
        else:
            loop.watch(fd, self._readable)
        loop.watch_writable(fd, self.flush if self.output else None)

    def _readable(self) -> None:
        limit = READ_SIZE
        if self._takes_input:
            limit = min(limit, self._server.hub.room)
            if limit <= 0:
                return
        try:
            data = self.sock.recv(limit)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hung_up()
        elif self._takes_input:
            self._server.hub.type_in(data)
            self.watch()
        elif not self._is_stream:
            self._take_lines(data)

    def _hung_up(self) -> None:
        """The client closed its end, or only its writing half: then it gets what it still waits for."""
        self._input_ended = True
        if not (self._is_stream or self.pending or self.wants_events or self.output):
            self.close()
            return
        self._closing = not (self._is_stream or self.pending or self.wants_events)
        self.watch()
        self.close_if_gone()

    def close_if_gone(self) -> None:
        """Close when nobody has the other end any more."""
        poll = select.poll()
        poll.register(self.sock, 0)
        if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)):
            self.close()

    def _take_lines(self, data: bytes) -> None:
        self._input += data
        while not self._is_stream and not self._closed and b"\n" in self._input:
            line, _, self._input = self._input.partition(b"\n")
            if line.strip():
                self._take_line(line)
        if not self._is_stream and len(self._input) >= MAX_LINE:
            self.send(failure(None, f"a request has at most {MAX_LINE} bytes"))
            self.close()

    def _take_line(self, line: bytes) -> None:
        number = None
        try:
            if len(line) >= MAX_LINE:
                raise BadRequest(f"a request has at most {MAX_LINE} bytes")
            request = parse_request(line)
            if request.id in self.pending:
                # Without the id, which is the other request's.
                self.fail(None, f"id {request.id} is under way already", EXIT_USAGE)
                return
            number = request.id
            self._server.handle(self, request)
        except BadRequest as error:
            self.fail(number if number is not None else request_id(line), str(error), error.exit_code)
        except UserError as error:
            self.fail(number, str(error), error.code)

    def begin(self, number: int) -> None:
        """A request that is answered later."""
        if len(self.pending) >= MAX_PENDING:
            raise BadRequest(f"at most {MAX_PENDING} requests may be under way")
        self.pending.add(number)

    def answer(self, number: int, result: Message) -> None:
        self._done(number)
        self.send(response(number, result))

    def fail(self, number: int | None, message: str, exit_code: int) -> None:
        if number is not None:
            self._done(number)
        self.send(failure(number, message, exit_code))

    def _done(self, number: int) -> None:
        self.pending.discard(number)
        self.waits.discard(number)
        if self._input_ended and not self.pending and not self.wants_events:
            self._closing = True

    def send(self, line: bytes) -> None:
        """Queue a line. A client that lets them pile up is closed."""
        if self._closed or self._is_stream:
            return
        self.output += line
        self.flush()
        if len(self.output) > MAX_RESPONSE:
            self.close()

    def become_stream(self, number: int, kept: bytes, *, takes_input: bool, follow: bool) -> None:
        """From its answer on, this connection carries the console's bytes: `kept`, then what follows."""
        rest, self._input = self._input, b""
        self.answer(number, {"stream": True})
        if self._closed:
            return
        self._is_stream = True
        self._takes_input = takes_input
        self._closing = not follow
        if follow:
            self._server.hub.attach(self._on_output)
        if takes_input and rest:
            self._server.hub.type_in(rest[: self._server.hub.room])
        self._on_output(kept)

    def _on_output(self, data: bytes) -> None:
        self.output += data
        excess = len(self.output) - STREAM_LIMIT
        if excess > 0:
            del self.output[:excess]
            self._lost += excess
        self.flush()

    def flush(self) -> None:
        """Hand the socket what it takes."""
        if self._closed:
            return
        if self._lost:
            self.output[:0] = f"\r\n[vmrun: {self._lost} bytes of console output lost]\r\n".encode()
            self._lost = 0
        try:
            while self.output:
                sent = self.sock.send(self.output[: 1 << 16], socket.MSG_NOSIGNAL)
                del self.output[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._closing and not self.output:
            self.close()
        else:
            self.watch()

    def last_requests(self) -> None:
        """What has come already, and is read no more by any loop."""
        if not self._is_stream and not self._closed:
            self._readable()

    def ended(self, ending: Message) -> None:
        """The machine has ended: answer all that is under way."""
        self._server.hub.detach(self._on_output)
        for number in sorted(self.pending):
            if number in self.waits:
                self.answer(number, ending)
            else:
                self.fail(number, f"machine {self._server.name} has ended: {ending['reason']}", EXIT_VMM)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._server.hub.detach(self._on_output)
        if self._server.loop is not None:
            self._server.loop.unwatch(self.sock.fileno())
        self._server.forget(self)
        self.sock.close()
        self.output.clear()


Handler = Callable[[ControlServer, Controlled, Client, Request], None]

COMMANDS: dict[str, Handler] = {
    "status": ControlServer._status,
    "inspect": ControlServer._inspect,
    "stop": ControlServer._stop,
    "reset": ControlServer._reset,
    "pause": ControlServer._pause,
    "resume": ControlServer._resume,
    "resize": ControlServer._resize,
    "snapshot": ControlServer._snapshot,
    "wait": ControlServer._wait,
    "events": ControlServer._events,
    "console": ControlServer._console,
    "log": ControlServer._log,
}
