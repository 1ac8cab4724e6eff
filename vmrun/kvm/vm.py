"""A virtual machine: memory slots, interrupt controllers, eventfds. Documentation/virt/kvm/api.rst, "VM
ioctls".
"""

import ctypes
import os
from collections.abc import Iterable
from types import TracebackType

from vmrun.kvm import abi
from vmrun.kvm.ioctl import ioctl
from vmrun.kvm.vcpu import Vcpu

PIC_PINS = 8
IOAPIC_PINS = 24


def irqchip_route(gsi: int, irqchip: int, pin: int) -> abi.kvm_irq_routing_entry:
    """`gsi` drives input `pin` of `irqchip` (KVM_IRQCHIP_...)."""
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u[0], entry.u[1] = irqchip, pin
    return entry


def msi_route(gsi: int, address: int, data: int) -> abi.kvm_irq_routing_entry:
    """`gsi` sends the message `data` (32 bits) to `address` (64 bits)."""
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_MSI)
    entry.u[0], entry.u[1], entry.u[2] = address & 0xFFFFFFFF, address >> 32 & 0xFFFFFFFF, data & 0xFFFFFFFF
    return entry


def default_routes() -> list[abi.kvm_irq_routing_entry]:
    """What KVM_CREATE_IRQCHIP sets up: inputs 0 to 15 reach both PICs and the IOAPIC, 16 to 23 only the
    IOAPIC.

    As on a PC, the timer's line 0 of the PIC is pin 2 of the IOAPIC; KVM's own default does the same.
    """
    routes = []
    for gsi in range(16):
        chip = abi.KVM_IRQCHIP_PIC_MASTER if gsi < PIC_PINS else abi.KVM_IRQCHIP_PIC_SLAVE
        routes.append(irqchip_route(gsi, chip, gsi % PIC_PINS))
    for gsi in range(IOAPIC_PINS):
        if gsi != 2:
            routes.append(irqchip_route(gsi, abi.KVM_IRQCHIP_IOAPIC, 2 if gsi == 0 else gsi))
    return routes


class Vm:
    """Owns the VM's descriptor. Guest memory given to `set_memory` must outlive it."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self.fd = fd
        self.vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, capability: int) -> int:
        return ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability)

    def enable_cap(self, capability: int, *args: int) -> None:
        """Turn on `capability` with up to four arguments."""
        request = abi.kvm_enable_cap(cap=capability)
        for index, value in enumerate(args):
            request.args[index] = value
        ioctl(self.fd, abi.KVM_ENABLE_CAP, ctypes.byref(request), f"KVM_ENABLE_CAP {capability}")

    def set_memory(self, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
        """Let `size` bytes of our memory at `address` be guest memory at `gpa`. All page-aligned; size 0
        removes `slot`.
        """
        region = abi.kvm_userspace_memory_region(
            slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=address
        )
        ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, ctypes.byref(region), "KVM_SET_USER_MEMORY_REGION")

    def set_tss_address(self, gpa: int) -> None:
        """Three pages below 4 GiB that KVM on VMX may use; no RAM may be there."""
        ioctl(self.fd, abi.KVM_SET_TSS_ADDR, gpa, "KVM_SET_TSS_ADDR")

    def set_identity_map_address(self, gpa: int) -> None:
        """One page below 4 GiB, likewise. Before the first vCPU."""
        ioctl(
            self.fd,
            abi.KVM_SET_IDENTITY_MAP_ADDR,
            ctypes.byref(ctypes.c_uint64(gpa)),
            "KVM_SET_IDENTITY_MAP_ADDR",
        )

    def create_irqchip(self) -> None:
        """PICs, IOAPIC and local APICs in the kernel. Before the first vCPU."""
        ioctl(self.fd, abi.KVM_CREATE_IRQCHIP, None, "KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """The 8254 timer in the kernel; port 0x61's speaker bits too."""
        config = abi.kvm_pit_config(flags=abi.KVM_PIT_SPEAKER_DUMMY)
        ioctl(self.fd, abi.KVM_CREATE_PIT2, ctypes.byref(config), "KVM_CREATE_PIT2")

    def create_vcpu(self, apic_id: int) -> Vcpu:
        fd = ioctl(self.fd, abi.KVM_CREATE_VCPU, apic_id, "KVM_CREATE_VCPU")
        # 0 before Linux 5.17, whose area is always that of the struct.
        xsave_size = max(self.check_extension(abi.KVM_CAP_XSAVE2), ctypes.sizeof(abi.kvm_xsave))
        return Vcpu(fd, self.vcpu_mmap_size, xsave_size)

    def irq_line(self, gsi: int, level: int) -> None:
        """Set interrupt input `gsi` high (1) or low (0)."""
        request = abi.kvm_irq_level(irq=gsi, level=level)
        ioctl(self.fd, abi.KVM_IRQ_LINE, ctypes.byref(request), "KVM_IRQ_LINE")

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        chip = abi.kvm_irqchip(chip_id=chip_id)
        ioctl(self.fd, abi.KVM_GET_IRQCHIP, ctypes.byref(chip), "KVM_GET_IRQCHIP")
        return chip

    def set_irqchip(self, chip: abi.kvm_irqchip) -> None:
        ioctl(self.fd, abi.KVM_SET_IRQCHIP, ctypes.byref(chip), "KVM_SET_IRQCHIP")

    def set_gsi_routing(self, routes: Iterable[abi.kvm_irq_routing_entry]) -> None:
        """Replace the whole table from interrupt input to interrupt controller or MSI."""
        entries = list(routes)
        header = ctypes.sizeof(abi.kvm_irq_routing)
        size = ctypes.sizeof(abi.kvm_irq_routing_entry)
        buffer = ctypes.create_string_buffer(header + size * len(entries))
        abi.kvm_irq_routing.from_buffer(buffer).nr = len(entries)
        for index, entry in enumerate(entries):
            ctypes.memmove(ctypes.byref(buffer, header + index * size), ctypes.byref(entry), size)
        ioctl(self.fd, abi.KVM_SET_GSI_ROUTING, buffer, "KVM_SET_GSI_ROUTING")

    def irqfd(self, fd: int, gsi: int, *, assign: bool = True) -> None:
        """Raise `gsi` whenever eventfd `fd` is written. A signal that already waits in `fd` is delivered on
        assignment.
        """
        request = abi.kvm_irqfd(fd=fd, gsi=gsi, flags=0 if assign else abi.KVM_IRQFD_FLAG_DEASSIGN)
        ioctl(self.fd, abi.KVM_IRQFD, ctypes.byref(request), "KVM_IRQFD")

    def ioeventfd(
        self, fd: int, address: int, size: int, *, pio: bool, value: int | None = None, assign: bool = True
    ) -> None:
        """Signal eventfd `fd` when the guest writes `size` bytes (0: any) at `address`; with `value`, only
        that value.
        """
        flags = 0 if assign else abi.KVM_IOEVENTFD_FLAG_DEASSIGN
        if pio:
            flags |= abi.KVM_IOEVENTFD_FLAG_PIO
        if value is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        request = abi.kvm_ioeventfd(datamatch=value or 0, addr=address, len=size, fd=fd, flags=flags)
        ioctl(self.fd, abi.KVM_IOEVENTFD, ctypes.byref(request), "KVM_IOEVENTFD")

    def filter_msr_writes(self, index: int, count: int = 1) -> None:
        """Exit with KVM_EXIT_X86_WRMSR when the guest writes MSR `index` or one of the next, `count` (up to
        64) together; all other MSRs stay KVM's.
        """
        self.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, abi.KVM_MSR_EXIT_REASON_FILTER)
        denied = ctypes.c_uint64(0)
        wanted = abi.kvm_msr_filter_range(
            flags=abi.KVM_MSR_FILTER_WRITE, nmsrs=count, base=index, bitmap=ctypes.addressof(denied)
        )
        request = abi.kvm_msr_filter()
        ctypes.memmove(request.ranges, ctypes.byref(wanted), ctypes.sizeof(wanted))
        ioctl(self.fd, abi.KVM_X86_SET_MSR_FILTER, ctypes.byref(request), "KVM_X86_SET_MSR_FILTER")

    def get_pit(self) -> abi.kvm_pit_state2:
        state = abi.kvm_pit_state2()
        ioctl(self.fd, abi.KVM_GET_PIT2, ctypes.byref(state), "KVM_GET_PIT2")
        return state

    def set_pit(self, state: abi.kvm_pit_state2) -> None:
        ioctl(self.fd, abi.KVM_SET_PIT2, ctypes.byref(state), "KVM_SET_PIT2")

    def get_clock(self) -> abi.kvm_clock_data:
        data = abi.kvm_clock_data()
        ioctl(self.fd, abi.KVM_GET_CLOCK, ctypes.byref(data), "KVM_GET_CLOCK")
        return data

    def set_clock(self, data: abi.kvm_clock_data) -> None:
        ioctl(self.fd, abi.KVM_SET_CLOCK, ctypes.byref(data), "KVM_SET_CLOCK")

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> "Vm":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
