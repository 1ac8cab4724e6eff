"""`vmrun console` and `vmrun log`: what a machine prints, and typing to it. User side, its own process."""

import os
import socket
import sys
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Argument, Option
from vmrun.errors import EXIT_VMM, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from vmrun.host.console import Console
    from vmrun.machine.loop import EventLoop

REPLAY = 8 << 10  # bytes of earlier output that `console` begins with
CHUNK = 1 << 16

Name = Annotated[str, Argument(metavar="NAME", help="The machine.")]


def console(name: Name) -> int:
    """Attach to a machine's console. Ctrl-A x leaves it, and the machine runs on; Ctrl-A h is help."""
    from vmrun.control.client import MachineClient
    from vmrun.host.console import Console
    from vmrun.machine.loop import EventLoop

    with MachineClient(name) as client, client.console(replay=REPLAY) as sock:
        left = False
        loop = EventLoop()
        try:
            with Console(leave="leave the machine, which runs on") as terminal:
                left = _Attached(sock, terminal, loop).run()
        finally:
            loop.close()
    if sys.stderr.isatty():
        print(f"\nvmrun: {'left' if left else 'end of'} the console of {name}", file=sys.stderr)
    return 0


class _Attached:
    """Bytes between `terminal` and `sock`, in both directions; neither end makes the other wait."""

    def __init__(self, sock: socket.socket, terminal: "Console", loop: "EventLoop") -> None:
        self._sock = sock
        self._terminal = terminal
        self._loop = loop
        self._typed = b""
        self._left = False
        sock.setblocking(False)

    def run(self) -> bool:
        """Until the machine ends its side, or the user leaves: then the result is true."""
        self._loop.watch(self._sock.fileno(), self._printed)
        self._loop.watch(self._terminal.wake_fd, self._output_ready)
        self._listen()
        self._loop.run()
        return self._left

    def _listen(self) -> None:
        terminal = self._terminal
        if terminal.input_fd < 0:
            return
        if terminal.input_ended or self._typed:
            self._loop.unwatch(terminal.input_fd)
        else:
            self._loop.watch(terminal.input_fd, self._key)
        self._loop.watch_writable(self._sock.fileno(), self._send if self._typed else None)

    def _key(self) -> None:
        self._typed += self._terminal.on_input_ready()
        if self._terminal.escape_requested:
            self._left = True
            self._loop.stop()
            return
        self._send()

    def _send(self) -> None:
        try:
            self._typed = self._typed[self._sock.send(self._typed) if self._typed else 0 :]
        except BlockingIOError:
            pass
        except OSError:
            self._typed = b""  # the machine has ended; what it printed last may still be to come
        self._listen()

    def _printed(self) -> None:
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._loop.stop()
            return
        self._terminal.write(data)

    def _output_ready(self) -> None:
        self._terminal.on_wake()
        self._watch_output()

    def _watch_output(self) -> None:
        terminal = self._terminal
        if terminal.output_fd >= 0:
            self._loop.watch_writable(terminal.output_fd, self._drain if terminal.pending_output else None)

    def _drain(self) -> None:
        self._terminal.on_output_ready()
        self._watch_output()


def log(
    name: Name,
    follow: Annotated[bool, Option("--follow", "-f", help="Go on with what it prints next.")] = False,
    vmm: Annotated[
        bool, Option("--vmm", help="What vmrun itself said, of a machine started with -d.")
    ] = False,
) -> int:
    """Print what a machine has printed.

    The last one or two MiB are kept; those of a machine started with -d also for a while after its end.
    """
    from vmrun.control import runtime
    from vmrun.control.client import MachineClient

    sys.stdout.flush()
    if name not in runtime.running():
        directory = runtime.ended(name)
        if directory is None:
            raise runtime.not_found(name, list(runtime.running()))
        _print_files(directory, vmm)
        return 0
    if vmm:
        _print_files(runtime.find(name), vmm)
        return 0
    with MachineClient(name) as client, client.log(follow=follow) as sock:
        while True:
            try:
                data = sock.recv(CHUNK)
            except ConnectionResetError:
                raise UserError(f"machine {name} died", EXIT_VMM) from None
            if not data:
                return 0
            _write(data)


def _print_files(directory: "Path", vmm: bool) -> None:
    from vmrun.control import runtime
    from vmrun.host.console_log import read_log

    _write(read_log(directory / (runtime.VMM_LOG if vmm else runtime.CONSOLE_LOG)))


def _write(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]
