"""For the device tests: a guest's memory and one queue in it, driven as a driver would, from bytes to
used elements.
"""

import os
import struct

from devices.memory import GuestMemory, MemoryRegion
from devices.virtio.device import QueueConfig
from devices.virtio.queue import SplitQueue

SIZE = 64
DESCRIPTORS, AVAILABLE, USED, TABLES, BUFFERS = 0x1000, 0x2000, 0x3000, 0x10000, 0x100000
QUEUE_SPACE = 0x800000
NEXT, WRITE, INDIRECT = 1, 2, 4

Pieces = list[tuple[int, int]]


class Guest:
    """One queue and its buffers in the `number`th 8 MiB of `memory`, or of two such areas of its own.

    Chains are laid out in fresh buffers, in one indirect table each. `close` finds leaked views.
    """

    def __init__(self, memory: GuestMemory | None = None, number: int = 0) -> None:
        if memory is None:
            fd = os.memfd_create("test-ram")
            os.ftruncate(fd, 2 * QUEUE_SPACE)
            memory = GuestMemory([MemoryRegion(0, 2 * QUEUE_SPACE, fd, 0)])
        self.memory = memory
        self.number = number
        self.base = number * QUEUE_SPACE
        self.avail_idx = self.used_idx = 0
        self._free = self.base + BUFFERS
        self._writable: dict[int, Pieces] = {}

    @property
    def config(self) -> QueueConfig:
        base = self.base
        return QueueConfig(self.number, SIZE, base + DESCRIPTORS, base + AVAILABLE, base + USED)

    def queue(self, next_avail: int = 0) -> SplitQueue:
        config = self.config
        return SplitQueue(
            self.memory,
            config.index,
            SIZE,
            config.descriptors,
            config.available,
            config.used,
            next_avail=next_avail,
            next_used=self.used_idx,
        )

    def restart(self) -> None:
        """Forget the queue, as a driver does after a reset."""
        self.memory.write(self.base + AVAILABLE, bytes(4))
        self.memory.write(self.base + USED, bytes(4))
        self.avail_idx = self.used_idx = 0
        self._writable.clear()

    def _allocate(self, size: int) -> int:
        if self._free + size > self.base + QUEUE_SPACE:
            self._free = self.base + BUFFERS
        address = self._free
        self._free += size + 3  # odd addresses on purpose
        return address

    def offer(self, readable: list[bytes], writable: list[int]) -> int:
        """Make available a chain with these bytes to read and room of these sizes to write. Returns its
        head.
        """
        head = self.avail_idx % SIZE
        entries: list[tuple[int, int, int]] = []
        for data in readable:
            address = self._allocate(len(data))
            self.memory.write(address, data)
            entries.append((address, len(data), 0))
        room = []
        for size in writable:
            address = self._allocate(size)
            self.memory.write(address, b"\xee" * size)
            entries.append((address, size, WRITE))
            room.append((address, size))
        table = self.base + TABLES + head * 0x3000
        for number, (address, size, flags) in enumerate(entries):
            more = NEXT if number + 1 < len(entries) else 0
            self.memory.write(
                table + 16 * number,
                struct.pack("<QIHH", address, size, flags | more, number + 1 if more else 0),
            )
        self.memory.write(
            self.base + DESCRIPTORS + 16 * head, struct.pack("<QIHH", table, 16 * len(entries), INDIRECT, 0)
        )
        self._writable[head] = room
        self.memory.write(self.base + AVAILABLE + 4 + 2 * head, struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.write(self.base + AVAILABLE + 2, struct.pack("<H", self.avail_idx))
        return head

    def collect(self) -> list[tuple[int, int, bytes]]:
        """(head, used length, all bytes of the writable part) of what was used since the last call."""
        (idx,) = struct.unpack("<H", self.memory.read(self.base + USED + 2, 2))
        answers = []
        while self.used_idx != idx:
            element = self.memory.read(self.base + USED + 4 + 8 * (self.used_idx % SIZE), 8)
            head, length = struct.unpack("<II", element)
            room = self._writable.pop(head)
            answers.append(
                (head, length, b"".join(self.memory.read(address, size) for address, size in room))
            )
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        return answers

    def close(self) -> None:
        """Once for all queues of a memory. Raises BufferError when somebody still holds a view."""
        fds = {region.fd for region in self.memory.regions}
        self.memory.close()
        for fd in fds:
            os.close(fd)
