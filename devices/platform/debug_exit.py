"""The debug exit port: a guest that writes v to it ends the machine with code v. VMM process.

For guests without ACPI and for tests; one `out` instruction and no driver.
"""

from collections.abc import Callable

from devices.platform.isa import ByteDevice


class DebugExit(ByteDevice):
    """One port. `on_exit` gets the byte written, on the vCPU's thread; it only asks for the end and
    returns."""

    __slots__ = ("on_exit",)

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self.on_exit = on_exit

    def read_byte(self, offset: int) -> int:
        return 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        if offset == 0:
            self.on_exit(value)
