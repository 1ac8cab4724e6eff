"""Serves the queues of a virtio device that lives in the VMM: on the main loop's thread. VMM process.

virtio 1.2, sections 2.7 (split queues) and 3.1 (initialization). For devices with little to do, whose work
never waits long: everything else of the VMM waits meanwhile. Others get a worker (`devices.vhost.frontend`).

`lock` keeps the queues: the main loop holds it while it serves one, and `reset`, which a vCPU calls, takes it
to make sure that none is being served. It is below the transport's lock, and the main loop never takes that.
"""

import os
import threading
from functools import partial

from devices.board import Board
from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, QueueConfig, QueueEvents
from devices.virtio.queue import SplitQueue


class InProcessDevice:
    """A `VirtioDevice` whose subclass says what to do with a queue: `serve`, and perhaps `started`,
    `stopped`, `read_config` and `write_config`.

    `configuration` is what the guest reads as device configuration; `memory` stays the machine's.
    """

    def __init__(
        self,
        memory: GuestMemory,
        board: Board,
        *,
        device_id: int,
        queue_sizes: tuple[int, ...],
        features: int = 0,
        configuration: bytes = b"",
    ) -> None:
        self.device_id = device_id
        self.queue_sizes = queue_sizes
        self.features = features | VIRTIO_F_INDIRECT_DESC
        self.configuration = configuration
        self.lock = threading.RLock()
        self._memory = memory
        self._board = board
        self._events: QueueEvents | None = None
        self._queues: dict[int, SplitQueue] = {}
        self._call_fds: dict[int, int] = {}
        self._watched: list[int] = []

    def serve(self, index: int, queue: SplitQueue) -> bool:
        """Pop and push some chains of queue `index`: a bounded number. True when there is more to do.

        Called on the main loop's thread with `lock` held, after a kick, and again soon after it said True.
        Raises GuestError when the ring or a request makes no sense: the device then needs a reset, and no
        queue is served until that. An OSError ends the machine.
        """
        raise NotImplementedError

    def started(self, features: int) -> None:
        """The driver is there and agreed on `features`. vCPU thread, `lock` held."""

    def stopped(self) -> None:
        """The queues are gone: forget the chains held, and the driver. vCPU or main thread, `lock` held."""

    def wake(self, index: int) -> None:
        """Have queue `index` served soon, as if it had been kicked; nothing when it does not run. Any
        thread.
        """
        with self.lock:
            if self._events is not None and index in self._queues:
                os.eventfd_write(self._events.kick_fd(index), 1)

    def config_changed(self) -> None:
        """Tell the driver that the device configuration changed, if there is one. Any thread."""
        with self.lock:
            if self._events is not None:
                self._events.config_changed()

    # What the transport calls.

    def read_config(self, offset: int, size: int) -> bytes:
        return self.configuration[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing is writable unless a subclass says so."""

    def activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        indirect = bool(features & VIRTIO_F_INDIRECT_DESC)
        with self.lock:
            try:
                for config in queues:
                    self._queues[config.index] = SplitQueue(
                        self._memory,
                        config.index,
                        config.size,
                        config.descriptors,
                        config.available,
                        config.used,
                        indirect=indirect,
                    )
                self.started(features)
            except GuestError:
                self._stop()
                raise
            self._events = events
            for index in self._queues:
                self._call_fds[index] = events.call_fd(index)
                fd = events.kick_fd(index)
                self._watched.append(fd)
                self._board.watch(fd, partial(self._kicked, index))
                # The driver may have added buffers before DRIVER_OK.
                os.eventfd_write(fd, 1)

    def set_call(self, queue: int, fd: int) -> None:
        with self.lock:
            self._call_fds[queue] = fd

    def reset(self) -> None:
        with self.lock:
            self._stop()

    def close(self) -> None:
        self.reset()

    def _stop(self) -> None:
        self._events = None
        while self._watched:
            self._board.unwatch(self._watched.pop())
        self.stopped()
        while self._queues:
            self._queues.popitem()[1].release()
        self._call_fds.clear()

    def _kicked(self, index: int) -> None:
        with self.lock:
            events, queue = self._events, self._queues.get(index)
            if events is None or queue is None:
                return  # reset since the main loop saw the kick
            kick_fd = events.kick_fd(index)
            try:
                os.eventfd_read(kick_fd)
            except BlockingIOError:
                return
            try:
                more = self.serve(index, queue)
            except GuestError as error:
                self._stop()
                events.needs_reset(str(error))
                return
            if queue.interrupt_wanted():
                self._interrupt(index)
            if more:
                # By way of the descriptor: other descriptors get their turn in between.
                os.eventfd_write(kick_fd, 1)

    def _interrupt(self, index: int) -> None:
        fd = self._call_fds.get(index, -1)
        if fd >= 0:
            try:
                os.eventfd_write(fd, 1)
            except BlockingIOError:
                pass  # the counter is full: it is signalled as it is
