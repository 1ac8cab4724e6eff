"""Joins a console to the serial port on the main loop: bytes in both directions, neither end ever waits. VMM
process.
"""

from collections.abc import Callable
from typing import Protocol

from devices.platform.uart import Uart
from vmrun.machine.loop import EventLoop


class ConsoleLike(Protocol):
    """What `vmrun.host.console.Console` offers a machine."""

    input_fd: int
    output_fd: int
    wake_fd: int
    input_ended: bool
    escape_requested: bool

    @property
    def pending_output(self) -> bool: ...
    def write(self, data: bytes) -> None: ...
    def on_wake(self) -> None: ...
    def on_output_ready(self) -> None: ...
    def on_input_ready(self, limit: int = 4096) -> bytes: ...


class SerialLink:
    """Feeds `console`'s input to the UART and lets the loop drain its output. `on_escape`: the user wants to
    leave.
    """

    def __init__(self, loop: EventLoop, console: ConsoleLike, on_escape: Callable[[], None]) -> None:
        self._loop = loop
        self._console = console
        self._on_escape = on_escape
        self._uart: Uart | None = None
        self._typed = b""  # read from the console, not yet taken by the UART

    def start(self, uart: Uart) -> None:
        self._uart = uart
        console = self._console
        if console.wake_fd >= 0:
            self._loop.watch(console.wake_fd, self._output_queued)
        self._listen()

    def room_in_uart(self) -> None:
        """The UART has room again. Any thread."""
        self._loop.call_soon(self._feed)

    def _listen(self) -> None:
        if self._console.input_fd >= 0 and not self._console.input_ended:
            self._loop.watch(self._console.input_fd, self._input_ready)

    def _input_ready(self) -> None:
        self._typed += self._console.on_input_ready()
        if self._console.escape_requested:
            self._on_escape()
            return
        if self._console.input_ended:
            self._loop.unwatch(self._console.input_fd)
        self._feed()

    def _feed(self) -> None:
        if self._uart is None or not self._typed:
            return
        self._typed = self._typed[self._uart.feed(self._typed) :]
        if self._typed:
            # The guest is behind: leave the rest of the input where it is until the UART says that it has
            # room.
            self._loop.unwatch(self._console.input_fd)
        else:
            self._listen()

    def _output_queued(self) -> None:
        self._console.on_wake()
        self._watch_output()

    def _output_ready(self) -> None:
        self._console.on_output_ready()
        self._watch_output()

    def _watch_output(self) -> None:
        console = self._console
        if console.output_fd >= 0:
            self._loop.watch_writable(
                console.output_fd, self._output_ready if console.pending_output else None
            )
