"""The board: KVM's VM, its interrupt controllers, and the two buses that exits are routed into. VMM process.

This is what devices are plugged into (`devices.board.Board`), and what vCPU threads look addresses up in. It
knows no device: `vmrun.machine.machine` puts them on.
"""

from collections.abc import Callable

from devices.board import IrqLine, Kick, MsiVector
from devices.bus import Bus
from devices.pci.intx import INTX_GSIS
from vmrun.kvm import Vm
from vmrun.machine.interrupts import Interrupts
from vmrun.machine.layout import ACPI_SCI_IRQ
from vmrun.machine.loop import EventLoop


class IoEventFd:
    """A KVM_IOEVENTFD registration: guest writes to an address become signals on an eventfd, without an
    exit.
    """

    def __init__(self, vm: Vm, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        self._vm = vm
        self._where = (fd, address, size)
        self._pio = pio
        self._value = value
        vm.ioeventfd(fd, address, size, pio=pio, value=value)

    def close(self) -> None:
        self._vm.ioeventfd(*self._where, pio=self._pio, value=self._value, assign=False)


class KvmBoard:
    """`devices.board.Board` on KVM. Owns nothing that must be closed: `vm` and `loop` belong to the
    machine.
    """

    def __init__(self, vm: Vm, loop: EventLoop, physical_address_bits: int) -> None:
        self.vm = vm
        self.loop = loop
        self.pio = Bus("PIO", 1 << 16)
        self.mmio = Bus("MMIO", 1 << physical_address_bits)
        self.interrupts = Interrupts(vm)
        self.interrupts.set_level_triggered((*INTX_GSIS, ACPI_SCI_IRQ))

    def irq_line(self, gsi: int) -> IrqLine:
        return self.interrupts.line(gsi)

    def msi_vector(self) -> MsiVector:
        return self.interrupts.vector()

    def kick_on_write(self, space: str, address: int, size: int, fd: int, value: int | None = None) -> Kick:
        return IoEventFd(self.vm, fd, address, size, pio=space == "pio", value=value)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self.loop.watch(fd, callback)

    def unwatch(self, fd: int) -> None:
        self.loop.unwatch(fd)
