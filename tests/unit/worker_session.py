"""For the worker tests: a launched worker with the VMM's own front end before it, and a driver for each
of its queues.
"""

import os
import select
from collections.abc import Mapping

from devices.vhost.frontend import VhostUserDevice
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
from devices.worker.launcher import Worker, launch
from tests.unit.vhost_toy import ToyBoard, ToyEvents
from tests.unit.worker_driver import SIZE, Guest


class Session:
    """An active device in a worker of `kind`, with one Guest for each queue. A context manager."""

    def __init__(
        self, kind: str, device_id: int, queues: int, arguments: Mapping[str, str], fds: Mapping[str, int]
    ) -> None:
        self.failures: list[str] = []
        self.guests = [Guest()]
        self.guests += [Guest(self.guests[0].memory, number) for number in range(1, queues)]
        self.events = ToyEvents(queues)
        self.board = ToyBoard()
        self.worker: Worker = launch(kind, f"{kind}0", arguments, fds)
        try:
            self.device = VhostUserDevice(
                self.worker.channel,
                name=self.worker.name,
                device_id=device_id,
                queue_sizes=(SIZE,) * queues,
                memory=self.guests[0].memory,
                board=self.board,
                on_failure=self.failures.append,
            )
        except BaseException:
            self.worker.wait(5)
            print(self.worker.describe_exit())
            self.worker.stop()
            raise
        self.activate()

    def activate(self, features: int = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC) -> None:
        # The device's own features are all accepted.
        self.device.activate(
            self.device.features & (features | 0xFFFFFF), [guest.config for guest in self.guests], self.events
        )

    def offer(self, queue: int, readable: list[bytes], writable: list[int]) -> None:
        self.guests[queue].offer(readable, writable)
        os.eventfd_write(self.events.kicks[queue], 1)

    def collect(self, queue: int, count: int = 1, seconds: float = 30.0) -> list[tuple[int, int, bytes]]:
        """Wait until `count` chains were used."""
        answers: list[tuple[int, int, bytes]] = []
        while len(answers) < count:
            poll = select.poll()
            poll.register(self.events.calls[queue], select.POLLIN)
            poll.register(self.worker.pidfd, select.POLLIN)
            ready = [fd for fd, _ in poll.poll(seconds * 1000)]
            if self.events.calls[queue] not in ready:
                self.worker.poll()
                raise AssertionError(f"queue {queue}: no interrupt; {self.worker.describe_exit()}")
            os.eventfd_read(self.events.calls[queue])
            answers += self.guests[queue].collect()
        return answers

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()
        self.worker.stop()
        self.events.close()
        self.guests[0].close()
