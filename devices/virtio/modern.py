"""The modern register layout of virtio over PCI: a memory BAR and the capabilities that say so. VMM process.

virtio 1.2, section 4.1.4. A page each: common configuration, ISR, device configuration, notifications.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.board import Board, Kick
from devices.pci.bars import BarKind
from devices.pci.config import CAP_VENDOR
from devices.virtio.fields import read_fields, write_fields

if TYPE_CHECKING:
    from devices.virtio.transport import VirtioPciFunction

VIRTIO_PCI_CAP_COMMON_CFG = 1
VIRTIO_PCI_CAP_NOTIFY_CFG = 2
VIRTIO_PCI_CAP_ISR_CFG = 3
VIRTIO_PCI_CAP_DEVICE_CFG = 4
VIRTIO_PCI_CAP_PCI_CFG = 5

COMMON_OFFSET = 0x0000
ISR_OFFSET = 0x1000
DEVICE_OFFSET = 0x2000
NOTIFY_OFFSET = 0x3000
PAGE = 0x1000
BAR_SIZE = 0x4000

NOTIFY_MULTIPLIER = 4
MAX_QUEUES = PAGE // NOTIFY_MULTIPLIER

# struct virtio_pci_common_cfg: offset and width of each field. The two after queue_device, for notification
# data and queue reset, belong to features that are not offered and read as zero.
COMMON_FIELDS = (
    (0, 4, "device_feature_select"),
    (4, 4, "device_feature"),
    (8, 4, "driver_feature_select"),
    (12, 4, "driver_feature"),
    (16, 2, "config_msix_vector"),
    (18, 2, "num_queues"),
    (20, 1, "device_status"),
    (21, 1, "config_generation"),
    (22, 2, "queue_select"),
    (24, 2, "queue_size"),
    (26, 2, "queue_msix_vector"),
    (28, 2, "queue_enable"),
    (30, 2, "queue_notify_off"),
    (32, 4, "queue_desc_lo"),
    (36, 4, "queue_desc_hi"),
    (40, 4, "queue_driver_lo"),
    (44, 4, "queue_driver_hi"),
    (48, 4, "queue_device_lo"),
    (52, 4, "queue_device_hi"),
)
COMMON_SIZE = 60

# struct virtio_pci_cfg_cap, offsets from the start of the capability.
CFG_BAR = 4
CFG_OFFSET = 8
CFG_LENGTH = 12
CFG_DATA = 16


class ModernRegisters:
    """The BusDevice of the memory BAR; adds the BAR and the five vendor capabilities to `function`."""

    def __init__(self, function: VirtioPciFunction, board: Board, bar: int) -> None:
        queues = len(function.queues)
        if queues > MAX_QUEUES:
            raise ValueError(f"the notification page has room for {MAX_QUEUES} queues, not {queues}")
        self._function = function
        self._board = board
        self._kicks: list[Kick] = []
        # Not prefetchable: reading ISR has an effect.
        function.add_bar(bar, BarKind.MEMORY_32, BAR_SIZE, self, self._mapped, self._unmapped)

        notify_size = max(queues, 1) * NOTIFY_MULTIPLIER
        self._add_capability(VIRTIO_PCI_CAP_COMMON_CFG, bar, COMMON_OFFSET, COMMON_SIZE)
        self._add_capability(
            VIRTIO_PCI_CAP_NOTIFY_CFG,
            bar,
            NOTIFY_OFFSET,
            notify_size,
            NOTIFY_MULTIPLIER.to_bytes(4, "little"),
        )
        self._add_capability(VIRTIO_PCI_CAP_ISR_CFG, bar, ISR_OFFSET, 1)
        self._add_capability(VIRTIO_PCI_CAP_DEVICE_CFG, bar, DEVICE_OFFSET, PAGE)
        self._window = self._add_capability(
            VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 0, bytes(4), b"\0\0\xff\0\0\0" + b"\xff" * 12
        )
        function.config.on_read(self._window + CFG_DATA, 4, self._window_read)
        function.config.on_write(self._window + CFG_DATA, 4, self._window_written)

    def _add_capability(
        self, cfg_type: int, bar: int, offset: int, length: int, tail: bytes = b"", writable: bytes = b""
    ) -> int:
        """Append a struct virtio_pci_cap; returns its offset in configuration space."""
        cap_len = 16 + len(tail)
        body = (
            bytes((cap_len, cfg_type, bar, 0, 0, 0))
            + offset.to_bytes(4, "little")
            + length.to_bytes(4, "little")
        )
        return self._function.config.add_capability(CAP_VENDOR, body + tail, writable)

    def _mapped(self, address: int) -> None:
        with self._function.lock:
            for queue in range(len(self._function.queues)):
                port = address + NOTIFY_OFFSET + queue * NOTIFY_MULTIPLIER
                self._kicks.append(self._board.kick_on_write("mmio", port, 0, self._function.kick_fd(queue)))

    def _unmapped(self) -> None:
        with self._function.lock:
            while self._kicks:
                self._kicks.pop().close()

    def _window_target(self) -> tuple[int, int, int] | None:
        """Where the PCI configuration access capability points: bar, offset, length. None for nonsense."""
        config = self._function.config
        bar = self._function.bars.get(config.get(self._window + CFG_BAR, 1))
        offset = config.get(self._window + CFG_OFFSET, 4)
        length = config.get(self._window + CFG_LENGTH, 4)
        if bar is None or length not in (1, 2, 4) or offset % length or offset + length > bar.size:
            return None
        return bar.index, offset, length

    def _window_read(self) -> None:
        target = self._window_target()
        if target is not None:
            bar, offset, length = target
            value = self._function.bars[bar].device.read(offset, length)
            self._function.config.put(self._window + CFG_DATA, length, value)

    def _window_written(self) -> None:
        target = self._window_target()
        if target is not None:
            bar, offset, length = target
            value = self._function.config.get(self._window + CFG_DATA, length)
            self._function.bars[bar].device.write(offset, length, value)

    def read(self, offset: int, size: int) -> int:
        function = self._function
        page, start = offset & ~(PAGE - 1), offset & (PAGE - 1)
        if page == ISR_OFFSET:
            # Takes no lock that a reset holds: interrupt handlers of functions that share a line read this.
            return function.read_isr() if start == 0 else 0
        with function.lock:
            if page == COMMON_OFFSET:
                return read_fields(COMMON_FIELDS, self._get, start, size)
            if page == DEVICE_OFFSET:
                return function.read_device_config(start, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        function = self._function
        page, start = offset & ~(PAGE - 1), offset & (PAGE - 1)
        if page == NOTIFY_OFFSET:
            function.notify(start // NOTIFY_MULTIPLIER)
            return
        with function.lock:
            if page == COMMON_OFFSET:
                write_fields(COMMON_FIELDS, self._get, self._set, start, size, value)
            elif page == DEVICE_OFFSET:
                function.write_device_config(start, size, value)

    def _get(self, name: str) -> int:
        function = self._function
        match name:
            case "device_feature_select":
                return function.device_feature_select
            case "device_feature":
                return _word(function.features, function.device_feature_select)
            case "driver_feature_select":
                return function.driver_feature_select
            case "driver_feature":
                return _word(function.driver_features, function.driver_feature_select)
            case "config_msix_vector":
                return function.config_vector
            case "num_queues":
                return len(function.queues)
            case "device_status":
                return function.status
            case "config_generation":
                return function.config_generation
            case "queue_select":
                return function.queue_select
        queue = function.selected_queue()
        if queue is None:
            return 0xFFFF if name == "queue_msix_vector" else 0
        match name:
            case "queue_size":
                return queue.size
            case "queue_msix_vector":
                return queue.vector
            case "queue_enable":
                return int(queue.enabled)
            case "queue_notify_off":
                return queue.index
            case "queue_desc_lo":
                return _word(queue.descriptors, 0)
            case "queue_desc_hi":
                return _word(queue.descriptors, 1)
            case "queue_driver_lo":
                return _word(queue.available, 0)
            case "queue_driver_hi":
                return _word(queue.available, 1)
            case "queue_device_lo":
                return _word(queue.used, 0)
            case _:
                return _word(queue.used, 1)

    def _set(self, name: str, value: int) -> None:
        """Write one field; read-only ones fall through. A write that makes no sense changes nothing."""
        function = self._function
        match name:
            case "device_feature_select":
                function.device_feature_select = value
            case "driver_feature_select":
                function.driver_feature_select = value
            case "driver_feature":
                function.set_driver_features(function.driver_feature_select, value)
            case "config_msix_vector":
                function.set_config_vector(value)
            case "device_status":
                function.set_status(value)
            case "queue_select":
                function.queue_select = value
        queue = function.selected_queue()
        if queue is None:
            return
        match name:
            case "queue_msix_vector":
                function.set_queue_vector(queue, value)
            case "queue_size":
                function.set_queue_size(queue, value)
            case "queue_enable" if value == 1:
                function.enable_queue(queue)
        if queue.enabled:
            return  # the device may be reading the rings: they stay where they are until a reset
        match name:
            case "queue_desc_lo":
                queue.descriptors = _with_word(queue.descriptors, 0, value)
            case "queue_desc_hi":
                queue.descriptors = _with_word(queue.descriptors, 1, value)
            case "queue_driver_lo":
                queue.available = _with_word(queue.available, 0, value)
            case "queue_driver_hi":
                queue.available = _with_word(queue.available, 1, value)
            case "queue_device_lo":
                queue.used = _with_word(queue.used, 0, value)
            case "queue_device_hi":
                queue.used = _with_word(queue.used, 1, value)


def _word(value: int, index: int) -> int:
    # A guest may select word 4294967295 of the features: shifting is cheap only to the right.
    return value >> 32 * index & 0xFFFFFFFF


def _with_word(value: int, index: int, word: int) -> int:
    shift = 32 * index
    return value & ~(0xFFFFFFFF << shift) | word << shift
