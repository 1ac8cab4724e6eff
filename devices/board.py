"""What a device may ask of the machine it is plugged into. VMM process only; `vmrun.machine.board` implements
it on KVM.

This is the seam between devices and hypervisor: an interrupt line, an MSI vector, a kick that reaches an
eventfd without an exit, a callback when a descriptor becomes readable. Unit tests put a fake board here.
"""

from collections.abc import Callable
from typing import Protocol


class IrqLine(Protocol):
    """One level-triggered input of the interrupt controllers. Shared lines are or-ed by the board: each user
    has its own.
    """

    def set_level(self, asserted: bool) -> None: ...


class MsiVector(Protocol):
    """One message-signalled interrupt. Writing 8 bytes to `fd` (an eventfd the board owns) raises it, from
    any process.
    """

    @property
    def fd(self) -> int: ...

    def connect(self, address: int, data: int) -> None:
        """Deliver to this MSI address and data from now on; what was signalled while disconnected is
        delivered at once.
        """

    def disconnect(self) -> None:
        """Stop delivery (vector masked): signals stay pending in `fd`."""

    def pending(self) -> bool:
        """Whether a signal waits in `fd` undelivered (the PBA bit). Only meaningful while disconnected."""

    def close(self) -> None: ...


class Kick(Protocol):
    """A registration that turns guest writes to an address into a signal on an eventfd."""

    def close(self) -> None: ...


class Board(Protocol):
    def irq_line(self, gsi: int) -> IrqLine:
        """A new user of interrupt input `gsi` (0 to 23)."""

    def msi_vector(self) -> MsiVector:
        """A new, disconnected vector."""

    def kick_on_write(self, space: str, address: int, size: int, fd: int, value: int | None = None) -> Kick:
        """Signal eventfd `fd` whenever the guest writes `size` bytes (1, 2, 4) at `address` of `space` ("pio"
        or "mmio").

        With `value`, only writes of that value. Such writes never reach the bus. Size 0 means any size.
        """

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` on the main loop's thread whenever `fd` is readable. It must not block. Safe from
        any thread.
        """

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`. Safe from any thread; a callback already running may still finish."""
