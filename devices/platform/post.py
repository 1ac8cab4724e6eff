"""Port 0x80, the POST code display: what the guest wrote and when. VMM process.

Firmware writes its progress here and guests their milestones, which is how a boot is timed from outside.
Linux also writes to it only to pass time (`outb_p`), so the newest entries are kept and the rest forgotten.
"""

import time
from collections import deque
from collections.abc import Callable

from devices.platform.isa import ByteDevice

CAPACITY = 4096


class PostCodes(ByteDevice):
    """One port. `codes` holds (CLOCK_MONOTONIC nanoseconds, value) of the last writes, oldest first.

    `hook` is called for every write, on the vCPU's thread, and must be quick. Readers copy:
    `list(post.codes)`.
    """

    __slots__ = ("codes", "hook")

    def __init__(self, hook: Callable[[int, int], None] | None = None) -> None:
        self.codes: deque[tuple[int, int]] = deque(maxlen=CAPACITY)
        self.hook = hook

    def read_byte(self, offset: int) -> int:
        # A page register of the DMA controller lies under the display: it reads back what was written.
        if offset != 0:
            return 0xFF
        try:
            return self.codes[-1][1]
        except IndexError:
            return 0

    def write_byte(self, offset: int, value: int) -> None:
        if offset != 0:
            return
        now = time.monotonic_ns()
        self.codes.append((now, value))
        if self.hook is not None:
            self.hook(now, value)
