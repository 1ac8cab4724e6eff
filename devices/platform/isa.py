"""Byte-wide devices of the ISA bus. VMM process.

The chips behind legacy ports have 8-bit registers. A wider access is what a PC's bridge makes of it: byte
cycles at successive ports, lowest first.
"""


class ByteDevice:
    """A `BusDevice` made of byte registers: subclasses say what one byte at an offset does. Any offset is
    harmless."""

    __slots__ = ()

    def read_byte(self, offset: int) -> int:
        raise NotImplementedError

    def write_byte(self, offset: int, value: int) -> None:
        raise NotImplementedError

    def read(self, offset: int, size: int) -> int:
        if size == 1:
            return self.read_byte(offset)
        value = 0
        for i in range(size):
            value |= self.read_byte(offset + i) << (8 * i)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1:
            self.write_byte(offset, value & 0xFF)
            return
        for i in range(size):
            self.write_byte(offset + i, value >> (8 * i) & 0xFF)
