"""Serves the queues of a virtio device that lives in the VMM: on the main loop's thread. VMM process.

virtio 1.2, sections 2.7 (split queues) and 3.1 (initialization). For devices with little to do, whose work
never waits long: everything else of the VMM waits meanwhile. Others get a worker (`devices.vhost.frontend`).

`lock` keeps the queues: the main loop holds it while it serves one, and `reset`, which a vCPU calls, takes it
to make sure that none is being served. It is below the transport's lock, and the main loop never takes that.
"""

import os
import threading
from functools import partial
from typing import Any

from devices.board import Board
from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.state import SavedState
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, ActiveDriver, QueueConfig, QueueEvents
from devices.virtio.queue import SplitQueue


class InProcessDevice:
    """A `VirtioDevice` whose subclass says what to do with a queue: `serve`, and perhaps `started`,
    `stopped`, `read_config` and `write_config`; `holding`, `save_own` and `load_own` when it has a state.

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
        self._paused = False

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

    def holding(self) -> None:
        """The device is being paused: answer the chains held, or give them back (`SplitQueue.unpop`), so that
        the positions of the queues say all. `serve` is not called until the device goes on. Any thread,
        `lock` held.
        """

    def save_own(self) -> dict[str, Any]:
        """The state of a paused device beside its queues, for `load_own`. `lock` held."""
        return {}

    def load_own(self, saved: SavedState) -> None:
        """Take what `save_own` said; `started` has been called if there is a driver. Raises ValueError for
        what it cannot have said. `lock` held.
        """

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
        with self.lock:
            self._start(ActiveDriver(features, tuple(queues), events), {})
            if not self._paused:
                self._watch()

    def _start(self, driver: ActiveDriver, positions: dict[int, tuple[int, int]]) -> None:
        """Build the queues; those in `positions` go on at (next_avail, next_used). All or nothing."""
        indirect = bool(driver.features & VIRTIO_F_INDIRECT_DESC)
        try:
            for config in driver.queues:
                next_avail, next_used = positions.get(config.index, (0, 0))
                self._queues[config.index] = SplitQueue(
                    self._memory,
                    config.index,
                    config.size,
                    config.descriptors,
                    config.available,
                    config.used,
                    next_avail=next_avail,
                    next_used=next_used,
                    indirect=indirect,
                )
            self.started(driver.features)
        except GuestError:
            self._stop()
            raise
        self._events = driver.events

    def _watch(self) -> None:
        """Serve the queues from now on."""
        events = self._events
        if events is None:
            return
        for index in self._queues:
            self._call_fds[index] = events.call_fd(index)
            fd = events.kick_fd(index)
            self._watched.append(fd)
            self._board.watch(fd, partial(self._kicked, index))
            # The driver may have added buffers before DRIVER_OK, or just before a pause.
            os.eventfd_write(fd, 1)

    def _unwatch(self) -> None:
        while self._watched:
            self._board.unwatch(self._watched.pop())

    def set_call(self, queue: int, fd: int) -> None:
        with self.lock:
            self._call_fds[queue] = fd

    def reset(self) -> None:
        with self.lock:
            self._stop()

    def pause(self) -> None:
        with self.lock:
            if not self._paused:
                self._paused = True
                self._unwatch()
                self.holding()

    def unpause(self) -> None:
        with self.lock:
            if self._paused:
                self._paused = False
                self._watch()

    def save(self) -> dict[str, Any]:
        with self.lock:
            queues = {
                str(index): {"next_avail": queue.next_avail, "next_used": queue.next_used}
                for index, queue in self._queues.items()
            }
            return {"queues": queues if self._events is not None else None, "own": self.save_own()}

    def load(self, state: dict[str, Any], driver: ActiveDriver | None) -> None:
        saved = SavedState(f"virtio device {self.device_id}", state)
        own = saved.record("own")
        with self.lock:
            self._paused = True
            # A driver whose queues are gone broke them: nothing is served before it resets the device.
            if driver is not None and not saved.absent("queues"):
                queues = saved.record("queues")
                positions = {}
                for config in driver.queues:
                    queue = queues.record(str(config.index))
                    positions[config.index] = (
                        queue.number("next_avail", 0xFFFF),
                        queue.number("next_used", 0xFFFF),
                    )
                self._start(driver, positions)
            self.load_own(own)

    def close(self) -> None:
        self.reset()

    def _stop(self) -> None:
        self._events = None
        self._unwatch()
        self.stopped()
        while self._queues:
            self._queues.popitem()[1].release()
        self._call_fds.clear()

    def _kicked(self, index: int) -> None:
        with self.lock:
            events, queue = self._events, self._queues.get(index)
            if events is None or queue is None or self._paused:
                return  # reset or paused since the main loop saw the kick
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
