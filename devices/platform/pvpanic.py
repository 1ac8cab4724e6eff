"""pvpanic: a register that a guest kernel writes when it panics. VMM process; QEMU's docs/specs/pvpanic.rst,
PCI form.

Without it a panicking guest looks like one that resets. The ids are QEMU's: Linux (CONFIG_PVPANIC_PCI) and
others have drivers for them.
"""

from collections.abc import Callable

from devices.pci.bars import BarKind
from devices.pci.function import PciFunction

VENDOR = 0x1B36
DEVICE = 0x0011
CLASS_SYSTEM_OTHER = 0x088000

PANICKED = 1 << 0
CRASH_LOADED = 1 << 1  # a crash kernel takes over: it will say how things end


class PvPanic(PciFunction):
    """`on_panic` is called on the vCPU's thread when the guest says that it panicked."""

    def __init__(self, on_panic: Callable[[], None]) -> None:
        super().__init__(vendor_id=VENDOR, device_id=DEVICE, class_code=CLASS_SYSTEM_OTHER, revision=1)
        self.on_panic = on_panic
        self.add_bar(0, BarKind.MEMORY_32, 16, self)

    def read(self, offset: int, size: int) -> int:
        return PANICKED | CRASH_LOADED if offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and value & PANICKED:
            self.on_panic()
