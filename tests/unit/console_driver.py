"""For the console tests: a machine with a virtio console on a real event loop, and its driver."""

import json
import os
import select
import socket
import struct
from typing import Any

from devices.memory import GuestMemory, MemoryRegion
from devices.virtio.console import VIRTIO_CONSOLE_F_MULTIPORT, VirtioConsole
from devices.virtio.console_ports import Port
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, ActiveDriver
from tests.unit.worker_driver import QUEUE_SPACE, Guest
from vmrun.machine.loop import EventLoop
from vmrun.machine.ports import PortLink

MAX_PORTS = 3
QUEUES = 2 * (MAX_PORTS + 1)
READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = range(8)
MULTIPORT = VIRTIO_F_INDIRECT_DESC | VIRTIO_CONSOLE_F_MULTIPORT

Message = tuple[int, int, int, bytes]


class Events:
    """The transport of a device with `count` queues."""

    def __init__(self, count: int) -> None:
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.reasons: list[str] = []
        self.config_changes = 0

    def kick_fd(self, queue: int) -> int:
        return self.kicks[queue]

    def call_fd(self, queue: int) -> int:
        return self.calls[queue]

    def config_changed(self) -> None:
        self.config_changes += 1

    def needs_reset(self, reason: str) -> None:
        self.reasons.append(reason)

    def close(self) -> None:
        for fd in (*self.kicks, *self.calls):
            os.close(fd)


class Machine:
    """A guest with a console device, ports `names`, and a link to each. The driver starts when told to."""

    def __init__(self, names: tuple[str, ...] = ("one",), *, console: bool = False, **options: Any) -> None:
        ram = os.memfd_create("test-ram")
        os.ftruncate(ram, QUEUES * QUEUE_SPACE)
        self.memory = GuestMemory([MemoryRegion(0, QUEUES * QUEUE_SPACE, ram, 0)])
        self.queues = [Guest(self.memory, number) for number in range(QUEUES)]
        self.loop = EventLoop()
        self.names, self.console, self.options = names, console, options
        self.features = MULTIPORT
        self.told: list[Message] = []
        self.build()

    def build(self) -> None:
        self.events = Events(QUEUES)
        self.device = VirtioConsole(self.memory, self.loop, max_ports=MAX_PORTS, **self.options)  # type: ignore[arg-type]
        self.links: dict[str, PortLink] = {}
        if self.console:
            self.add("hvc", console=True)
        for name in self.names:
            self.add(name)

    def add(self, name: str, *, console: bool = False) -> Port:
        port = self.device.add_port(name, console=console)
        self.links[name] = PortLink(self.loop, port)
        return port

    # The driver.

    def start(self, features: int = MULTIPORT) -> None:
        for queue in self.queues:
            queue.restart()
        self.features = features
        self.told.clear()
        self.device.activate(features, [queue.config for queue in self.queues], self.events)

    def start_all(self, *numbers: int) -> None:
        """What Linux does until programs have opened the ports `numbers`."""
        self.start()
        for _ in range(16):
            self.queues[2].offer([], [128])
        self.say(0xFFFFFFFF, READY, 1)
        for number in numbers:
            self.say(number, PORT_READY, 1)
            self.say(number, OPEN, 1)
        self.hear()

    def kick(self, queue: int) -> None:
        os.eventfd_write(self.events.kicks[queue], 1)
        self.settle()

    def control(self, raw: bytes) -> None:
        self.queues[3].offer([raw], [])
        self.kick(3)
        self.queues[3].collect()

    def say(self, number: int, event: int, value: int) -> None:
        self.control(struct.pack("<IHH", number, event, value))

    def hear(self) -> list[Message]:
        """The messages since the last call; their buffers are given again."""
        messages: list[Message] = []
        while answers := self.queues[2].collect():
            for _, length, data in answers:
                messages.append((*struct.unpack_from("<IHH", data), data[8:length]))
                self.queues[2].offer([], [128])
            self.kick(2)
        self.told += messages
        return messages

    def write(self, number: int, *pieces: bytes) -> None:
        """One chain of output."""
        queue = 2 * number + 3 if number else 1
        self.queues[queue].offer(list(pieces), [])
        self.kick(queue)

    def written(self, number: int) -> int:
        """How many chains of output came back since the last call."""
        return len(self.queues[2 * number + 3 if number else 1].collect())

    def give(self, number: int, *sizes: int) -> None:
        """A buffer for input."""
        queue = 2 * number + 2 if number else 0
        self.queues[queue].offer([], list(sizes))
        self.kick(queue)

    def read(self, number: int) -> bytes:
        """Input since the last call."""
        pieces = self.queues[2 * number + 2 if number else 0].collect()
        assert all(length for _, length, _ in pieces)
        return b"".join(data[:length] for _, length, data in pieces)

    # The host.

    def connect(self, name: str = "one", buffer: int = 0) -> socket.socket:
        """The client's end of a new connection to the port."""
        ours, theirs = socket.socketpair()
        if buffer:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.links[name].connect(ours)
        theirs.setblocking(False)
        self.settle()
        return theirs

    def turn(self) -> bool:
        """One turn of the main loop. Whether there is more to do."""
        self.loop._stopping = False
        self.loop.call_soon(self.loop.stop)
        self.loop.run()
        os.eventfd_read(self.loop._wake_fd)  # `stop` signalled it
        return bool(self.loop._soon) or bool(select.select([self.loop._epoll], [], [], 0)[0])

    def settle(self) -> None:
        for _ in range(10000):
            if not self.turn():
                return
        raise AssertionError("the main loop is never done")

    def restore(self, clients: tuple[str, ...] = ()) -> None:
        """Save the device, and let one just built go on; the connections of `clients` go with it."""
        self.device.pause()
        kept = {name: link._connection for name, link in self.links.items()}
        moved = {name: sock.dup() for name in clients if (sock := kept[name]) is not None}
        state = json.loads(json.dumps(self.device.save()))
        running = self.device._events is not None
        before = self.device, self.events, self.loop
        for link in self.links.values():
            link._connection = None  # the process that had it is gone, without a word to anybody
        self.loop = EventLoop()
        self.build()
        configs = tuple(queue.config for queue in self.queues)
        self.device.load(state, ActiveDriver(self.features, configs, self.events) if running else None)
        for name, sock in moved.items():
            self.links[name].connect(sock)
        self.device.unpause()
        for old in (*before, *(sock for sock in kept.values() if sock is not None)):
            old.close()
        self.settle()

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        self.device.close()
        self.loop.close()
        self.events.close()
        self.queues[0].close()


def take(client: socket.socket, limit: int = 1 << 24) -> bytes:
    """What there is to read, at most `limit` bytes."""
    data = b""
    while len(data) < limit:
        try:
            piece = client.recv(limit - len(data))
        except BlockingIOError:
            break
        if not piece:
            break
        data += piece
    return data


def at_end(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
