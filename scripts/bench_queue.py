"""What a request costs in the split queue alone: nanoseconds for pop + push, with the driver's part taken
out.

Run: python scripts/bench_queue.py [rounds]
"""

import os
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from devices.memory import GuestMemory, MemoryRegion
from devices.virtio.queue import (
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    SplitQueue,
)

SIZE = 256
DESCRIPTORS, AVAILABLE, USED, INDIRECT, BUFFERS = 0x0, 0x2000, 0x4000, 0x8000, 0x10000
MEMORY_SIZE = 1 << 20


def put_chain(memory: GuestMemory, table: int, first: int, count: int) -> None:
    """`count` linked descriptors, all writable but the first (a disk read: header, data, status)."""
    for i in range(count):
        flags = (VIRTQ_DESC_F_NEXT if i < count - 1 else 0) | (VIRTQ_DESC_F_WRITE if i else 0)
        entry = struct.pack("<QIHH", BUFFERS + 0x1000 * i, 512, flags, first + i + 1)
        memory.write(table + 16 * (first + i), entry)


def measure(name: str, memory: GuestMemory, heads: list[int], rounds: int) -> None:
    queue = SplitQueue(memory, 0, SIZE, DESCRIPTORS, AVAILABLE, USED)
    with memory.view(AVAILABLE, 4 + 2 * SIZE).cast("H") as available:
        for slot in range(SIZE):
            available[2 + slot] = heads[slot % len(heads)]
        batch = len(heads)
        best = float("inf")
        offered = 0
        for _ in range(rounds):
            offered = (offered + batch) & 0xFFFF
            available[1] = offered
            start = time.perf_counter_ns()
            while (chain := queue.pop()) is not None:
                queue.push(chain.head, 512)
            best = min(best, (time.perf_counter_ns() - start) / batch)
    start = time.perf_counter_ns()
    for _ in range(10_000):
        queue.interrupt_wanted()
    asked = (time.perf_counter_ns() - start) / 10_000
    queue.release()
    print(f"{name:<32} {best:7.0f} ns a request   (interrupt_wanted {asked:.0f} ns)")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    fd = os.memfd_create("bench")
    os.ftruncate(fd, MEMORY_SIZE)
    memory = GuestMemory([MemoryRegion(0, MEMORY_SIZE, fd, 0)])
    os.close(fd)

    for head in range(SIZE):
        put_chain(memory, DESCRIPTORS, head, 1)
    measure("1 descriptor", memory, list(range(64)), rounds)

    heads = list(range(0, 4 * 64, 4))
    for head in heads:
        put_chain(memory, DESCRIPTORS, head, 3)
    measure("3 descriptors", memory, heads, rounds)

    put_chain(memory, INDIRECT, 0, 3)
    for head in range(SIZE):
        memory.write(
            DESCRIPTORS + 16 * head, struct.pack("<QIHH", INDIRECT, 3 * 16, VIRTQ_DESC_F_INDIRECT, 0)
        )
    measure("indirect, 3 descriptors", memory, list(range(64)), rounds)
    memory.close()


if __name__ == "__main__":
    main()
