"""A virtual processor: running it, and its registers. Documentation/virt/kvm/api.rst, "vcpu ioctls".

One thread runs a vCPU. Another stops it by setting `header.immediate_exit` and then sending that thread a
signal (whose handler does nothing): the flag covers the moment just before the guest is entered, the signal
the guest itself.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Sequence
from types import TracebackType

from vmrun.kvm import abi
from vmrun.kvm.ioctl import ioctl, raw_ioctl


def read_cpuid(fd: int, request: int, name: str) -> list[abi.kvm_cpuid_entry2]:
    """The leaves that one of KVM's calls for them gives."""
    limit = 256
    size = ctypes.sizeof(abi.kvm_cpuid2)
    buffer = ctypes.create_string_buffer(size + limit * ctypes.sizeof(abi.kvm_cpuid_entry2))
    header = abi.kvm_cpuid2.from_buffer(buffer)
    header.nent = limit
    ioctl(fd, request, buffer, name)
    return list((abi.kvm_cpuid_entry2 * header.nent).from_buffer_copy(buffer, size))


class Vcpu:
    """Owns the vCPU's descriptor and the mapping of `struct kvm_run`, whose parts are attributes: `header`
    and one per exit. `xsave_size` is how many bytes its XSAVE area takes.
    """

    def __init__(self, fd: int, mmap_size: int, xsave_size: int) -> None:
        self.fd = fd
        self.xsave_size = xsave_size
        self.page = mmap.mmap(fd, mmap_size)
        # The views below pin the mapping: it goes when they do.
        at = abi.KVM_RUN_EXIT
        self.header = abi.kvm_run.from_buffer(self.page)
        self.io = abi.kvm_run_io.from_buffer(self.page, at)
        self.mmio = abi.kvm_run_mmio.from_buffer(self.page, at)
        self.debug = abi.kvm_run_debug.from_buffer(self.page, at)
        self.msr = abi.kvm_run_msr.from_buffer(self.page, at)
        self.internal = abi.kvm_run_internal.from_buffer(self.page, at)
        self.emulation_failure = abi.kvm_run_emulation_failure.from_buffer(self.page, at)
        self.fail_entry = abi.kvm_run_fail_entry.from_buffer(self.page, at)
        self.system_event = abi.kvm_run_system_event.from_buffer(self.page, at)
        self.sync = abi.kvm_sync_regs.from_buffer(self.page, abi.KVM_RUN_SYNC_REGS)
        self.valid_regs = ctypes.c_uint64.from_buffer(self.page, abi.KVM_RUN_VALID_REGS)
        self.dirty_regs = ctypes.c_uint64.from_buffer(self.page, abi.KVM_RUN_DIRTY_REGS)

    def run(self) -> int:
        """Run the guest until it needs us; return the exit reason (KVM_EXIT_...).

        A signal or `immediate_exit` gives KVM_EXIT_INTR. Raises OSError when KVM cannot run the vCPU at all.
        """
        if raw_ioctl(self.fd, abi.KVM_RUN, None) < 0:
            error = ctypes.get_errno()
            if error in (errno.EINTR, errno.EAGAIN):
                return abi.KVM_EXIT_INTR
            raise OSError(error, f"KVM_RUN: {os.strerror(error)}")
        return self.header.exit_reason

    def get_regs(self) -> abi.kvm_regs:
        regs = abi.kvm_regs()
        ioctl(self.fd, abi.KVM_GET_REGS, ctypes.byref(regs), "KVM_GET_REGS")
        return regs

    def set_regs(self, regs: abi.kvm_regs) -> None:
        ioctl(self.fd, abi.KVM_SET_REGS, ctypes.byref(regs), "KVM_SET_REGS")

    def get_sregs(self) -> abi.kvm_sregs:
        sregs = abi.kvm_sregs()
        ioctl(self.fd, abi.KVM_GET_SREGS, ctypes.byref(sregs), "KVM_GET_SREGS")
        return sregs

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        ioctl(self.fd, abi.KVM_SET_SREGS, ctypes.byref(sregs), "KVM_SET_SREGS")

    def get_events(self) -> abi.kvm_vcpu_events:
        events = abi.kvm_vcpu_events()
        ioctl(self.fd, abi.KVM_GET_VCPU_EVENTS, ctypes.byref(events), "KVM_GET_VCPU_EVENTS")
        return events

    def set_events(self, events: abi.kvm_vcpu_events) -> None:
        ioctl(self.fd, abi.KVM_SET_VCPU_EVENTS, ctypes.byref(events), "KVM_SET_VCPU_EVENTS")

    def get_xsave(self) -> abi.kvm_xsave:
        xsave = abi.kvm_xsave()
        ioctl(self.fd, abi.KVM_GET_XSAVE, ctypes.byref(xsave), "KVM_GET_XSAVE")
        return xsave

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        ioctl(self.fd, abi.KVM_SET_XSAVE, ctypes.byref(xsave), "KVM_SET_XSAVE")

    def get_xcr0(self) -> int:
        xcrs = abi.kvm_xcrs()
        ioctl(self.fd, abi.KVM_GET_XCRS, ctypes.byref(xcrs), "KVM_GET_XCRS")
        return int(xcrs.xcrs[1])

    def set_xcr0(self, value: int) -> None:
        xcrs = abi.kvm_xcrs(nr_xcrs=1)
        xcrs.xcrs[1] = value
        ioctl(self.fd, abi.KVM_SET_XCRS, ctypes.byref(xcrs), "KVM_SET_XCRS")

    def get_debugregs(self) -> abi.kvm_debugregs:
        registers = abi.kvm_debugregs()
        ioctl(self.fd, abi.KVM_GET_DEBUGREGS, ctypes.byref(registers), "KVM_GET_DEBUGREGS")
        return registers

    def set_debugregs(self, registers: abi.kvm_debugregs) -> None:
        ioctl(self.fd, abi.KVM_SET_DEBUGREGS, ctypes.byref(registers), "KVM_SET_DEBUGREGS")

    def get_lapic(self) -> abi.kvm_lapic_state:
        lapic = abi.kvm_lapic_state()
        ioctl(self.fd, abi.KVM_GET_LAPIC, ctypes.byref(lapic), "KVM_GET_LAPIC")
        return lapic

    def set_lapic(self, lapic: abi.kvm_lapic_state) -> None:
        ioctl(self.fd, abi.KVM_SET_LAPIC, ctypes.byref(lapic), "KVM_SET_LAPIC")

    def get_mp_state(self) -> int:
        state = abi.kvm_mp_state()
        ioctl(self.fd, abi.KVM_GET_MP_STATE, ctypes.byref(state), "KVM_GET_MP_STATE")
        return state.mp_state

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values by index; raises OSError (EINVAL) when KVM does not know one of them."""
        wanted = list(indices)
        buffer = _msr_buffer([(index, 0) for index in wanted])
        if ioctl(self.fd, abi.KVM_GET_MSRS, buffer, "KVM_GET_MSRS") != len(wanted):
            raise OSError(errno.EINVAL, "KVM_GET_MSRS: a register is unknown to KVM")
        header = ctypes.sizeof(abi.kvm_msrs)
        entries = (abi.kvm_msr_entry * len(wanted)).from_buffer(buffer, header)
        return {entry.index: entry.data for entry in entries}

    def set_msrs(self, values: dict[int, int]) -> None:
        """Raises OSError (EINVAL) when KVM refuses one of them."""
        if ioctl(self.fd, abi.KVM_SET_MSRS, _msr_buffer(list(values.items())), "KVM_SET_MSRS") != len(values):
            raise OSError(errno.EINVAL, "KVM_SET_MSRS: KVM refuses a register")

    def read_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Values by index of those registers that can be read on this vCPU; the others are left out."""
        values = {}
        at = 0
        while at < len(indices):
            buffer = _msr_buffer([(index, 0) for index in indices[at:]])
            done = ioctl(self.fd, abi.KVM_GET_MSRS, buffer, "KVM_GET_MSRS")
            entries = (abi.kvm_msr_entry * done).from_buffer(buffer, ctypes.sizeof(abi.kvm_msrs))
            values.update({entry.index: entry.data for entry in entries})
            at += done + 1  # KVM stops at the first that it refuses
        return values

    def write_msrs(self, values: dict[int, int]) -> list[int]:
        """Set registers in the order of `values`; returns the indices that KVM refused."""
        wanted = list(values.items())
        refused = []
        at = 0
        while at < len(wanted):
            at += ioctl(self.fd, abi.KVM_SET_MSRS, _msr_buffer(wanted[at:]), "KVM_SET_MSRS")
            if at < len(wanted):
                refused.append(wanted[at][0])
                at += 1
        return refused

    def get_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """The leaves that were set, with the bits that follow control registers as they stand."""
        return read_cpuid(self.fd, abi.KVM_GET_CPUID2, "KVM_GET_CPUID2")

    def set_cpuid(self, entries: list[abi.kvm_cpuid_entry2]) -> None:
        header = ctypes.sizeof(abi.kvm_cpuid2)
        size = ctypes.sizeof(abi.kvm_cpuid_entry2)
        buffer = ctypes.create_string_buffer(header + size * len(entries))
        abi.kvm_cpuid2.from_buffer(buffer).nent = len(entries)
        for index, entry in enumerate(entries):
            ctypes.memmove(ctypes.byref(buffer, header + index * size), ctypes.byref(entry), size)
        ioctl(self.fd, abi.KVM_SET_CPUID2, buffer, "KVM_SET_CPUID2")

    def translate(self, linear_address: int) -> int | None:
        """The guest-physical address behind `linear_address` under the current page tables, or None."""
        request = abi.kvm_translation(linear_address=linear_address)
        ioctl(self.fd, abi.KVM_TRANSLATE, ctypes.byref(request), "KVM_TRANSLATE")
        return request.physical_address if request.valid else None

    def set_guest_debug(self, control: int, breakpoints: tuple[int, ...] = (), dr7: int = 0) -> None:
        """Arm up to four hardware breakpoint addresses with `dr7` (control KVM_GUESTDBG_...); 0 turns it
        off.
        """
        request = abi.kvm_guest_debug(control=control)
        for index, address in enumerate(breakpoints):
            request.debugreg[index] = address
        request.debugreg[7] = dr7
        ioctl(self.fd, abi.KVM_SET_GUEST_DEBUG, ctypes.byref(request), "KVM_SET_GUEST_DEBUG")

    def get_tsc_khz(self) -> int:
        """The frequency of the guest's time-stamp counter."""
        return ioctl(self.fd, abi.KVM_GET_TSC_KHZ, None, "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Raises OSError (EINVAL) when it is not the host's and the host cannot scale it."""
        ioctl(self.fd, abi.KVM_SET_TSC_KHZ, khz, "KVM_SET_TSC_KHZ")

    def get_tsc_offset(self) -> int:
        """What KVM adds to the host's time-stamp counter to make the guest's, modulo 2**64."""
        value = ctypes.c_uint64()
        request = abi.kvm_device_attr(
            group=abi.KVM_VCPU_TSC_CTRL, attr=abi.KVM_VCPU_TSC_OFFSET, addr=ctypes.addressof(value)
        )
        ioctl(self.fd, abi.KVM_GET_DEVICE_ATTR, ctypes.byref(request), "KVM_GET_DEVICE_ATTR TSC_OFFSET")
        return value.value

    def set_tsc_offset(self, offset: int) -> None:
        """A KVM without VMX or SVM says yes and does nothing: its guests see the host's counter."""
        value = ctypes.c_uint64(offset)
        request = abi.kvm_device_attr(
            group=abi.KVM_VCPU_TSC_CTRL, attr=abi.KVM_VCPU_TSC_OFFSET, addr=ctypes.addressof(value)
        )
        ioctl(self.fd, abi.KVM_SET_DEVICE_ATTR, ctypes.byref(request), "KVM_SET_DEVICE_ATTR TSC_OFFSET")

    def kvmclock_ctrl(self) -> None:
        """Tell the guest's kvm-clock that the vCPU was paused, so that no watchdog of the guest's takes the
        pause for a hang. After the pause began; does nothing for a guest without kvm-clock.
        """
        try:
            ioctl(self.fd, abi.KVM_KVMCLOCK_CTRL, None, "KVM_KVMCLOCK_CTRL")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> "Vcpu":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _msr_buffer(values: list[tuple[int, int]]) -> "ctypes.Array[ctypes.c_char]":
    header = ctypes.sizeof(abi.kvm_msrs)
    size = ctypes.sizeof(abi.kvm_msr_entry)
    buffer = ctypes.create_string_buffer(header + size * len(values))
    abi.kvm_msrs.from_buffer(buffer).nmsrs = len(values)
    for (index, data), entry in zip(
        values, (abi.kvm_msr_entry * len(values)).from_buffer(buffer, header), strict=True
    ):
        entry.index, entry.data = index, data
    return buffer
