"""Legacy PCI interrupts: which input a slot's pin reaches, and the level a function drives. VMM process.

PCI Local Bus 3.0, section 2.2.6 (pins) and 6.2.2, 6.2.3 (Interrupt Disable in COMMAND, Interrupt Status in
STATUS). The MP table, the ACPI _PRT and the interrupt line registers all say what `intx_gsi` says.
"""

import threading

from devices.board import IrqLine

# ISA interrupts that no platform device of ours uses; PCI functions share them, level-triggered.
INTX_GSIS = (5, 10, 11, 15)


def intx_gsi(slot: int, pin: int) -> int:
    """The interrupt input of `pin` (1 is INTA, 4 is INTD) of the function in `slot`: the usual swizzle."""
    return INTX_GSIS[(slot + pin - 1) % len(INTX_GSIS)]


class Intx:
    """One function's INTx pin. Its lock is a leaf: nothing but the board's line is called with it held."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: IrqLine | None = None
        self.asserted = False  # what the device wants: the Interrupt Status bit
        self.disabled = False  # COMMAND's Interrupt Disable bit

    def connect(self, line: IrqLine) -> None:
        with self._lock:
            self._line = line
            self._drive()

    def set_asserted(self, asserted: bool) -> None:
        with self._lock:
            if asserted != self.asserted:
                self.asserted = asserted
                self._drive()

    def set_disabled(self, disabled: bool) -> None:
        with self._lock:
            if disabled != self.disabled:
                self.disabled = disabled
                self._drive()

    def _drive(self) -> None:
        if self._line is not None:
            self._line.set_level(self.asserted and not self.disabled)
