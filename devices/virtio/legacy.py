"""The legacy register layout of virtio over PCI: an I/O BAR, as before virtio 1.0. VMM process.

virtio 1.2, sections 4.1.4.10 (layout), 2.7.2 (where a ring's parts lie) and 4.1.5.1.3.1 (queue set-up). What
vmd has for all its devices, and what SeaBIOS, iPXE and old kernels use. Everything is little-endian.

Notifications become kicks (a kick per queue, all at one port) only while a driver of this layout has the
device running: drivers of the modern layout map this BAR too and never use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.board import Board, Kick
from devices.pci.bars import BarKind
from devices.virtio.fields import Fields, read_fields, write_fields

if TYPE_CHECKING:
    from devices.virtio.transport import VirtioPciFunction

# Room for the longest device configuration that legacy drivers know (virtio-blk's 60 bytes), from +24.
BAR_SIZE = 128

QUEUE_NOTIFY = 16
NOTIFY_SIZE = 2
ISR_STATUS = 19

FIELDS: Fields = (
    (0, 4, "device_features"),
    (4, 4, "driver_features"),
    (8, 4, "queue_address"),
    (12, 2, "queue_size"),
    (14, 2, "queue_select"),
    (QUEUE_NOTIFY, NOTIFY_SIZE, "queue_notify"),
    (18, 1, "device_status"),
    (ISR_STATUS, 1, "isr_status"),
)
# There only while MSI-X is enabled: the device configuration moves.
MSIX_FIELDS: Fields = (*FIELDS, (20, 2, "config_msix_vector"), (22, 2, "queue_msix_vector"))
DEVICE_OFFSET = 20
MSIX_DEVICE_OFFSET = 24

QUEUE_ALIGN = 4096


def ring_addresses(page: int, size: int) -> tuple[int, int, int]:
    """Where the descriptors, available and used ring of `size` entries are that begin in `page`."""
    descriptors = page * QUEUE_ALIGN
    available = descriptors + 16 * size
    used = available + 2 * (3 + size)
    return descriptors, available, (used + QUEUE_ALIGN - 1) & ~(QUEUE_ALIGN - 1)


class LegacyRegisters:
    """The BusDevice of the I/O BAR, which it adds to `function`."""

    def __init__(self, function: VirtioPciFunction, board: Board, bar: int) -> None:
        self._function = function
        self._board = board
        self._address: int | None = None
        self._running = False
        self._kicks: list[Kick] = []
        function.add_bar(bar, BarKind.IO, BAR_SIZE, self, self._mapped, self._unmapped)

    @property
    def running(self) -> bool:
        """Whether a driver of this layout has the device running."""
        return self._running

    def start_kicks(self) -> None:
        """The driver has the device running: catch its notifications. Function's lock held."""
        self._running = True
        self._update_kicks()

    def stop_kicks(self) -> None:
        """The device is being reset. Function's lock held."""
        self._running = False
        self._update_kicks()

    def _mapped(self, address: int) -> None:
        with self._function.lock:
            self._address = address
            self._update_kicks()

    def _unmapped(self) -> None:
        with self._function.lock:
            self._address = None
            self._update_kicks()

    def _update_kicks(self) -> None:
        while self._kicks:
            self._kicks.pop().close()
        if not self._running or self._address is None:
            return
        port = self._address + QUEUE_NOTIFY
        for queue in self._function.queues:
            if queue.enabled:
                fd = self._function.kick_fd(queue.index)
                self._kicks.append(self._board.kick_on_write("pio", port, NOTIFY_SIZE, fd, queue.index))

    def read(self, offset: int, size: int) -> int:
        function = self._function
        if offset == ISR_STATUS and size == 1:
            # Takes no lock that a reset holds: interrupt handlers of functions that share a line read this.
            return function.read_isr()
        with function.lock:
            fields, device = self._layout()
            if offset >= device:
                return function.read_device_config(offset - device, size)
            value = read_fields(fields, self._get, offset, size)
            if offset + size > device:
                value |= function.read_device_config(0, offset + size - device) << 8 * (device - offset)
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        function = self._function
        if offset == QUEUE_NOTIFY and size == NOTIFY_SIZE:
            function.notify_legacy(value)
            return
        with function.lock:
            fields, device = self._layout()
            if offset >= device:
                function.write_device_config(offset - device, size, value)
                return
            write_fields(fields, self._get, self._set, offset, size, value)
            if offset + size > device:
                rest = value >> 8 * (device - offset)
                function.write_device_config(0, offset + size - device, rest)

    def _layout(self) -> tuple[Fields, int]:
        if self._function.msix_enabled:
            return MSIX_FIELDS, MSIX_DEVICE_OFFSET
        return FIELDS, DEVICE_OFFSET

    def _get(self, name: str) -> int:
        function = self._function
        match name:
            case "device_features":
                return function.legacy_features
            case "driver_features":
                return function.driver_features & 0xFFFFFFFF
            case "queue_select":
                return function.queue_select
            case "queue_notify":
                return 0
            case "device_status":
                return function.status
            case "isr_status":
                return function.read_isr()
            case "config_msix_vector":
                return function.config_vector
        queue = function.selected_queue()
        if queue is None:
            return 0xFFFF if name == "queue_msix_vector" else 0
        match name:
            case "queue_address":
                return queue.descriptors // QUEUE_ALIGN & 0xFFFFFFFF
            case "queue_size":
                return queue.size
            case _:
                return queue.vector

    def _set(self, name: str, value: int) -> None:
        """Write one field; read-only ones fall through."""
        function = self._function
        match name:
            case "driver_features":
                function.set_driver_features(0, value)
            case "queue_select":
                function.queue_select = value
            case "queue_notify":
                function.notify_legacy(value)
            case "device_status":
                function.set_status(value, legacy=True)
            case "config_msix_vector":
                function.set_config_vector(value)
        queue = function.selected_queue()
        if queue is None:
            return
        match name:
            case "queue_address":
                function.set_queue_page(queue, value)
            case "queue_msix_vector":
                function.set_queue_vector(queue, value)
