"""vmmci: OpenBSD's VMM control interface, by which the host asks a guest to shut down, to reboot, or to set
its clock. VMM process.

It is vmd's own (`vmmci_io` in virtio.c); OpenBSD has the driver, and for Linux there is one out of tree. A
virtio 0.9 device without queues: a command in device configuration and the configuration interrupt, which
the driver answers by writing the same command back. How long that may take is for `vmrun.machine.shutdown`.

Device configuration, little-endian: command (4 bytes at 0), the host's time since 1970 in seconds (8 at 4)
and the microseconds of it (8 at 12). The time is taken when the byte at 4 is read; the rest belongs to it.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from devices.state import SavedState
from devices.virtio.device import ActiveDriver, QueueConfig, QueueEvents
from devices.virtio.transport import PciIdentity

VIRTIO_ID_VMMCI = 0xFFFF  # OpenBSD's private id
IDENTITY = PciIdentity(
    vendor_id=0x0B5D,  # OpenBSD
    device_id=0x0777,  # VMM control
    class_code=0x078000,  # other communication controller
    revision=0,
    subsystem_vendor_id=0x0B5D,
    subsystem_id=VIRTIO_ID_VMMCI,
)

VMMCI_F_TIMESYNC = 1 << 0
VMMCI_F_ACK = 1 << 1
VMMCI_F_SYNCRTC = 1 << 2

VMMCI_NONE = 0
VMMCI_SHUTDOWN = 1
VMMCI_REBOOT = 2
VMMCI_SYNCRTC = 3

COMMAND_SIZE = 4
TIME_OFFSET = 4


class Vmmci:
    """The device. Its callbacks are called on vCPU threads with the transport's lock held: hand the work on.

    `on_driver`: a driver came, or went. `on_acknowledged` gets SHUTDOWN or REBOOT, once for each command
    sent. `on_guest_shutdown`: the guest shuts down without being asked. `clock` gives the host's time in
    nanoseconds since 1970.
    """

    def __init__(
        self,
        on_driver: Callable[[], None],
        on_acknowledged: Callable[[int], None],
        on_guest_shutdown: Callable[[], None],
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.device_id = VIRTIO_ID_VMMCI
        self.queue_sizes: tuple[int, ...] = ()
        self.features = VMMCI_F_TIMESYNC | VMMCI_F_ACK | VMMCI_F_SYNCRTC
        self._on_driver = on_driver
        self._on_acknowledged = on_acknowledged
        self._on_guest_shutdown = on_guest_shutdown
        self._clock = clock
        self._lock = threading.Lock()  # below the transport's; above what config_changed takes
        self._events: QueueEvents | None = None
        self._accepted = 0
        self._command = VMMCI_NONE
        self._waiting = False  # for the acknowledgement of a shutdown or reboot
        self._time = bytes(16)

    @property
    def ready(self) -> bool:
        """Whether a driver is there. It may be gone the moment after: `send` says what was."""
        return self._events is not None

    @property
    def acknowledges(self) -> bool:
        """Whether the driver there promised to acknowledge commands."""
        return bool(self._accepted & VMMCI_F_ACK)

    @property
    def syncs_clock(self) -> bool:
        """Whether the driver there promised to obey SYNCRTC."""
        return bool(self._accepted & VMMCI_F_SYNCRTC)

    def send(self, command: int) -> bool:
        """Give the driver a command. False when there is no driver to take it. Any thread.

        The same command again changes nothing while it stands. SYNCRTC never takes the place of a shutdown
        or reboot; to a driver that did not agree to it it is not sent.
        """
        with self._lock:
            if self._events is None:
                return False
            ending = self._command in (VMMCI_SHUTDOWN, VMMCI_REBOOT)
            if command == VMMCI_SYNCRTC and (ending or not self.syncs_clock):
                return False
            if command != self._command:
                self._command = command
                self._waiting = command in (VMMCI_SHUTDOWN, VMMCI_REBOOT)
                self._events.config_changed()
            return True

    # What the transport calls.

    def read_config(self, offset: int, size: int) -> bytes:
        with self._lock:
            if offset <= TIME_OFFSET < offset + size:
                seconds, rest = divmod(self._clock(), 1_000_000_000)
                self._time = seconds.to_bytes(8, "little") + (rest // 1000).to_bytes(8, "little")
            picture = self._command.to_bytes(COMMAND_SIZE, "little") + self._time
        return picture[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Drivers write the command whole or byte by byte: its lowest byte says all."""
        if offset != 0:
            return
        command = int.from_bytes(data[:COMMAND_SIZE], "little")
        with self._lock:
            pending = self._command
            acknowledged = self._waiting and command == pending
            if acknowledged:
                self._waiting = False
            elif command == VMMCI_SYNCRTC == pending:
                self._command = VMMCI_NONE
        if acknowledged:
            self._on_acknowledged(command)
        elif command == VMMCI_SHUTDOWN and pending not in (VMMCI_SHUTDOWN, VMMCI_REBOOT):
            self._on_guest_shutdown()

    def activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        with self._lock:
            self._events = events
            self._accepted = features
        self._on_driver()

    def set_call(self, queue: int, fd: int) -> None:
        """There is no queue."""

    def reset(self) -> None:
        with self._lock:
            gone = self._events is not None
            self._events = None
            self._accepted = 0
            self._command = VMMCI_NONE
            self._waiting = False
        if gone:
            self._on_driver()

    def pause(self) -> None:
        """There is no ring. A command sent meanwhile is in the configuration that the driver reads later."""

    def unpause(self) -> None:
        """As `pause`."""

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"command": self._command, "waiting": self._waiting, "time": self._time.hex()}

    def load(self, state: dict[str, Any], driver: ActiveDriver | None) -> None:
        saved = SavedState("vmmci", state)
        command = saved.number("command", VMMCI_SYNCRTC)
        waiting = saved.flag("waiting")
        if waiting and command not in (VMMCI_SHUTDOWN, VMMCI_REBOOT):
            raise saved.wrong("waiting", "is true without a command that is acknowledged")
        if command and driver is None:
            raise saved.wrong("command", "is there without a driver")
        time_read = saved.exactly("time", len(self._time))
        with self._lock:
            self._command, self._waiting, self._time = command, waiting, time_read
            if driver is not None:
                self._events, self._accepted = driver.events, driver.features
        if driver is not None:
            self._on_driver()

    def close(self) -> None:
        with self._lock:
            self._events = None
            self._accepted = 0
