"""Interrupts from devices into KVM: shared level lines, and MSI vectors that are eventfds. Implements
`devices.board`'s.

VMM process. A vector's eventfd is bound to KVM by KVM_IRQFD, so whoever writes it (a worker, say) interrupts
the guest without the VMM doing anything. Documentation/virt/kvm/api.rst, KVM_IRQFD and KVM_SET_GSI_ROUTING.
"""

import os
import select
import threading

from vmrun.kvm import Vm, abi
from vmrun.kvm.vm import IOAPIC_PINS, default_routes, msi_route


class SharedLine:
    """One user's view of an interrupt input that others may drive too."""

    def __init__(self, controller: "Interrupts", gsi: int) -> None:
        self._controller = controller
        self._gsi = gsi
        self._asserted = False

    def set_level(self, asserted: bool) -> None:
        controller = self._controller
        with controller.lock:
            if asserted == self._asserted:
                return
            self._asserted = asserted
            before = controller.asserted.get(self._gsi, 0)
            after = before + (1 if asserted else -1)
            controller.asserted[self._gsi] = after
            if bool(before) != bool(after):
                controller.vm.irq_line(self._gsi, int(bool(after)))


class Vector:
    """An MSI vector: an eventfd, owned here, that is bound to KVM while connected."""

    def __init__(self, controller: "Interrupts", gsi: int) -> None:
        self._controller = controller
        self._gsi = gsi
        self._connected = False
        self._message: tuple[int, int] | None = None  # what the route says
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def connect(self, address: int, data: int) -> None:
        controller = self._controller
        with controller.lock:
            if self._message != (address, data):
                # KVM waits for an RCU grace period here: not for each time that a guest unmasks its vector.
                controller.routes[self._gsi] = msi_route(self._gsi, address, data)
                controller.update_routes()
                self._message = (address, data)
            if not self._connected:
                controller.vm.irqfd(self.fd, self._gsi)
                self._connected = True

    def disconnect(self) -> None:
        with self._controller.lock:
            if self._connected:
                self._controller.vm.irqfd(self.fd, self._gsi, assign=False)
                self._connected = False

    def pending(self) -> bool:
        poll = select.poll()  # select() has no place for descriptors from 1024 on
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self.disconnect()
        with self._controller.lock:
            self._controller.routes.pop(self._gsi, None)
        os.close(self.fd)


class Interrupts:
    """The routing table and the level of every input. `lock` guards both; vCPU threads and the main loop come
    here.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.lock = threading.Lock()
        self.asserted: dict[int, int] = {}
        self.routes: dict[int, abi.kvm_irq_routing_entry] = {}
        self._next_gsi = IOAPIC_PINS

    def line(self, gsi: int) -> SharedLine:
        return SharedLine(self, gsi)

    def vector(self) -> Vector:
        with self.lock:
            gsi = self._next_gsi
            self._next_gsi += 1
        return Vector(self, gsi)

    def update_routes(self) -> None:
        """With `lock` held. KVM takes the table only whole; it is a few dozen entries."""
        self.vm.set_gsi_routing([*default_routes(), *self.routes.values()])

    def assert_again(self) -> None:
        """Raise the inputs that somebody drives, after KVM's interrupt controllers got another state."""
        with self.lock:
            for gsi, count in self.asserted.items():
                if count:
                    self.vm.irq_line(gsi, 1)

    def set_level_triggered(self, gsis: tuple[int, ...]) -> None:
        """Make PIC inputs `gsis` level-triggered (the ELCR), which firmware does on a PC before PCI is
        used.
        """
        for chip_id, first in ((abi.KVM_IRQCHIP_PIC_MASTER, 0), (abi.KVM_IRQCHIP_PIC_SLAVE, 8)):
            chip = self.vm.get_irqchip(chip_id)
            elcr = 14  # offset in struct kvm_pic_state
            for gsi in gsis:
                if first <= gsi < first + 8:
                    chip.chip[elcr] |= 1 << (gsi - first)
            self.vm.set_irqchip(chip)
