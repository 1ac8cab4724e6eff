"""What a `devices.vhost.backend.Backend` asks of its device. Only type checkers import it, not workers."""

from typing import Protocol

from devices.virtio.queue import SplitQueue


class BackendDevice(Protocol):
    """A device behind a Backend, which calls all of this from the thread that handles the channel.

    Queue numbers are below `queue_count`. Descriptors are the Backend's: -1 stands for none (no kick: poll
    the ring; no call: the driver polls), and none is to be used after the call that takes it back has
    returned.
    """

    @property
    def features(self) -> int:
        """The virtio features offered, VIRTIO_F_VERSION_1 and VIRTIO_F_INDIRECT_DESC among them."""

    @property
    def queue_count(self) -> int: ...

    def set_features(self, features: int) -> None:
        """What the driver accepted, a subset of `features`; 0 after a reset. No queue runs."""

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of device configuration; zeroes past its end."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote device configuration. Raises GuestError for what is not writable."""

    def configure(self, offset: int, data: bytes) -> None:
        """The VMM itself changes the configuration: a disk's capacity. No queue runs. Raises GuestError for
        what cannot be. The driver is told by the caller.
        """

    def start_queue(self, index: int, queue: SplitQueue, kick_fd: int, call_fd: int, err_fd: int) -> None:
        """Serve `queue` from now on. There may be buffers already: look at it before waiting for a kick.

        When the queue raises GuestError later, write to `err_fd` (an eventfd) and leave the ring alone until
        `stop_queue`. A GuestError raised from here is reported in the same way, and the queue counts as not
        started.
        """

    def set_call(self, index: int, call_fd: int) -> None:
        """Signal `call_fd` instead. The queue runs; the former descriptor may be closed once this returns."""

    def stop_queue(self, index: int) -> int:
        """Stop serving: finish what was popped, let go of every view of guest memory.

        Returns the index of the next entry of the available ring, modulo 65536.
        """
