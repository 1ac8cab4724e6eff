"""One thread for each running queue: it waits for kicks, lets the device work, and signals the guest. Worker
process.

`RingServer` is what the vhost-user back end drives: it starts and stops rings and hands the rest to the
device. Requests of a ring never hold up the control channel or another ring. `stop_queue` returns when its
ring is quiet, which is vmd's pause with acknowledgement: nothing in guest memory is touched after it, until
the queue is started again.
"""

from __future__ import annotations

import _thread
import os
import select

from devices.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from devices.virtio.queue import SplitQueue

    class RingDevice(Protocol):
        """A device without threads. Each of its queues is processed by one thread, and by one only."""

        features: int  # offered, without those of the transport
        queue_count: int

        def set_features(self, features: int) -> None:
            """What the driver accepted. No queue runs."""

        def read_config(self, offset: int, size: int) -> bytes: ...

        def write_config(self, offset: int, data: bytes) -> None: ...

        def configure(self, offset: int, data: bytes) -> None:
            """The VMM changes what the device is. No queue runs. Raises GuestError for what cannot be."""

        def source_fd(self, index: int) -> int:
            """A descriptor whose input queue `index` serves, or -1."""

        def process(self, index: int, queue: SplitQueue) -> int:
            """Serve what is there: a bounded amount. Returns DRAINED, MORE or NEED_SOURCE.

            Raises GuestError for a broken ring. OSError is the host's failure of the whole device.
            """

        def release(self, index: int, queue: SplitQueue) -> None:
            """The queue was stopped: give back what was taken from it and not used."""

        def close(self) -> None: ...


DRAINED = 0  # nothing to do until the next kick
MORE = 1  # stopped for fairness only: call again
NEED_SOURCE = 2  # buffers are there: call again when the source has input, or at the next kick

# What every ring here can do, beside what the device says (virtio 1.2, chapter 6).
VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_VERSION_1 = 1 << 32

POLL_INTERVAL = 0.001  # seconds between two looks at a ring whose front end gives no kick descriptor


class Ring:
    """A queue with its thread. The descriptors stay the caller's; they must stay open until `stop`
    returned.
    """

    __slots__ = (
        "_call_fd",
        "_call_lock",
        "_device",
        "_err_fd",
        "_fail",
        "_finished",
        "_index",
        "_kick_fd",
        "_queue",
        "_report",
        "_stop_fd",
    )

    def __init__(
        self,
        device: RingDevice,
        index: int,
        queue: SplitQueue,
        kick_fd: int,
        call_fd: int,
        err_fd: int,
        report: Callable[[str], None],
        fail: Callable[[str], None],
    ) -> None:
        """`report` gets a line when the guest broke the ring, `fail` one when the worker cannot go on; -1
        is no fd.
        """
        self._device = device
        self._index = index
        self._queue = queue
        self._kick_fd = kick_fd
        self._call_fd = call_fd
        self._call_lock = _thread.allocate_lock()
        self._err_fd = err_fd
        self._report = report
        self._fail = fail
        self._finished = _thread.allocate_lock()
        self._finished.acquire()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError as error:
            os.close(self._stop_fd)
            raise OSError(0, f"no thread for queue {index}: {error}") from None

    def set_call(self, fd: int) -> None:
        """Signal `fd` from now on. When this returns nobody uses the old one any more, so it may be
        closed.
        """
        with self._call_lock:
            self._call_fd = fd

    def stop(self) -> int:
        """Wait until the ring is quiet. Returns the index of the next available entry it would have
        taken. Once only.
        """
        os.eventfd_write(self._stop_fd, 1)
        self._finished.acquire()
        os.close(self._stop_fd)
        return self._queue.next_avail

    def _run(self) -> None:
        try:
            try:
                self._serve()
            finally:
                self._device.release(self._index, self._queue)
        except GuestError as error:
            # From here on the ring is not touched; the guest resets the device or lives without it.
            self._report(f"queue {self._index}: {error}")
            self._signal(self._err_fd)
        except OSError as error:
            self._fail(f"queue {self._index}: {error.strerror or error}")
        except BaseException as error:
            self._fail(f"queue {self._index}: {type(error).__name__}: {error}")
        finally:
            self._finished.release()

    def _serve(self) -> None:
        device, index, queue = self._device, self._index, self._queue
        kick_fd, stop_fd, source_fd = self._kick_fd, self._stop_fd, device.source_fd(index)
        with select.epoll() as epoll:
            epoll.register(stop_fd, select.EPOLLIN)
            idle_timeout: float = POLL_INTERVAL
            if kick_fd >= 0:
                epoll.register(kick_fd, select.EPOLLIN)
                idle_timeout = -1
            watching = False
            # The first round needs no kick: what was made available before this ring was started counts too.
            while True:
                outcome = device.process(index, queue)
                # Once for a batch: the guest takes everything that was used with one interrupt.
                if queue.interrupt_wanted():
                    with self._call_lock:
                        self._signal(self._call_fd)
                if watching != (outcome == NEED_SOURCE):
                    # Level-triggered input that nobody takes would keep this thread spinning.
                    watching = not watching
                    if watching:
                        epoll.register(source_fd, select.EPOLLIN)
                    else:
                        epoll.unregister(source_fd)
                for fd, _ in epoll.poll(0 if outcome == MORE else idle_timeout):
                    if fd == stop_fd:
                        return
                    if fd == kick_fd:
                        # Drained before the ring is looked at: a kick that comes later is another round.
                        try:
                            os.read(kick_fd, 8)
                        except BlockingIOError:
                            pass

    @staticmethod
    def _signal(fd: int) -> None:
        if fd >= 0:
            try:
                os.write(fd, b"\1\0\0\0\0\0\0\0")
            except BlockingIOError:
                pass  # the counter is full: as signalled as can be


class RingServer:
    """The rings of one device, driven by the vhost-user back end, one call at a time."""

    __slots__ = ("_device", "_fail", "_report", "_rings", "features", "queue_count")

    def __init__(
        self, device: RingDevice, report: Callable[[str], None], fail: Callable[[str], None]
    ) -> None:
        """Owns `device`. `report` and `fail` as in `Ring`; they are called on the rings' threads."""
        self._device = device
        self._report = report
        self._fail = fail
        self._rings: dict[int, Ring] = {}
        self.features = device.features | VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC
        self.queue_count = device.queue_count

    def set_features(self, features: int) -> None:
        self._device.set_features(features)

    def read_config(self, offset: int, size: int) -> bytes:
        return self._device.read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        self._device.write_config(offset, data)

    def configure(self, offset: int, data: bytes) -> None:
        self._device.configure(offset, data)

    def start_queue(self, index: int, queue: SplitQueue, kick_fd: int, call_fd: int, err_fd: int) -> None:
        """Serve `queue` until it is stopped. The descriptors stay the caller's, -1 is none. Raises
        OSError.
        """
        if index in self._rings:
            raise ValueError(f"queue {index} runs already")
        self._rings[index] = Ring(
            self._device, index, queue, kick_fd, call_fd, err_fd, self._report, self._fail
        )

    def set_call(self, index: int, fd: int) -> None:
        """Signal `fd` (-1: nothing) when queue `index` has used buffers. Nothing uses the old one
        afterwards.
        """
        ring = self._rings.get(index)
        if ring is not None:
            ring.set_call(fd)

    def stop_queue(self, index: int) -> int:
        """Returns the next available index when the ring is quiet. Raises KeyError when it does not run."""
        return self._rings.pop(index).stop()

    def close(self) -> None:
        """Stop all rings after what they are at, then flush and close the device."""
        for index in list(self._rings):
            self.stop_queue(index)
        self._device.close()
