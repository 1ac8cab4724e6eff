"""Port 0x80, the POST code display: what the guest wrote and when. VMM process.

Firmware writes its progress here and guests their milestones, which is how a boot is timed from outside.
Linux also writes to it only to pass time (`outb_p`), so the newest entries are kept and the rest forgotten.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from devices.platform.isa import ByteDevice
from devices.state import SavedState

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

    def save(self) -> dict[str, Any]:
        """The last code, which the guest can read back. Their times mean nothing in another process."""
        try:
            return {"last": self.codes[-1][1]}
        except IndexError:
            return {"last": None}

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `save` cannot have said. The hook is not called."""
        saved = SavedState("POST display", state)
        if not saved.absent("last"):
            self.codes.append((time.monotonic_ns(), saved.number("last", 0xFF)))

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
