"""The debug console at port 0x402: where SeaBIOS and others write their log. VMM process.

QEMU's isa-debugcon. Firmware looks whether a read gives 0xE9, and is silent where it does not; so the device
is there only when somebody reads the log.
"""

from collections.abc import Callable
from typing import Any

from devices.platform.isa import ByteDevice
from devices.state import SavedState

PORT = 0x402
_PRESENT = 0xE9
LINE_SIZE = 512  # a guest that never ends its line gets it cut


class DebugConsole(ByteDevice):
    """One port. `on_line` is given each line, in printable ASCII, on the vCPU's thread."""

    __slots__ = ("_line", "_on_line")

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._line = bytearray()

    def save(self) -> dict[str, Any]:
        return {"line": self._line.hex()}

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `save` cannot have said."""
        self._line = bytearray(SavedState("debug console", state).data("line", LINE_SIZE - 1))

    def read_byte(self, offset: int) -> int:
        return _PRESENT if offset == 0 else 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        if offset != 0:
            return
        if value != ord("\n"):
            self._line.append(value)
            if len(self._line) < LINE_SIZE:
                return
        line, self._line = self._line, bytearray()
        # The guest chose these bytes; somebody's terminal will show them.
        self._on_line("".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in line.rstrip(b"\r")))
