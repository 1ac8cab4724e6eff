"""For the vhost-user tests: a device that echoes buffers backwards, the driver's side of a ring, a board."""

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from devices.board import Board, IrqLine, Kick, MsiVector
from devices.errors import GuestError
from devices.memory import GuestMemory, MemoryRegion
from devices.vhost.backend import Backend
from devices.vhost.channel import Channel
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, QueueConfig
from devices.virtio.queue import SplitQueue

MIB = 1 << 20
CONFIG = bytes(range(1, 33))
WRITABLE_CONFIG = range(8, 16)
TOY_FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | 1 << 5


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def readable(fd: int, seconds: float = 10.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@contextmanager
def guest_memory() -> Iterator[GuestMemory]:
    """Two regions of one memfd with a hole between them, as around the PCI hole."""
    fd = os.memfd_create("toy-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 3 * MIB)
        memory = GuestMemory([MemoryRegion(0, 2 * MIB, fd, 0), MemoryRegion(16 * MIB, MIB, fd, 2 * MIB)])
        yield memory
        memory.close()
    finally:
        os.close(fd)


class ToyDevice:
    """Writes the readable bytes of each chain, backwards, into its writable part. One thread per queue."""

    features = TOY_FEATURES

    def __init__(self, queue_count: int = 2) -> None:
        self.queue_count = queue_count
        self.accepted = 0
        self.config = bytearray(CONFIG)
        self.started: list[int] = []
        self.stopped: list[int] = []
        self._serving: dict[int, tuple[threading.Thread, int, SplitQueue]] = {}
        self._calls: dict[int, int] = {}
        self._lock = threading.Lock()

    def set_features(self, features: int) -> None:
        assert not self._serving
        self.accepted = features

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes) -> None:
        if offset not in WRITABLE_CONFIG or offset + len(data) > WRITABLE_CONFIG.stop:
            raise GuestError("read-only configuration")
        self.config[offset : offset + len(data)] = data

    def configure(self, offset: int, data: bytes) -> None:
        assert not self._serving
        if offset:
            raise GuestError("only the beginning may be changed")
        self.config[: len(data)] = data

    def start_queue(self, index: int, queue: SplitQueue, kick_fd: int, call_fd: int, err_fd: int) -> None:
        assert index not in self._serving
        self.started.append(index)
        stop_fd = os.eventfd(0)
        self._calls[index] = call_fd
        thread = threading.Thread(target=self._serve, args=(index, queue, kick_fd, err_fd, stop_fd))
        self._serving[index] = (thread, stop_fd, queue)
        thread.start()

    def set_call(self, index: int, call_fd: int) -> None:
        assert index in self._serving
        with self._lock:
            self._calls[index] = call_fd

    def stop_queue(self, index: int) -> int:
        thread, stop_fd, queue = self._serving.pop(index)
        self.stopped.append(index)
        os.eventfd_write(stop_fd, 1)
        thread.join()
        os.close(stop_fd)
        return queue.next_avail

    def _serve(self, index: int, queue: SplitQueue, kick_fd: int, err_fd: int, stop_fd: int) -> None:
        poll = select.poll()
        poll.register(stop_fd, select.POLLIN)
        if kick_fd >= 0:
            poll.register(kick_fd, select.POLLIN)
        try:
            while True:
                self._echo(index, queue)
                ready = [fd for fd, _ in poll.poll(5 if kick_fd < 0 else None)]
                if stop_fd in ready:
                    return
                if kick_fd in ready:
                    os.eventfd_read(kick_fd)
        except GuestError:
            if err_fd >= 0:
                os.eventfd_write(err_fd, 1)

    def _echo(self, index: int, queue: SplitQueue) -> None:
        while (chain := queue.pop()) is not None:
            answer = b"".join(bytes(view) for view in chain.readable)[::-1]
            chain.writable[0][: len(answer)] = answer
            queue.push(chain.head, len(answer))
            with self._lock:
                if self._calls[index] >= 0:
                    os.eventfd_write(self._calls[index], 1)


class ToyDriver:
    """The driver's side of one split queue at `base`: its parts in one page, buffers in those after."""

    def __init__(self, memory: GuestMemory, index: int, base: int, size: int = 8) -> None:
        self.memory = memory
        self.config = QueueConfig(index, size, base, base + 0x400, base + 0x800)
        self.buffers = base + 0x1000
        self.avail_idx = 0
        memory.write(base, bytes(0x1000))

    def request(self, data: bytes) -> None:
        """Make one chain available: `data` to read, as much room to write."""
        config = self.config
        slot = self.avail_idx % (config.size // 2)
        source = self.buffers + slot * 0x200
        self.memory.write(source, data)
        head = 2 * slot
        self.chain(head, [(source, len(data), False), (source + 0x100, len(data), True)])

    def chain(self, head: int, buffers: list[tuple[int, int, bool]]) -> None:
        config = self.config
        for number, (gpa, length, writable) in enumerate(buffers):
            last = number == len(buffers) - 1
            flags = (0 if last else 1) | (2 if writable else 0)
            descriptor = struct.pack("<QIHH", gpa, length, flags, 0 if last else head + number + 1)
            self.memory.write(config.descriptors + 16 * (head + number), descriptor)
        self.memory.write(config.available + 4 + 2 * (self.avail_idx % config.size), struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.write(config.available + 2, struct.pack("<H", self.avail_idx))

    def used_idx(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.config.used + 2, 2))[0])

    def answer(self, number: int) -> bytes:
        """What the `number`th used element carries."""
        config = self.config
        element = self.memory.read(config.used + 4 + 8 * (number % config.size), 8)
        head, length = struct.unpack("<II", element)
        gpa, _, _, _ = struct.unpack("<QIHH", self.memory.read(config.descriptors + 16 * (head + 1), 16))
        return self.memory.read(gpa, length)


class ToyBoard(Board):
    """Only watches. `turn` runs what is readable, as the main loop would."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        assert fd not in self.watched
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        del self.watched[fd]

    def turn(self, seconds: float = 10.0) -> bool:
        """Wait until something is readable and call its callback; False when nothing became readable."""
        poll = select.poll()
        for fd in self.watched:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(seconds * 1000)
        for fd, _ in ready:
            if fd in self.watched:
                self.watched[fd]()
        return bool(ready)

    def irq_line(self, gsi: int) -> IrqLine:
        raise NotImplementedError

    def msi_vector(self) -> MsiVector:
        raise NotImplementedError

    def kick_on_write(self, space: str, address: int, size: int, fd: int, value: int | None = None) -> Kick:
        raise NotImplementedError


class ToyEvents:
    """The transport's side: eventfds for `count` queues, and a record of what the device reported."""

    def __init__(self, count: int = 2) -> None:
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        self.config_changes = 0
        self.resets: list[str] = []

    def kick_fd(self, queue: int) -> int:
        return self.kicks[queue]

    def call_fd(self, queue: int) -> int:
        return self.calls[queue]

    def config_changed(self) -> None:
        self.config_changes += 1

    def needs_reset(self, reason: str) -> None:
        self.resets.append(reason)

    def close(self) -> None:
        for fd in self.kicks + self.calls:
            os.close(fd)


@contextmanager
def backend_thread(
    device: ToyDevice, sock: socket.socket
) -> Iterator[tuple[Backend, list[BaseException], threading.Thread]]:
    """Serve `device` on `sock` in a thread. The list collects what ended the session, if not EOF."""
    backend = Backend(Channel(sock), device)
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            backend.serve()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield backend, errors, thread
    finally:
        thread.join(20)
        assert not thread.is_alive(), "the back end did not end with its connection"
