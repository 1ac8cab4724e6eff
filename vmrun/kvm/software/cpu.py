"""One vCPU on a KVM without VMX or SVM: the exits that ask for help, and the help. vCPU threads.

Three things come here:

* KVM_EXIT_INTERNAL_ERROR, emulation: kernel-mode code met an instruction that the emulator does not know.
* KVM_EXIT_X86_WRMSR: the guest set LSTAR, the address its system calls enter at (we asked for this exit).
* KVM_EXIT_DEBUG: the guest reached its page-fault handler, where we keep a hardware breakpoint. A SYSCALL in
user mode
  jumps to LSTAR without leaving user mode, faults on the fetch, and arrives here; we finish it. A true page
  fault is let through. The guest's own hardware breakpoints do not work meanwhile.
"""

import ctypes
from struct import Struct

from vmrun.kvm import abi
from vmrun.kvm.software.decode import Instruction
from vmrun.kvm.software.features import xsave_layout
from vmrun.kvm.software.paging import FAULT_FETCH, FAULT_USER, LinearMemory, PageFault, PhysicalView
from vmrun.kvm.software.xsave import MalformedArea, area_size, restore, save
from vmrun.kvm.vcpu import Vcpu
from vmrun.kvm.vm import Vm

MSR_STAR = 0xC0000081
MSR_LSTAR = 0xC0000082
MSR_SYSCALL_MASK = 0xC0000084

BP_VECTOR, GP_VECTOR, PF_VECTOR = 3, 13, 14

RFLAGS_CF_PF_AF_ZF_SF_OF = 0x8D5
RFLAGS_ZF = 1 << 6
RFLAGS_RF = 1 << 16
RFLAGS_AC = 1 << 18

_FRAME = Struct("<6Q")  # what #PF pushes: error code, RIP, CS, RFLAGS, RSP, SS
_DR7_FIRST = 0x401  # DR0 enabled, as an instruction breakpoint
_MASK64 = (1 << 64) - 1


def prepare_vm(vm: Vm) -> None:
    """Ask KVM for the exits that `SoftwareCpu` lives on. Before the first vCPU."""
    vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
    vm.filter_msr_writes(MSR_LSTAR)


class SoftwareCpu:
    """Helps one vCPU. `view` gives guest-physical RAM; `cpuid` are the leaves the vCPU was given."""

    def __init__(self, vcpu: Vcpu, view: PhysicalView, cpuid: list[abi.kvm_cpuid_entry2]) -> None:
        self._vcpu = vcpu
        self._view = view
        _, self._layout = xsave_layout(cpuid)
        self._lstar = 0
        self._star = 0
        self._syscall_mask = 0
        self._fault_handler = 0
        self._stepping = False
        self._image = abi.kvm_xsave()
        self.counts: dict[str, int] = {}
        # Every exit brings the registers along in the shared page: two system calls less for each.
        vcpu.valid_regs.value = abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS
        self._instructions = {
            0xCC: self._int3,
            0x9B: self._fwait,
            0x0F01: self._group7,
            0x0FAE: self._group15,
            0x0FB8: self._popcnt,
        }

    def finish(self, reason: int) -> bool:
        """Deal with exit `reason` when it is one of ours; False leaves it to the caller, untouched."""
        if reason == abi.KVM_EXIT_DEBUG:
            self._debug()
            return True
        if reason == abi.KVM_EXIT_INTERNAL_ERROR:
            return (
                self._vcpu.internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION and self._emulation_failure()
            )
        if reason == abi.KVM_EXIT_X86_WRMSR:
            return self._wrmsr()
        return False

    def _changed(self, fields: int = abi.KVM_SYNC_X86_REGS) -> None:
        self._vcpu.dirty_regs.value |= fields

    def _linear(self) -> LinearMemory:
        sregs = self._vcpu.sync.sregs
        return LinearMemory(self._view, sregs.cr0, sregs.cr3, sregs.cr4)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # System calls and page faults

    def _wrmsr(self) -> bool:
        request = self._vcpu.msr
        if request.index != MSR_LSTAR:
            return False
        self._vcpu.set_msrs({MSR_LSTAR: request.data})
        request.error = 0
        self._lstar = request.data
        self._find_fault_handler()
        return True

    def _find_fault_handler(self) -> None:
        """Put the breakpoint on the guest's page-fault handler, as its interrupt table names it now."""
        idt = self._vcpu.sync.sregs.idt
        if not self._lstar or idt.limit < 16 * PF_VECTOR + 15:
            return
        try:
            gate = self._linear().read(idt.base + 16 * PF_VECTOR, 16)
        except PageFault:
            return
        handler = int.from_bytes(gate[0:2] + gate[6:8] + gate[8:12], "little")
        if handler != self._fault_handler:
            self._fault_handler = handler
            self._arm()

    def _arm(self) -> None:
        self._stepping = False
        control = abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP
        self._vcpu.set_guest_debug(control, (self._fault_handler,), _DR7_FIRST)

    def _debug(self) -> None:
        if self._stepping:
            self._arm()
            return
        sync = self._vcpu.sync
        regs = sync.regs
        linear = self._linear()
        try:
            error_code, rip, cs, rflags, rsp, _ss = _FRAME.unpack(linear.read(regs.rsp, _FRAME.size))
        except PageFault:
            self._pass_breakpoint(linear)  # a broken guest: its own double fault is next
            return
        if rip != self._lstar or cs & 3 != 3 or not error_code & FAULT_FETCH or not error_code & FAULT_USER:
            self._count("page fault")
            self._pass_breakpoint(linear)
            return
        self._count("system call")
        if not self._star:
            self._read_syscall_msrs()
        regs.rip = rip
        regs.rsp = rsp
        regs.r11 = rflags & ~RFLAGS_RF  # RCX was loaded natively, when SYSCALL jumped
        regs.rflags = rflags & ~self._syscall_mask & ~RFLAGS_RF | 2
        selector = self._star >> 32 & 0xFFFC
        code, stack = sync.sregs.cs, sync.sregs.ss
        code.selector, code.base, code.limit = selector, 0, 0xFFFFFFFF
        code.type, code.present, code.dpl, code.db, code.s, code.l, code.g, code.unusable = (
            11,
            1,
            0,
            0,
            1,
            1,
            1,
            0,
        )
        stack.selector, stack.base, stack.limit = selector + 8, 0, 0xFFFFFFFF
        stack.type, stack.present, stack.dpl, stack.db, stack.s, stack.l, stack.g, stack.unusable = (
            3,
            1,
            0,
            1,
            1,
            0,
            1,
            0,
        )
        self._changed(abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS)

    def _read_syscall_msrs(self) -> None:
        values = self._vcpu.get_msrs((MSR_STAR, MSR_SYSCALL_MASK))
        self._star = values[MSR_STAR]
        self._syscall_mask = values[MSR_SYSCALL_MASK]

    def _pass_breakpoint(self, linear: LinearMemory) -> None:
        """Get past the handler's first instruction, which would hit the breakpoint again (RF does not help
        here).

        Kernels begin it with one of a few short instructions, done here at the price of no further exit;
        anything else is single-stepped with the breakpoint off.
        """
        regs = self._vcpu.sync.regs
        try:
            code = linear.read(regs.rip, 4)
        except PageFault:
            code = b""
        if code[:1] == b"\x90":
            regs.rip += 1
        elif code[:3] == b"\x0f\x1f\x00":
            regs.rip += 3
        elif code[:1] == b"\xfc":  # cld
            regs.rip += 1
            regs.rflags &= ~(1 << 10)
        elif code[:4] == b"\xf3\x0f\x1e\xfa":  # endbr64
            regs.rip += 4
        elif code[:3] == b"\x0f\x01\xca":  # clac
            regs.rip += 3
            regs.rflags &= ~RFLAGS_AC
        else:
            self._stepping = True
            self._vcpu.set_guest_debug(abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP)
            return
        self._changed()

    # Instructions

    def _emulation_failure(self) -> bool:
        failure = self._vcpu.emulation_failure
        if failure.flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES and failure.insn_size:
            code = bytes(failure.insn_bytes[: min(failure.insn_size, 15)])
        else:
            return False
        try:
            instruction = Instruction(code)
            perform = self._instructions.get(instruction.opcode)
            if perform is None or not perform(instruction):
                return False
        except IndexError:
            return False
        except PageFault as fault:
            self._vcpu.sync.sregs.cr2 = fault.address
            self._changed(abi.KVM_SYNC_X86_SREGS)
            self._raise(PF_VECTOR, fault.error_code)
            return True
        except MalformedArea:
            self._raise(GP_VECTOR, 0)
            return True
        self._count(f"{instruction.opcode:x}/{instruction.reg}")
        return True

    def _raise(self, vector: int, error_code: int | None = None) -> None:
        events = self._vcpu.get_events()
        exception = events.exception
        exception.injected, exception.pending, exception.nr = 1, 0, vector
        exception.has_error_code, exception.error_code = int(error_code is not None), error_code or 0
        self._vcpu.set_events(events)

    def _advance(self, length: int) -> bool:
        regs = self._vcpu.sync.regs
        regs.rip = regs.rip + length & _MASK64
        self._changed()
        return True

    def _int3(self, instruction: Instruction) -> bool:
        self._raise(BP_VECTOR)
        return self._advance(instruction.length)

    def _fwait(self, instruction: Instruction) -> bool:
        return self._advance(instruction.length)

    def _group7(self, instruction: Instruction) -> bool:
        regs = self._vcpu.sync.regs
        if instruction.modrm == 0xCA:  # clac
            regs.rflags &= ~RFLAGS_AC
        elif instruction.modrm == 0xCB:  # stac
            regs.rflags |= RFLAGS_AC
        elif instruction.modrm == 0xD0 and not regs.rcx & 0xFFFFFFFF:  # xgetbv
            xcr0 = self._vcpu.get_xcr0()
            regs.rax, regs.rdx = xcr0 & 0xFFFFFFFF, xcr0 >> 32
        else:
            return False
        return self._advance(instruction.length + 1)

    def _popcnt(self, instruction: Instruction) -> bool:
        if instruction.repeat != 0xF3:
            return False
        regs = self._vcpu.sync.regs
        size = 8 if instruction.wide else 2 if instruction.operand_size_16 else 4
        mask = (1 << 8 * size) - 1
        if instruction.in_memory:
            address = instruction.address(regs, self._vcpu.sync.sregs)
            value = int.from_bytes(self._linear().read(address, size), "little")
        else:
            value = getattr(regs, instruction.register_operand()) & mask
        count = value.bit_count()
        if size == 2:
            count |= getattr(regs, instruction.register) & ~0xFFFF
        setattr(regs, instruction.register, count)
        regs.rflags = regs.rflags & ~RFLAGS_CF_PF_AF_ZF_SF_OF | (0 if value else RFLAGS_ZF)
        return self._advance(instruction.length)

    def _group15(self, instruction: Instruction) -> bool:
        if not instruction.in_memory or instruction.reg not in (4, 5):
            return False
        vcpu, regs = self._vcpu, self._vcpu.sync.regs
        address = instruction.address(regs, vcpu.sync.sregs)
        if address % 64:
            raise MalformedArea
        xcr0 = vcpu.get_xcr0()
        components = (regs.rdx << 32 | regs.rax & 0xFFFFFFFF) & xcr0
        size = area_size(self._layout, components)
        linear = self._linear()
        image = vcpu.get_xsave()
        if instruction.reg == 4:
            area = bytearray(linear.read(address, size))
            save(bytes(image), area, self._layout, components)
            linear.write(address, bytes(area))
        else:
            wanted = bytearray(image)
            restore(wanted, linear.read(address, size), self._layout, components, xcr0)
            ctypes.memmove(ctypes.byref(image), bytes(wanted), len(wanted))
            vcpu.set_xsave(image)
        return self._advance(instruction.length)
