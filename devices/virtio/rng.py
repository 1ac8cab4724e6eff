"""virtio-rng: the host's random numbers for the guest. VMM process; virtio 1.2, section 5.4.

The numbers are getrandom(2)'s, read for each request and kept nowhere. A request gets at most MAX_REQUEST
bytes, as in vmd, and the main loop has its turn after TURN_REQUESTS of them: a guest that asks without end
gets numbers without end, and delays the rest of its VMM by less than a millisecond at a time.
"""

import os

from devices.board import Board
from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.virtio.device import VIRTIO_ID_ENTROPY
from devices.virtio.inprocess import InProcessDevice
from devices.virtio.queue import SplitQueue

QUEUE_SIZE = 64
MAX_REQUEST = 64 << 10  # bytes; the driver asks again for more
TURN_REQUESTS = 4


class VirtioRng(InProcessDevice):
    """The entropy device: one queue, no configuration, no features."""

    def __init__(self, memory: GuestMemory, board: Board) -> None:
        super().__init__(memory, board, device_id=VIRTIO_ID_ENTROPY, queue_sizes=(QUEUE_SIZE,))

    def serve(self, index: int, queue: SplitQueue) -> bool:
        for _ in range(TURN_REQUESTS):
            chain = queue.pop()
            if chain is None:
                return False
            if chain.readable_size or not chain.writable_size:
                sizes = f"{chain.readable_size} bytes to read and {chain.writable_size} to write"
                raise GuestError(f"queue {index}: entropy request with {sizes}")
            numbers = memoryview(os.urandom(min(chain.writable_size, MAX_REQUEST)))
            given = 0
            for part in chain.writable:
                size = min(len(part), len(numbers) - given)
                part[:size] = numbers[given : given + size]
                given += size
                if given == len(numbers):
                    break
            queue.push(chain.head, given)
        return True
