"""virtio over PCI: what driver and device share, whichever register layout is used. VMM process.

virtio 1.2, section 2.1 (status), 2.2 (features), 3.1 (initialization), 4.1.2 (ids) and 4.1.5 (PCI-specific
operation). The layouts, `devices.virtio.modern` and `devices.virtio.legacy`, translate register accesses
into calls of `VirtioPciFunction`. A transitional device has both; which of them a driver uses is known only
when it activates the device.

Locks. `lock`, the function's RLock, covers the state machine and every call into the device. A reset holds it
until the device's rings are quiet, which may take milliseconds and wait for a worker process. `_signal_lock`
is a leaf below it: ISR, the INTx pin, the status byte. What others than the driver call at any moment takes
the leaf only, or no lock at all: the INTx callback on the main loop's thread, reads of ISR, and all of
QueueEvents, which a device may call from its own threads. So neither the main loop nor a thread of the device
ever waits for `lock`, and a reset that waits for either of them cannot deadlock. Nothing but eventfd writes
and the board's line is called with the leaf held.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

from devices.board import Board
from devices.errors import GuestError
from devices.pci.bars import BarKind
from devices.pci.function import PciFunction
from devices.pci.msix import MsiX
from devices.state import SavedState
from devices.virtio.device import (
    DEVICE_NEEDS_RESET,
    DRIVER_OK,
    FEATURES_OK,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_BLOCK,
    VIRTIO_ID_CONSOLE,
    VIRTIO_ID_ENTROPY,
    VIRTIO_ID_FS,
    VIRTIO_ID_NET,
    VIRTIO_ID_SCSI,
    ActiveDriver,
    QueueConfig,
    VirtioDevice,
)
from devices.virtio.legacy import LegacyRegisters, ring_addresses
from devices.virtio.modern import ModernRegisters

VIRTIO_VENDOR = 0x1AF4
MODERN_DEVICE_BASE = 0x1040  # plus the device type
MODERN_REVISION = 1
MODERN_SUBSYSTEM_BASE = 0x40  # at least this, so that no legacy driver takes the device (4.1.2.1)

# Types that legacy drivers know, and the ids they know them by (4.1.2.1). Legacy drivers read the type from
# the subsystem id.
TRANSITIONAL_DEVICES = {
    VIRTIO_ID_NET: 0x1000,
    VIRTIO_ID_BLOCK: 0x1001,
    VIRTIO_ID_CONSOLE: 0x1003,
    VIRTIO_ID_SCSI: 0x1004,
    VIRTIO_ID_ENTROPY: 0x1005,
}
TRANSITIONAL_REVISION = 0

# Class codes as other virtio implementations give them; guests bind by id and only show these.
CLASS_CODES = {
    VIRTIO_ID_NET: 0x020000,  # Ethernet controller
    VIRTIO_ID_BLOCK: 0x010000,  # SCSI storage controller
    VIRTIO_ID_CONSOLE: 0x078000,  # other communication controller
    VIRTIO_ID_ENTROPY: 0x00FF00,  # unclassified
    VIRTIO_ID_SCSI: 0x010000,
    VIRTIO_ID_FS: 0x018000,  # other mass storage controller
}
CLASS_UNASSIGNED = 0xFF0000

# Legacy drivers look at BAR 0; 2 to 5 leave room for a wider modern BAR.
LEGACY_BAR = 0
MSIX_BAR = 1
MODERN_BAR = 4

ISR_QUEUE = 1
ISR_CONFIG = 2
NO_VECTOR = 0xFFFF

MAX_ADDRESS = (1 << 64) - 1
FEATURE_WORDS = 4  # drivers may select more than the 64 bits that exist; these words are kept to be refused


# What a driver of the legacy layout can see and accept (2.2.3).
LEGACY_FEATURES = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """What a function says that it is. `class_code` has 24 bits."""

    vendor_id: int
    device_id: int
    class_code: int
    revision: int
    subsystem_vendor_id: int
    subsystem_id: int


def virtio_identity(device_type: int) -> PciIdentity:
    """The ids of a virtio device: transitional ones where legacy drivers know the type."""
    class_code = CLASS_CODES.get(device_type, CLASS_UNASSIGNED)
    transitional = TRANSITIONAL_DEVICES.get(device_type)
    if transitional is not None:
        return PciIdentity(
            VIRTIO_VENDOR, transitional, class_code, TRANSITIONAL_REVISION, VIRTIO_VENDOR, device_type
        )
    return PciIdentity(
        VIRTIO_VENDOR,
        MODERN_DEVICE_BASE + device_type,
        class_code,
        MODERN_REVISION,
        VIRTIO_VENDOR,
        MODERN_SUBSYSTEM_BASE + device_type,
    )


@dataclass(slots=True)
class TransportQueue:
    """One queue as the driver set it up so far. Addresses are guest-physical and unchecked."""

    index: int
    max_size: int
    size: int
    descriptors: int = 0
    available: int = 0
    used: int = 0
    enabled: bool = False
    vector: int = NO_VECTOR


class VirtioPciFunction(PciFunction):
    """A virtio device as a PCI function, and its `QueueEvents`. Owns the device and the eventfds.

    `name` is for the log. One MSI-X vector for each queue and one for configuration changes. With an
    `identity` of its own the device is one that only drivers of the legacy layout know, as it was before
    virtio 1.0: no modern BAR, and no MSI-X.
    """

    def __init__(
        self, device: VirtioDevice, board: Board, *, name: str = "", identity: PciIdentity | None = None
    ) -> None:
        modern = identity is None
        if identity is None:
            identity = virtio_identity(device.device_id)
        super().__init__(
            vendor_id=identity.vendor_id,
            device_id=identity.device_id,
            class_code=identity.class_code,
            revision=identity.revision,
            subsystem_vendor_id=identity.subsystem_vendor_id,
            subsystem_id=identity.subsystem_id,
            interrupt_pin=1,
        )
        self.device = device
        self.name = name or f"virtio device {device.device_id}"
        self.queues = [TransportQueue(index, size, size) for index, size in enumerate(device.queue_sizes)]
        self.features = device.features | VIRTIO_F_VERSION_1 if modern else device.features
        # Our devices never care how a request is cut into buffers; legacy drivers want to be told (6.3).
        self.legacy_features = device.features & LEGACY_FEATURES
        if self.queues:
            self.legacy_features |= VIRTIO_F_ANY_LAYOUT
        self.driver_features = 0
        self.negotiated = 0  # what the device was activated with
        self.status = 0
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self.config_vector = NO_VECTOR
        self.config_generation = 0
        self.isr = 0
        self.active = False  # the device serves the queues

        self._board = board
        self._signal_lock = threading.Lock()
        self._reported = False
        self._closed = False
        self._paused = False
        self._config_unsaid = False  # a configuration interrupt that came while paused
        self._kick_fds = [_eventfd() for _ in self.queues]
        self._intx_fd = _eventfd()
        self.msix: MsiX | None = None
        if modern:
            self.msix = MsiX(
                self.config,
                self.lock,
                MSIX_BAR,
                [board.msi_vector() for _ in range(len(self.queues) + 1)],
                self._msix_switched,
            )
            self.add_bar(MSIX_BAR, BarKind.MEMORY_32, self.msix.bar_size, self.msix)
            ModernRegisters(self, board, MODERN_BAR)
        self._legacy: LegacyRegisters | None = None
        if not modern or device.device_id in TRANSITIONAL_DEVICES:
            self._legacy = LegacyRegisters(self, board, LEGACY_BAR)
        board.watch(self._intx_fd, self._intx_signalled)

    # What the register layouts call, with `lock` held unless said otherwise.

    def selected_queue(self) -> TransportQueue | None:
        """The queue that the driver selected, None when it does not exist."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    @property
    def msix_enabled(self) -> bool:
        return self.msix is not None and self.msix.enabled

    def set_status(self, value: int, *, legacy: bool = False) -> None:
        """The driver writes device status. 0 resets; otherwise bits are only ever added (2.1.1).

        `legacy`: through the legacy layout, whose drivers know no FEATURES_OK.
        """
        if value == 0:
            self.reset()
            return
        added = value & 0xFF & ~DEVICE_NEEDS_RESET & ~self.status
        if added & FEATURES_OK and not self._features_acceptable():
            added &= ~FEATURES_OK
        with self._signal_lock:
            self.status |= added
        if added & DRIVER_OK and not self.active:
            self._activate(legacy=legacy)

    def _features_acceptable(self) -> bool:
        return not self.driver_features & ~self.features and bool(self.driver_features & VIRTIO_F_VERSION_1)

    def _activate(self, *, legacy: bool) -> None:
        features = self.driver_features
        if not self.status & FEATURES_OK:
            if not legacy:
                self.needs_reset("the driver set DRIVER_OK without agreeing on features")
                return
            features &= self.legacy_features
        try:
            self.device.activate(features, self._enabled_queues(), self)
        except GuestError as error:
            self.needs_reset(str(error))
            return
        self.negotiated = features
        self.active = True
        if legacy and self._legacy is not None:
            self._legacy.start_kicks()

    def _enabled_queues(self) -> list[QueueConfig]:
        return [
            QueueConfig(queue.index, queue.size, queue.descriptors, queue.available, queue.used)
            for queue in self.queues
            if queue.enabled
        ]

    def reset(self) -> None:
        """Device reset (2.4). When it returns the rings are quiet and all is as before the driver came."""
        self.active = False
        if self._legacy is not None:
            self._legacy.stop_kicks()
        self.device.reset()
        self.driver_features = self.negotiated = 0
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self.config_vector = NO_VECTOR
        self.queues = [TransportQueue(queue.index, queue.max_size, queue.max_size) for queue in self.queues]
        with self._signal_lock:
            # Only now: the device may have signalled until its reset returned, and that was for the old
            # driver.
            self.status = 0
            self.isr = 0
            self._config_unsaid = False
            for fd in (self._intx_fd, *self._kick_fds):
                _drain(fd)
            self._update_pin()

    def set_driver_features(self, word: int, value: int) -> None:
        """Accept 32 feature bits from bit 32 * `word`; fixed once FEATURES_OK is set or the device runs."""
        if word < FEATURE_WORDS and not self.status & FEATURES_OK and not self.active:
            shift = 32 * word
            self.driver_features = self.driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def set_queue_size(self, queue: TransportQueue, size: int) -> None:
        """Ignored when `size` is no power of two, larger than the device offers, or the queue is live."""
        if not queue.enabled and 0 < size <= queue.max_size and size & (size - 1) == 0:
            queue.size = size

    def enable_queue(self, queue: TransportQueue) -> None:
        """Fix the queue's addresses and size until reset. Too late once the device runs: it looks once."""
        if not self.status & DRIVER_OK and not self.active:
            queue.enabled = True

    def set_queue_page(self, queue: TransportQueue, page: int) -> None:
        """A legacy driver puts the whole ring at 4096 * `page`, or takes it away with 0 (4.1.5.1.3.1).

        To take away a ring that is being served resets the device, as it does in QEMU: the driver goes.
        Another place for it is ignored.
        """
        if self.active:
            if queue.enabled and page == 0:
                self.reset()
            return
        queue.descriptors, queue.available, queue.used = (
            ring_addresses(page, queue.size) if page else (0, 0, 0)
        )
        queue.enabled = page != 0

    def valid_vector(self, vector: int) -> int:
        """`vector` when the device has it, else NO_VECTOR: what the driver reads back (4.1.5.1.2)."""
        return vector if self.msix is not None and vector < len(self.msix.vectors) else NO_VECTOR

    def set_config_vector(self, vector: int) -> None:
        self.config_vector = self.valid_vector(vector)

    def set_queue_vector(self, queue: TransportQueue, vector: int) -> None:
        queue.vector = self.valid_vector(vector)
        if self.active and queue.enabled and self.msix_enabled:
            self.device.set_call(queue.index, self.call_fd(queue.index))

    def read_isr(self) -> int:
        """What happened since the last read; clears it and lowers the pin (4.1.4.5). Needs no lock."""
        with self._signal_lock:
            isr, self.isr = self.isr, 0
            self._update_pin()
            return isr

    def notify(self, queue: int) -> None:
        """The driver notified `queue` by a write that no kick caught. Needs no lock."""
        if queue < len(self._kick_fds):
            _signal(self._kick_fds[queue])

    def notify_legacy(self, queue: int) -> None:
        """The same through the legacy layout, which has no kicks while the device does not run. Takes `lock`.

        Before virtio 1.0 drivers used their device while they probed, and set DRIVER_OK afterwards: Linux
        did until 3.18 and waited for the partition table. So the first notification starts the device.
        """
        if not self.active:
            with self.lock:
                self._start_by_notification(queue)
        self.notify(queue)

    def _start_by_notification(self, queue: int) -> None:
        over = self.active or self.status & (DEVICE_NEEDS_RESET | FEATURES_OK)
        if not over and queue < len(self.queues) and self.queues[queue].enabled:
            self._activate(legacy=True)

    def read_device_config(self, offset: int, size: int) -> int:
        try:
            data = self.device.read_config(offset, size)
        except GuestError as error:
            self.needs_reset(str(error))
            return 0
        return int.from_bytes(data[:size], "little")

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        try:
            self.device.write_config(offset, (value & (1 << (8 * size)) - 1).to_bytes(size, "little"))
        except GuestError as error:
            self.needs_reset(str(error))

    # QueueEvents: called by the device from any thread, with or without `lock`.

    def kick_fd(self, queue: int) -> int:
        return self._kick_fds[queue]

    def call_fd(self, queue: int) -> int:
        msix = self.msix
        if msix is None or not msix.enabled:
            return self._intx_fd
        vector = self.queues[queue].vector
        return -1 if vector == NO_VECTOR else msix.fd(vector)

    def config_changed(self) -> None:
        with self._signal_lock:
            self.config_generation = (self.config_generation + 1) & 0xFF
            self._raise_config()

    def needs_reset(self, reason: str) -> None:
        with self._signal_lock:
            self.status |= DEVICE_NEEDS_RESET
            self._raise_config()
            import logging  # here: it is rare, and every start would pay

            # A guest may break its device again and again: it does not get to fill the log.
            level = logging.DEBUG if self._reported else logging.WARNING
            self._reported = True
        logging.getLogger(__name__).log(level, "%s needs a reset: %s", self.name, reason)

    # Interrupts.

    def _raise_config(self) -> None:
        """Notify of a configuration change (4.1.5.4), never before DRIVER_OK. Leaf lock held."""
        if self._closed or not self.status & DRIVER_OK:
            return
        if self._paused:
            # The interrupt controllers are perhaps being saved: what is low in ISR must be low there too.
            self._config_unsaid = True
            return
        self.isr |= ISR_CONFIG
        if self.msix is None or not self.msix.enabled:
            self._update_pin()
        elif self.config_vector != NO_VECTOR:
            _signal(self.msix.fd(self.config_vector))

    def _intx_signalled(self) -> None:
        """The device used buffers and knows of no MSI-X vector. On the main loop's thread; leaf lock only."""
        with self._signal_lock:
            if self._closed or not _drain(self._intx_fd):
                return  # closed or reset since the main loop saw the signal
            if self.msix is None or not self.msix.enabled:
                self.isr |= ISR_QUEUE
                self._update_pin()
                return
            # The device signalled before it learnt of the switch to MSI-X. It may have been any queue.
            for queue in self.queues:
                if queue.enabled and queue.vector != NO_VECTOR:
                    _signal(self.msix.fd(queue.vector))

    def _update_pin(self) -> None:
        self.intx.set_asserted(bool(self.isr) and not self.msix_enabled)

    def _msix_switched(self) -> None:
        with self._signal_lock:
            self._update_pin()
        if self.active:
            for queue in self.queues:
                if queue.enabled:
                    self.device.set_call(queue.index, self.call_fd(queue.index))

    # Pause and state.

    @property
    def description(self) -> str:
        return self.name

    def pause(self) -> None:
        with self.lock:
            self.device.pause()
            # What the device signalled before it held still, and the main loop has not seen yet.
            self._intx_signalled()
            with self._signal_lock:
                self._paused = True
            if self.msix is not None:
                self.msix.pause()

    def unpause(self) -> None:
        with self.lock:
            if self.msix is not None:
                self.msix.unpause()
            with self._signal_lock:
                self._paused = False
                unsaid, self._config_unsaid = self._config_unsaid, False
                if unsaid:
                    self._raise_config()
            self.device.unpause()

    def save(self) -> dict[str, Any]:
        """Kicks are not saved: `unpause` has every ring looked at."""
        with self.lock:
            state = super().save()
            state["device_features"] = self.features
            state["msix"] = self.msix.save() if self.msix is not None else None
            with self._signal_lock:
                state["virtio"] = {
                    "status": self.status,
                    "isr": self.isr,
                    "config_generation": self.config_generation,
                    "config_unsaid": self._config_unsaid,
                    "driver_features": self.driver_features,
                    "negotiated": self.negotiated,
                    "device_feature_select": self.device_feature_select,
                    "driver_feature_select": self.driver_feature_select,
                    "queue_select": self.queue_select,
                    "config_vector": self.config_vector,
                    "active": self.active,
                    "legacy": self._legacy is not None and self._legacy.running,
                    "queues": [_save_queue(queue) for queue in self.queues],
                }
            state["state"] = self.device.save()
            return state

    def load(self, state: dict[str, Any]) -> None:
        """All is checked before the device hears of it, and the device is told last."""
        super().load(state)
        saved = SavedState(self.name, state)
        registers = saved.record("virtio")
        device_state = saved.mapping("state")
        saved.same("device_features", self.features, "set of features")
        status = registers.number("status", 0xFF)
        isr = registers.bits("isr", ISR_QUEUE | ISR_CONFIG)
        generation = registers.number("config_generation", 0xFF)
        unsaid = registers.flag("config_unsaid")
        driver_features = registers.number("driver_features", (1 << 32 * FEATURE_WORDS) - 1)
        negotiated = registers.bits("negotiated", self.features | self.legacy_features)
        selects = [
            registers.number(name, 0xFFFFFFFF) for name in ("device_feature_select", "driver_feature_select")
        ]
        queue_select = registers.number("queue_select", 0xFFFF)
        config_vector = self._load_vector(registers, "config_vector")
        active, legacy = registers.flag("active"), registers.flag("legacy")
        if legacy and (self._legacy is None or not active):
            raise registers.wrong("legacy", "is true without a driver of that layout")
        queues = [
            self._load_queue(queue, self.queues[index])
            for index, queue in enumerate(registers.records("queues", len(self.queues)))
        ]
        with self.lock:
            if self.msix is not None:
                self.msix.load(saved.mapping("msix"), self.name)
            elif not saved.absent("msix"):
                raise saved.wrong("msix", "is there, and this function has none")
            self.queues = queues
            self.driver_features, self.negotiated = driver_features, negotiated
            self.device_feature_select, self.driver_feature_select = selects
            self.queue_select, self.config_vector = queue_select, config_vector
            driver = ActiveDriver(negotiated, tuple(self._enabled_queues()), self) if active else None
            try:
                self.device.load(device_state, driver)
            except GuestError as error:
                raise ValueError(f"the saved state of {self.name}: {error}") from None
            self.active = active
            with self._signal_lock:
                self.status, self.isr, self.config_generation = status, isr, generation
                self._paused, self._config_unsaid = True, unsaid
                self._update_pin()
            if legacy and self._legacy is not None:
                self._legacy.start_kicks()

    def _load_vector(self, saved: SavedState, key: str) -> int:
        vector = saved.number(key, NO_VECTOR)
        if self.valid_vector(vector) != vector:
            raise saved.wrong(key, "is a vector that this function has not")
        return vector

    def _load_queue(self, saved: SavedState, queue: TransportQueue) -> TransportQueue:
        saved.same("max_size", queue.max_size, "size")
        size = saved.number("size", queue.max_size, 1)
        if size & (size - 1):
            raise saved.wrong("size", "is no power of two")
        return TransportQueue(
            queue.index,
            queue.max_size,
            size,
            saved.number("descriptors", MAX_ADDRESS),
            saved.number("available", MAX_ADDRESS),
            saved.number("used", MAX_ADDRESS),
            saved.flag("enabled"),
            self._load_vector(saved, "vector"),
        )

    def close(self) -> None:
        """Unmap, close the device, then everything it was lent. The vCPUs have stopped."""
        super().close()
        with self.lock:
            if self._closed:
                return
            self.active = False
            self.device.close()
            self._board.unwatch(self._intx_fd)
            with self._signal_lock:
                # A callback of the main loop may still be on its way: it must not read a number that is
                # another's fd.
                self._closed = True
                for fd in (self._intx_fd, *self._kick_fds):
                    os.close(fd)
                self._kick_fds = []
                self.intx.set_asserted(False)
            if self.msix is not None:
                self.msix.close()


def _save_queue(queue: TransportQueue) -> dict[str, Any]:
    return {
        "max_size": queue.max_size,
        "size": queue.size,
        "descriptors": queue.descriptors,
        "available": queue.available,
        "used": queue.used,
        "enabled": queue.enabled,
        "vector": queue.vector,
    }


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def _signal(fd: int) -> None:
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:
        pass  # the counter is full: it is signalled as it is


def _drain(fd: int) -> bool:
    """Whether the eventfd was signalled; it no longer is."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True
