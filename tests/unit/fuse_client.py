"""A virtio-fs driver for the tests of mounts: FUSE requests (linux/fuse.h) over the rings of a device."""

import errno
import os
import struct

from devices.memory import GuestMemory
from devices.vhost.frontend import VhostUserDevice
from devices.virtio.device import VIRTIO_F_VERSION_1, QueueConfig
from tests.unit.vhost_toy import ToyDriver, ToyEvents, readable

FUSE_LOOKUP, FUSE_SYMLINK, FUSE_MKNOD, FUSE_OPEN, FUSE_READ, FUSE_WRITE = 1, 6, 8, 14, 15, 16
FUSE_INIT, FUSE_CREATE = 26, 35
IN_HEADER = struct.Struct("<IIQQIIII")  # len, opcode, unique, nodeid, uid, gid, pid, padding
OUT_HEADER = struct.Struct("<IiQ")  # len, error, unique
ROOT_NODE = 1
ROOM = 0x1000


class FuseClient:
    """Requests go one at a time. An answer with an error is an OSError."""

    def __init__(self, memory: GuestMemory, base: int) -> None:
        self.memory = memory
        self.events = ToyEvents(2)
        self.hiprio = ToyDriver(memory, 0, base)
        self.driver = ToyDriver(memory, 1, base + 0x10000)
        self._unique = 0

    @property
    def queues(self) -> list[QueueConfig]:
        return [self.hiprio.config, self.driver.config]

    def activate(self, device: VhostUserDevice) -> None:
        device.activate(VIRTIO_F_VERSION_1, self.queues, self.events)

    def send(self, opcode: int, node: int, payload: bytes) -> None:
        self._unique += 2
        uid = gid = 0  # the guest's root
        size = IN_HEADER.size + len(payload)
        request = IN_HEADER.pack(size, opcode, self._unique, node, uid, gid, 0, 0) + payload
        source, room = self.driver.buffers, self.driver.buffers + ROOM
        self.memory.write(source, request)
        self.memory.write(room, bytes(OUT_HEADER.size))
        self.driver.chain(0, [(source, len(request), False), (room, ROOM, True)])
        os.eventfd_write(self.events.kicks[1], 1)

    def receive(self) -> bytes:
        while self.driver.used_idx() != self.driver.avail_idx:
            assert readable(self.events.calls[1]), "no answer"
            os.eventfd_read(self.events.calls[1])
        answer = self.memory.read(self.driver.buffers + ROOM, ROOM)
        length, error, unique = OUT_HEADER.unpack_from(answer)
        assert unique == self._unique
        if error:
            raise OSError(-error, errno.errorcode[-error])
        return bytes(answer[OUT_HEADER.size : length])

    def ask(self, opcode: int, node: int, payload: bytes) -> bytes:
        self.send(opcode, node, payload)
        return self.receive()

    def init(self) -> None:
        """What mount(2) does."""
        answer = self.ask(FUSE_INIT, 0, struct.pack("<IIII", 7, 31, 65536, 0) + bytes(48))
        assert struct.unpack_from("<I", answer) == (7,)

    def lookup(self, name: str, parent: int = ROOT_NODE) -> int:
        (node,) = struct.unpack_from("<Q", self.ask(FUSE_LOOKUP, parent, name.encode() + b"\0"))
        return int(node)

    def open(self, name: str, flags: int) -> tuple[int, int]:
        """The node and the handle."""
        node = self.lookup(name)
        (handle,) = struct.unpack_from("<Q", self.ask(FUSE_OPEN, node, struct.pack("<II", flags, 0)))
        return node, int(handle)

    def read(self, name: str) -> bytes:
        node, handle = self.open(name, os.O_RDONLY)
        return self.ask(FUSE_READ, node, struct.pack("<QQIIQII", handle, 0, 2048, 0, 0, 0, 0))

    def write(self, name: str, data: bytes) -> None:
        """Make the file, and write it."""
        header = struct.pack("<IIII", os.O_WRONLY | os.O_CREAT, 0o644, 0o022, 0)
        answer = self.ask(FUSE_CREATE, ROOT_NODE, header + name.encode() + b"\0")
        (node,) = struct.unpack_from("<Q", answer)
        (handle,) = struct.unpack_from("<Q", answer, 128)  # after struct fuse_entry_out
        self.ask(FUSE_WRITE, node, struct.pack("<QQIIQII", handle, 0, len(data), 0, 0, 0, 0) + data)

    def symlink(self, name: str, target: str) -> None:
        self.ask(FUSE_SYMLINK, ROOT_NODE, name.encode() + b"\0" + target.encode() + b"\0")

    def mknod(self, name: str, mode: int, device: int) -> None:
        header = struct.pack("<IIII", mode, device, 0, 0)
        self.ask(FUSE_MKNOD, ROOT_NODE, header + name.encode() + b"\0")

    def close(self) -> None:
        self.events.close()
