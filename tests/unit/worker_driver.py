"""For the device tests: a guest's memory and one queue in it, driven as a driver would, from bytes to used elements."""

import os
import struct

from devices.memory import GuestMemory, MemoryRegion
from devices.virtio.queue import SplitQueue

SIZE = 64
DESCRIPTORS, AVAILABLE, USED, TABLES, BUFFERS = 0x1000, 0x2000, 0x3000, 0x10000, 0x100000
MEMORY_SIZE = 0x800000
NEXT, WRITE, INDIRECT = 1, 2, 4

Pieces = list[tuple[int, int]]


class Guest:
    """Chains are laid out in fresh buffers, in one indirect table each. Owns its memory; `close` finds leaked views."""

    def __init__(self) -> None:
        fd = os.memfd_create("test-ram")
        try:
            os.ftruncate(fd, MEMORY_SIZE)
            self.memory = GuestMemory([MemoryRegion(0, MEMORY_SIZE, fd, 0)])
        finally:
            os.close(fd)
        self.avail_idx = self.used_idx = 0
        self._free = BUFFERS
        self._writable: dict[int, Pieces] = {}

    def queue(self, index: int = 0, next_avail: int = 0) -> SplitQueue:
        return SplitQueue(
            self.memory,
            index,
            SIZE,
            DESCRIPTORS,
            AVAILABLE,
            USED,
            next_avail=next_avail,
            next_used=self.used_idx,
        )

    def _allocate(self, size: int) -> int:
        if self._free + size > MEMORY_SIZE:
            self._free = BUFFERS
        address = self._free
        self._free += size + 3  # odd addresses on purpose
        return address

    def offer(self, readable: list[bytes], writable: list[int]) -> int:
        """Make available a chain with these bytes to read and room of these sizes to write. Returns its head."""
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
        table = TABLES + head * 0x3000
        for number, (address, size, flags) in enumerate(entries):
            more = NEXT if number + 1 < len(entries) else 0
            self.memory.write(
                table + 16 * number,
                struct.pack("<QIHH", address, size, flags | more, number + 1 if more else 0),
            )
        self.memory.write(
            DESCRIPTORS + 16 * head, struct.pack("<QIHH", table, 16 * len(entries), INDIRECT, 0)
        )
        self._writable[head] = room
        self.memory.write(AVAILABLE + 4 + 2 * head, struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.write(AVAILABLE + 2, struct.pack("<H", self.avail_idx))
        return head

    def collect(self) -> list[tuple[int, int, bytes]]:
        """(head, used length, all bytes of the writable part) of what was used since the last call."""
        (idx,) = struct.unpack("<H", self.memory.read(USED + 2, 2))
        answers = []
        while self.used_idx != idx:
            element = self.memory.read(USED + 4 + 8 * (self.used_idx % SIZE), 8)
            head, length = struct.unpack("<II", element)
            room = self._writable.pop(head)
            answers.append(
                (head, length, b"".join(self.memory.read(address, size) for address, size in room))
            )
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        return answers

    def close(self) -> None:
        self.memory.close()
