"""vCPU threads: run the guest, route its exits into the buses, stop when told. One thread per vCPU.

KVM_RUN lets go of the GIL, so guests run in parallel; each exit takes it back, which is why whatever is
frequent goes through ioeventfd and irqfd instead. No I/O waits here.
"""

import ctypes
import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from devices.bus import Bus
from vmrun.boot.cpustate import CpuState, Segment
from vmrun.kvm import Vcpu, abi

KICK_SIGNAL = signal.SIGRTMIN

MSR_IA32_MISC_ENABLE = 0x1A0
MISC_ENABLE_FAST_STRING = 1 << 0
MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLE_WRITE_BACK = 0xC06  # MTRRs and fixed MTRRs enabled, default type write-back: all RAM is cacheable


class Helper(Protocol):
    """Finishes exits that this KVM leaves undone; see `vmrun.kvm.software`."""

    def finish(self, reason: int) -> bool: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class GuestHalted(Exception):
    """The guest's CPU cannot go on: a triple fault. That is how some guests reset a machine, and how others
    end.
    """


class VcpuFailure(Exception):
    """KVM gave the vCPU back in a state that nobody knows how to continue from."""


def allow_kicks() -> None:
    """Give the kick signal a handler that does nothing: ignored it would not interrupt KVM_RUN. Main thread
    only.
    """
    signal.signal(KICK_SIGNAL, lambda number, frame: None)


class VcpuThread:
    """Runs `vcpu` in a thread of its own. `on_end` is called once, there, with the exception that ended it,
    or None.
    """

    def __init__(
        self,
        index: int,
        vcpu: Vcpu,
        pio: Bus,
        mmio: Bus,
        helper: Helper | None,
        on_end: Callable[[int, BaseException | None], None],
    ) -> None:
        self.index = index
        self.vcpu = vcpu
        self.exits = 0
        self._pio = pio
        self._mmio = mmio
        self.helper = helper
        self._on_end = on_end
        self._stopping = False
        self._mailbox: deque[Callable[[], None]] = deque()
        self._page = memoryview(vcpu.page)
        self._thread = threading.Thread(target=self._main, name=f"vcpu{index}")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end at the next exit, and force that exit. Any thread."""
        self._stopping = True  # before the kick: the thread looks after it
        self.kick()

    def kick(self) -> None:
        """Make the guest exit to us soon, for whatever reason there is. Any thread."""
        if self._thread.ident is not None and self._thread.is_alive():
            self.vcpu.header.immediate_exit = 1
            signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def post(self, work: Callable[[], None]) -> None:
        """Have `work` done on the vCPU's thread, soon, between two runs of the guest. No access of the
        guest's is half done then: KVM completes it before it gives up the vCPU for a kick. Any thread.
        """
        self._mailbox.append(work)  # before the kick: the thread looks after it
        self.kick()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end, at most `timeout` seconds; returns whether it came. Fine when never
        started.
        """
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._on_end(self.index, error)
        else:
            self._on_end(self.index, None)

    def _run(self) -> None:
        vcpu = self.vcpu
        self._do_posted()  # a restored machine holds still before its first instruction
        while not self._stopping:
            reason = vcpu.run()
            self.exits += 1
            if reason == abi.KVM_EXIT_IO:
                self._port_access()
            elif reason == abi.KVM_EXIT_MMIO:
                self._memory_access()
            elif reason == abi.KVM_EXIT_INTR:
                vcpu.header.immediate_exit = 0
                self._do_posted()
            elif self.helper is None or not self.helper.finish(reason):
                self._other(reason)

    def _do_posted(self) -> None:
        while self._mailbox:
            self._mailbox.popleft()()

    def _port_access(self) -> None:
        io = self.vcpu.io
        port, size, start = io.port, io.size, io.data_offset
        page = self._page
        # A string instruction comes as `count` accesses to one port.
        for offset in range(start, start + size * io.count, size):
            if io.direction == abi.KVM_EXIT_IO_OUT:
                self._pio.write(port, size, int.from_bytes(page[offset : offset + size], "little"))
            else:
                page[offset : offset + size] = self._pio.read(port, size).to_bytes(size, "little")

    def _memory_access(self) -> None:
        mmio = self.vcpu.mmio
        size = mmio.len
        if mmio.is_write:
            self._mmio.write(mmio.phys_addr, size, int.from_bytes(mmio.data[:size], "little"))
        else:
            value = self._mmio.read(mmio.phys_addr, size).to_bytes(size, "little")
            ctypes.memmove(mmio.data, value, size)

    def _other(self, reason: int) -> None:
        vcpu = self.vcpu
        if reason == abi.KVM_EXIT_SHUTDOWN:
            raise GuestHalted(f"vCPU {self.index} triple-faulted")
        if reason == abi.KVM_EXIT_SYSTEM_EVENT and vcpu.system_event.type == abi.KVM_SYSTEM_EVENT_SHUTDOWN:
            raise GuestHalted(f"vCPU {self.index} shut down")
        raise VcpuFailure(f"vCPU {self.index}: {self._describe(reason)}")

    def _describe(self, reason: int) -> str:
        vcpu = self.vcpu
        where = f"at rip {vcpu.get_regs().rip:#x}"
        if reason == abi.KVM_EXIT_INTERNAL_ERROR:
            failure = vcpu.emulation_failure
            if failure.suberror == abi.KVM_INTERNAL_ERROR_EMULATION:
                code = bytes(failure.insn_bytes[: min(failure.insn_size, 15)]).hex(" ")
                return f"KVM cannot emulate the instruction {code or '(unknown)'} {where}"
            return f"KVM internal error {failure.suberror} {where}"
        if reason == abi.KVM_EXIT_FAIL_ENTRY:
            why = vcpu.fail_entry.hardware_entry_failure_reason
            return f"KVM cannot enter the guest (hardware reason {why:#x}) {where}"
        return f"unexpected KVM exit {reason} {where}"


def set_boot_state(vcpu: Vcpu, state: CpuState) -> None:
    """Put `state` into the boot processor."""
    sregs = vcpu.get_sregs()
    _set_segment(sregs.cs, state.code)
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        _set_segment(segment, state.data)
    _set_segment(sregs.tr, state.task)
    sregs.ldt.unusable = 1
    sregs.gdt.base, sregs.gdt.limit = state.gdt_address, state.gdt_limit
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = state.cr0, state.cr3, state.cr4, state.efer
    vcpu.set_sregs(sregs)
    vcpu.set_regs(
        abi.kvm_regs(rip=state.rip, rsp=state.rsp, rsi=state.rsi, rbx=state.rbx, rflags=state.rflags)
    )


def set_common_state(vcpu: Vcpu) -> None:
    """What firmware sets on every processor, and KVM does not."""
    vcpu.set_msrs({MSR_IA32_MISC_ENABLE: MISC_ENABLE_FAST_STRING, MSR_MTRR_DEF_TYPE: MTRR_ENABLE_WRITE_BACK})


def _set_segment(register: abi.kvm_segment, segment: Segment) -> None:
    register.selector, register.base, register.limit = segment.selector, segment.base, segment.limit
    register.type, register.s, register.dpl, register.present = (
        segment.type,
        segment.s,
        segment.dpl,
        segment.present,
    )
    register.l, register.db, register.g = segment.l, segment.db, segment.g
    register.avl = register.unusable = 0
