"""One guest's console for many: the terminal vmrun was started on, whoever attaches later, and a log that
keeps what nobody watches. VMM process.

To the machine it is a console like `vmrun.host.console.Console`. Output goes into a bounded buffer on the
vCPU's thread, and from there, on the main loop, into the log and to each listener; none of them can make
another wait. Input comes from any of them, in the order it arrives.
"""

import os
import select
import threading
from collections.abc import Callable
from types import TracebackType

from vmrun.host.console import Console
from vmrun.host.console_log import ConsoleLog

OUTPUT_LIMIT = 1 << 20  # bytes between vCPU and main loop
INPUT_LIMIT = 4096  # bytes typed by listeners, and not yet taken by the guest

Listener = Callable[[bytes], None]


class ConsoleHub:
    """A context manager. Borrows `foreground`, which must be open meanwhile, and `log`.

    Listeners are called on the main loop with all the guest prints, and must not wait. `on_room` is called
    when listeners may `type_in` again after `room` was 0.
    """

    def __init__(self, foreground: Console | None, log: ConsoleLog, *, limit: int = OUTPUT_LIMIT) -> None:
        self.log = log
        self.output_fd = foreground.output_fd if foreground is not None else -1
        self.input_ended = False
        self.escape_requested = False
        self.on_room: Callable[[], None] = lambda: None
        self._foreground = foreground
        self._listeners: list[Listener] = []
        self._limit = limit
        self._lock = threading.Lock()
        self._buffer = bytearray()  # written by vCPU threads, under the lock
        self._lost = 0  # likewise
        self._woken = False  # likewise
        self._typed = bytearray()  # main loop only, as is all that follows
        # The machine watches one descriptor for input: this epoll, readable when a source is.
        self._sources = select.epoll()
        self.input_fd = self._sources.fileno()
        self._typed_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sources.register(self._typed_fd, select.EPOLLIN)
        if foreground is not None and foreground.input_fd >= 0:
            self._sources.register(foreground.input_fd, select.EPOLLIN)

    def write(self, data: bytes) -> None:
        """Queue guest output. Any thread; never waits, never fails."""
        with self._lock:
            self._buffer += data
            excess = len(self._buffer) - self._limit
            if excess > 0:
                del self._buffer[:excess]
                self._lost += excess
            wake, self._woken = not self._woken, True
        if wake and self.wake_fd >= 0:
            os.eventfd_write(self.wake_fd, 1)

    @property
    def pending_output(self) -> bool:
        return self._foreground is not None and self._foreground.pending_output

    def on_wake(self) -> None:
        """`wake_fd` is readable: there is new output."""
        with self._lock:
            self._woken = False
            try:
                os.eventfd_read(self.wake_fd)
            except BlockingIOError:
                pass
        self.flush()

    def flush(self) -> None:
        """Hand on what the guest has printed."""
        with self._lock:
            data, self._buffer = bytes(self._buffer), bytearray()
            lost, self._lost = self._lost, 0
        if lost:
            data = f"\r\n[vmrun: {lost} bytes of console output lost]\r\n".encode() + data
        if data:
            self.log.append(data)
            for listener in tuple(self._listeners):
                listener(data)
            if self._foreground is not None:
                self._foreground.write(data)
        self.on_output_ready()

    def on_output_ready(self) -> None:
        if self._foreground is not None:
            self._foreground.on_output_ready()

    def on_input_ready(self, limit: int = INPUT_LIMIT) -> bytes:
        """What the guest is to get of what was typed: at most `limit` bytes, may be empty."""
        ready = {fd for fd, _ in self._sources.poll(0)}
        if self._typed_fd in ready:
            data = bytes(self._typed[:limit])
            del self._typed[:limit]
            if not self._typed:
                os.eventfd_read(self._typed_fd)
                self.on_room()
            return data
        if ready and self._foreground is not None:
            fd = self._foreground.input_fd
            data = self._foreground.on_input_ready(limit)
            self.escape_requested = self._foreground.escape_requested
            if self._foreground.input_ended:
                self._sources.unregister(fd)
            self._foreground.on_output_ready()  # help, perhaps
            return data
        return b""

    @property
    def room(self) -> int:
        """How many bytes `type_in` takes now."""
        return INPUT_LIMIT - len(self._typed)

    def type_in(self, data: bytes) -> None:
        """At most `room` bytes for the guest, from a listener."""
        if data and not self._typed:
            os.eventfd_write(self._typed_fd, 1)
        self._typed += data

    def attach(self, listener: Listener) -> None:
        """Let `listener` have all that is flushed from now on: what the log does not have yet."""
        self._listeners.append(listener)

    def detach(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    def close(self) -> None:
        """No thread may call `write` any more."""
        self.flush()
        self._sources.close()
        os.close(self._typed_fd)
        os.close(self.wake_fd)
        self.input_fd = self.output_fd = self.wake_fd = self._typed_fd = -1
        self.input_ended = True

    def __enter__(self) -> "ConsoleHub":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
