"""PCI configuration space: registers with per-bit write rules, capabilities, hooks. VMM process.

PCI Local Bus 3.0, chapter 6 (type 0 header) and appendix H; PCI Express gives each function 4096 bytes, of
which configuration mechanism 1 reaches the first 256. We define nothing in the extended part: its first dword
is zero, which means "no extended capabilities" (PCI Express base 7.9.1).
"""

from collections.abc import Callable

CONFIG_SIZE = 256
EXTENDED_CONFIG_SIZE = 4096

# Type 0 header, byte offsets.
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09  # three bytes: programming interface, subclass, class
CACHE_LINE_SIZE = 0x0C
LATENCY_TIMER = 0x0D
HEADER_TYPE = 0x0E
BAR0 = 0x10  # six dwords
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITIES_POINTER = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10
STATUS_INTERRUPT = 1 << 3
STATUS_CAPABILITIES = 1 << 4
STATUS_ERRORS = 0xF900  # parity, target/master abort, system error: write 1 to clear

CAP_VENDOR = 0x09
CAP_MSIX = 0x11
FIRST_CAPABILITY = 0x40


class MaskedBytes:
    """Little-endian registers of which each bit is read-only, writable, or cleared by writing 1. Not locked.

    Any offset and width may be accessed: what lies past the end reads as ones and ignores writes.
    """

    __slots__ = ("clearable", "data", "writable")

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.writable = bytearray(size)
        self.clearable = bytearray(size)

    def define(self, offset: int, size: int, value: int, *, writable: int = 0, clearable: int = 0) -> None:
        """Give the `size` bytes at `offset` a value and write masks. For the device, not for the guest."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")
        self.writable[offset : offset + size] = writable.to_bytes(size, "little")
        self.clearable[offset : offset + size] = clearable.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        """The value without side effects."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Set the value whatever the write masks say. For the device, not for the guest."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size].ljust(size, b"\xff"), "little")

    def load(self, data: bytes) -> None:
        """Take what the guest had written: the writable bits of `data`, which begins where this begins and
        may be shorter. Raises ValueError, and changes nothing, when another bit differs: these are other
        registers.
        """
        for offset, byte in enumerate(data):
            fixed = ~(self.writable[offset] | self.clearable[offset])
            if (byte ^ self.data[offset]) & fixed:
                raise ValueError(
                    f"byte {offset:#x} is {byte:#04x}, which {self.data[offset]:#04x} cannot become"
                )
        self.data[: len(data)] = data

    def write(self, offset: int, size: int, value: int) -> None:
        end = min(offset + size, len(self.data))
        for index in range(offset, end):
            byte = value >> (8 * (index - offset)) & 0xFF
            writable = self.writable[index]
            kept = self.data[index] & ~writable & ~(byte & self.clearable[index])
            self.data[index] = kept | (byte & writable)


class ConfigSpace(MaskedBytes):
    """The configuration space of one function. Its owner serialises accesses; hooks run under its lock."""

    __slots__ = ("_last_capability", "_next_capability", "_read_hooks", "_write_hooks")

    def __init__(self) -> None:
        super().__init__(EXTENDED_CONFIG_SIZE)
        self._read_hooks: list[tuple[int, int, Callable[[], None]]] = []
        self._write_hooks: list[tuple[int, int, Callable[[], None]]] = []
        self._last_capability = 0
        self._next_capability = FIRST_CAPABILITY

    def on_read(self, offset: int, size: int, hook: Callable[[], None]) -> None:
        """Call `hook` before a read that touches these bytes, so that it can bring them up to date."""
        self._read_hooks.append((offset, offset + size, hook))

    def on_write(self, offset: int, size: int, hook: Callable[[], None]) -> None:
        """Call `hook` after a write that touched these bytes."""
        self._write_hooks.append((offset, offset + size, hook))

    def read(self, offset: int, size: int) -> int:
        for start, end, hook in self._read_hooks:
            if offset < end and start < offset + size:
                hook()
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        super().write(offset, size, value)
        for start, end, hook in self._write_hooks:
            if offset < end and start < offset + size:
                hook()

    def add_capability(self, capability: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability whose bytes after the id and next pointer are `body`; returns its offset.

        `writable` masks `body`, and is zero beyond its end. Raises ValueError when the 256 bytes are used up.
        """
        offset = self._next_capability
        end = offset + 2 + len(body)
        if end > CONFIG_SIZE:
            raise ValueError(f"no room for capability {capability:#x} in configuration space")
        self.data[offset] = capability
        self.data[offset + 2 : end] = body
        self.writable[offset + 2 : end] = writable.ljust(len(body), b"\0")
        self.data[self._last_capability + 1 if self._last_capability else CAPABILITIES_POINTER] = offset
        self.data[STATUS] |= STATUS_CAPABILITIES
        self._last_capability = offset
        self._next_capability = (end + 3) & ~3
        return offset
