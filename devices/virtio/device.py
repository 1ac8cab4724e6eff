"""What every virtio device offers its transport, and the facts both sides share (virtio 1.2, chapters 2 and
5).

VMM process. A device here may do its work in this process (rng) or stand for one that lives in a worker
(`devices.vhost.frontend`): the transport cannot tell.

To be saved a device is paused. `load` puts a device just built into the state that `pause` leaves behind, so
that `unpause` is the one way from there to serving, whichever process the pause was in.
"""

from dataclasses import dataclass
from typing import Any, Protocol

# Device types, virtio 1.2 chapter 5.
VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_CONSOLE = 3
VIRTIO_ID_ENTROPY = 4
VIRTIO_ID_SCSI = 8
VIRTIO_ID_FS = 26

# Device-independent feature bits, virtio 1.2 chapter 6.
VIRTIO_F_NOTIFY_ON_EMPTY = 1 << 24
VIRTIO_F_ANY_LAYOUT = 1 << 27
VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32

# Device status bits, virtio 1.2 section 2.1.
ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
DEVICE_NEEDS_RESET = 64
FAILED = 128


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Where the driver put one split queue. Addresses are guest-physical and as hostile as the guest."""

    index: int
    size: int
    descriptors: int
    available: int
    used: int


class QueueEvents(Protocol):
    """What the transport lends an active device. Everything here is owned by the transport."""

    def kick_fd(self, queue: int) -> int:
        """The eventfd that is signalled when the guest notifies `queue`."""

    def call_fd(self, queue: int) -> int:
        """The eventfd to signal when `queue` has used buffers: an MSI-X vector's, or the INTx one; -1 for
        none.
        """

    def config_changed(self) -> None:
        """Tell the guest that the device configuration changed."""

    def needs_reset(self, reason: str) -> None:
        """Set DEVICE_NEEDS_RESET and tell the guest; the transport logs the reason once."""


@dataclass(frozen=True, slots=True)
class ActiveDriver:
    """What `VirtioDevice.activate` was given, kept for a device that is loaded."""

    features: int
    queues: tuple[QueueConfig, ...]
    events: QueueEvents


class VirtioDevice(Protocol):
    """A device behind a transport. The transport calls these with its lock held, one at a time, from vCPU
    threads; the four about pausing from any thread, while no vCPU is in the guest.
    """

    device_id: int
    queue_sizes: tuple[int, ...]  # largest size of each queue, powers of two
    features: int  # offered, without the transport's own

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of device configuration; zeroes past its end."""

    def write_config(self, offset: int, data: bytes) -> None: ...

    def activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        """DRIVER_OK was set: serve `queues` (those the driver enabled). Raises GuestError for rings that
        cannot be.
        """

    def set_call(self, queue: int, fd: int) -> None:
        """The driver moved `queue` to another interrupt while active: signal `fd` from now on (-1: none)."""

    def reset(self) -> None:
        """Stop serving and forget the driver. Returns when no ring is touched any more. Fine when not
        active.
        """

    def pause(self) -> None:
        """Hold still, active or not. Returns when no ring is touched any more and each request taken is
        answered, and remembers where each ring stands. May wait for a worker; twice is once.
        """

    def unpause(self) -> None:
        """Go on where `pause` or `load` left off, and look at each ring as if it were kicked. May wait for a
        worker; nothing when not paused.
        """

    def save(self) -> dict[str, Any]:
        """What `load` needs: JSON-able, of a paused device. Raises OSError or ProtocolError when a worker
        that failed while it was pausing has not said where its rings stand.
        """

    def load(self, state: dict[str, Any], driver: ActiveDriver | None) -> None:
        """Put this device, just built and of the same configuration, into the paused state that `state`
        describes; `driver` is the one that has it active, if any. Raises ValueError for a state that cannot
        be, and GuestError for rings that cannot; the device can only be closed then.
        """

    def close(self) -> None: ...
