"""The ports of a virtio console: what the driver was told of each, what it said, and where its streams stand.
VMM process; virtio 1.2, section 5.3.6.2 (multiport device operation).

A port keeps no bytes: what the guest wrote stays in its ring until the host takes it, and what the host has
for the guest stays with the host until there are buffers. Nor does it keep a list of messages, which a driver
that never reads its control queue could make grow: what is still to be told follows from the state.

A stream in a port lasts from an opening to the next closing on either side. When the guest closes, its host
is told after the last chain that was in the ring by then.
"""

import threading
from collections.abc import Callable
from struct import Struct
from typing import Any, Protocol

from devices.state import SavedState
from devices.virtio.queue import MAX_SIZE, SplitQueue

# Control events, section 5.3.6.2.
VIRTIO_CONSOLE_DEVICE_READY = 0
VIRTIO_CONSOLE_PORT_ADD = 1
VIRTIO_CONSOLE_PORT_REMOVE = 2
VIRTIO_CONSOLE_PORT_READY = 3
VIRTIO_CONSOLE_CONSOLE_PORT = 4
VIRTIO_CONSOLE_RESIZE = 5
VIRTIO_CONSOLE_PORT_OPEN = 6
VIRTIO_CONSOLE_PORT_NAME = 7

CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3  # queues, section 5.3.2; those of port 0 are before them

CONTROL = Struct("<IHH")  # struct virtio_console_control: id, event, value
RESIZE = Struct("<HH")  # struct virtio_console_resize: cols, rows

MAX_CHAIN = 1 << 32  # bytes, see devices.virtio.queue
MAX_NAME = 64  # bytes; the specification has no bound

# What a driver is told of a port once it said that it is ready, in this order.
_FACTS = (VIRTIO_CONSOLE_CONSOLE_PORT, VIRTIO_CONSOLE_RESIZE, VIRTIO_CONSOLE_PORT_NAME)

_EVENTS = sum(1 << event for event in (VIRTIO_CONSOLE_PORT_ADD, *_FACTS))
_FLAGS = ("added", "ready", "guest_open", "told_open")


class PortHost(Protocol):
    """What a port is connected to: a byte stream of the host. Called with the device's lock held; must not
    block.
    """

    def send(self, buffers: list[memoryview]) -> int:
        """Take bytes from the guest. Returns how many were taken; when not all, `Port.room` is called later.

        The guest may change the bytes meanwhile. Main loop.
        """

    def receive_into(self, buffers: list[memoryview]) -> int:
        """Fill `buffers` from their start with bytes for the guest. Returns how many; when none,
        `Port.input_ready` is called when there are some. Main loop.
        """

    def guest_closed(self) -> None:
        """The stream is over: all that the guest wrote was taken, and nothing more will be. The port counts
        as closed on the host's side, until `Port.host_opened`. Any thread.
        """


class Port:
    """One port. What a host calls is any thread's; the rest is the device's, with its lock held.

    `number` is the id in control messages. A console port is one that the driver makes a terminal of.
    """

    __slots__ = (
        "_lock",
        "_wake",
        "added",
        "bounced",
        "console",
        "ending",
        "guest_open",
        "host",
        "host_open",
        "name",
        "number",
        "offset",
        "pending",
        "ready",
        "size",
        "told_open",
    )

    def __init__(
        self, number: int, name: str, lock: threading.RLock, wake: Callable[[int], None], *, console: bool
    ) -> None:
        """`wake` has one of the device's queues served."""
        self.number = number
        self.name = name
        self.console = console
        self.size: tuple[int, int] | None = None  # columns and rows of a console
        self.host: PortHost | None = None
        self.host_open = False
        self._lock = lock
        self._wake = wake
        self._forget()

    def _forget(self) -> None:
        """There is no driver, and it was told nothing."""
        self.pending = 0  # events to tell, as bits; PORT_OPEN follows from what is below
        self.added = False  # PORT_ADD was sent
        self.ready = False  # and the driver has answered it
        self.guest_open = False
        self.told_open = False  # the last PORT_OPEN that was sent
        self.bounced = False  # the host has closed and opened since that
        self.offset = 0  # bytes that the host took of the first chain in the transmit queue
        self.ending: int | None = None  # chains in that queue up to where the guest closed

    @property
    def receive_queue(self) -> int:
        return 2 * self.number + 2 if self.number else 0

    @property
    def transmit_queue(self) -> int:
        return self.receive_queue + 1

    # What a host calls.

    def host_opened(self) -> None:
        """Somebody is there at the host's end: a new stream begins in both directions."""
        with self._lock:
            if self.host_open:
                return
            self.host_open = True
            self.bounced = self.told_open
            self._changed()

    def host_closed(self) -> None:
        """Nobody is there any more. What the guest has written and nobody took waits for the next."""
        with self._lock:
            self.host_open = self.bounced = False
            self._changed()

    def room(self) -> None:
        """The host can take bytes again."""
        self._wake(self.transmit_queue)

    def input_ready(self) -> None:
        """The host has bytes for the guest."""
        self._wake(self.receive_queue)

    def _changed(self) -> None:
        self._wake(CONTROL_RECEIVE)
        self._wake(self.transmit_queue)
        self._wake(self.receive_queue)

    # What the driver does.

    def driver_ready(self) -> None:
        """PORT_READY: the driver wants to know all about this port; it may say so again."""
        self.ready = True
        if self.console:
            self.pending |= 1 << VIRTIO_CONSOLE_CONSOLE_PORT
            self.resized()
        if self.name:
            self.pending |= 1 << VIRTIO_CONSOLE_PORT_NAME
        if self.host_open:
            self.told_open = False

    def resized(self) -> None:
        if self.ready and self.size is not None:
            self.pending |= 1 << VIRTIO_CONSOLE_RESIZE

    def guest_opens(self) -> None:
        if self.guest_open:
            return
        self.guest_open = True
        self._changed()

    def guest_closes(self, queue: SplitQueue | None) -> None:
        """PORT_OPEN 0. What is in the transmit `queue` by now belongs to the stream that ends."""
        if not self.guest_open:
            return
        self.guest_open = False
        if self.console:
            return  # a terminal's line stays when nobody has it open
        self.ending = 0 if queue is None else queue.waiting()
        self._end_when_sent()

    def chain_sent(self) -> None:
        """The host has all of the first chain in the transmit queue."""
        self.offset = 0
        if self.ending is not None:
            self.ending -= 1
            self._end_when_sent()

    def _end_when_sent(self) -> None:
        if self.ending is not None and self.ending <= 0:
            self.ending = None
            self._end()

    def _end(self) -> None:
        if self.host_open:
            self.host_closed()
            if self.host is not None:
                self.host.guest_closed()

    def driver_gone(self) -> None:
        """The driver and its rings are gone: so is a stream that it had begun."""
        begun = (self.guest_open or self.ending is not None or self.offset > 0) and not self.console
        self._forget()
        if begun:
            self._end()

    def removed(self) -> None:
        self._forget()
        self._end()

    # What the driver is told.

    def next_message(self) -> tuple[int, bytes] | None:
        """The event that the driver is to be told next, and the message."""
        if self.pending & 1 << VIRTIO_CONSOLE_PORT_ADD:
            return self._message(VIRTIO_CONSOLE_PORT_ADD, 1)
        if not self.ready:
            return None
        for event in _FACTS:
            if self.pending & 1 << event:
                return self._message(event, 1, self._detail(event))
        if self.bounced or self.told_open != self.host_open:
            return self._message(VIRTIO_CONSOLE_PORT_OPEN, int(not self.told_open))
        return None

    def _message(self, event: int, value: int, detail: bytes = b"") -> tuple[int, bytes]:
        return event, CONTROL.pack(self.number, event, value) + detail

    def _detail(self, event: int) -> bytes:
        if event == VIRTIO_CONSOLE_PORT_NAME:
            return self.name.encode()
        if event == VIRTIO_CONSOLE_RESIZE and self.size is not None:
            # Columns first, as the specification has it; older kernels of Linux take them for the rows.
            return RESIZE.pack(*self.size)
        return b""

    def message_sent(self, event: int) -> None:
        self.pending &= ~(1 << event)
        if event == VIRTIO_CONSOLE_PORT_ADD:
            self.added = True
        elif event == VIRTIO_CONSOLE_PORT_OPEN:
            self.told_open = not self.told_open
            self.bounced = False

    # Snapshots.

    def save(self) -> dict[str, Any]:
        state: dict[str, Any] = {flag: getattr(self, flag) for flag in _FLAGS}
        state.update(number=self.number, name=self.name.encode().hex())
        return {**state, "pending": self.pending, "offset": self.offset, "ending": self.ending}

    def load(self, saved: SavedState) -> None:
        """Go on where a saved port of this number and name was. The host's end is as it is here: a driver
        that was told of an open one hears that it closed, and that it opened if it has. ValueError for what
        makes no sense.
        """
        for flag in _FLAGS:
            setattr(self, flag, saved.flag(flag))
        self.pending = saved.bits("pending", _EVENTS)
        self.offset = saved.number("offset", MAX_CHAIN)
        self.ending = None if saved.absent("ending") else saved.number("ending", MAX_SIZE, 1)
        self.bounced = self.told_open and self.host_open
