"""One vCPU on a KVM without VMX or SVM: the exits that ask for help, and the help. vCPU threads.

Three things come here:

* KVM_EXIT_INTERNAL_ERROR, emulation: kernel-mode code met an instruction that the emulator does not know.
* KVM_EXIT_X86_WRMSR: the guest set LSTAR or CSTAR, the addresses its system calls enter at (we asked for
  this exit).
* KVM_EXIT_DEBUG: the guest reached a place where we keep a hardware breakpoint. One is its page-fault
  handler: a SYSCALL in user mode jumps to LSTAR without leaving user mode, faults on the fetch, and arrives
  here; we finish it. A true page fault is let through. The other is where KVM lets a SYSCALL of 32-bit code
  enter: the lower half of CSTAR, in kernel mode and on the program's stack, which would be the kernel's end.
  The program gets #UD, as from Intel's processors.

The guest's own hardware breakpoints do not work meanwhile.

The guest may bring any register, page table or code here. What a processor would answer with an exception
becomes that exception in the guest.
"""

import ctypes
from struct import Struct
from typing import Any

from vmrun.kvm import abi
from vmrun.kvm.packing import check_keys, check_number
from vmrun.kvm.software.decode import Instruction
from vmrun.kvm.software.features import xsave_layout
from vmrun.kvm.software.paging import (
    FAULT_FETCH,
    FAULT_PRESENT,
    FAULT_USER,
    LinearMemory,
    NotCanonical,
    PageFault,
    PhysicalView,
)
from vmrun.kvm.software.xsave import MalformedArea, area_size, restore, save
from vmrun.kvm.vcpu import Vcpu
from vmrun.kvm.vm import Vm

MSR_STAR = 0xC0000081
MSR_LSTAR = 0xC0000082
MSR_CSTAR = 0xC0000083
MSR_SYSCALL_MASK = 0xC0000084

BP_VECTOR, UD_VECTOR, NM_VECTOR, GP_VECTOR, PF_VECTOR = 3, 6, 7, 13, 14

CR0_MP, CR0_TS = 1 << 1, 1 << 3
CR4_OSXSAVE = 1 << 18
EFER_LMA = 1 << 10

RFLAGS_CF_PF_AF_ZF_SF_OF = 0x8D5
RFLAGS_ZF = 1 << 6
RFLAGS_IF = 1 << 9
RFLAGS_AC = 1 << 18
# What user mode can change (CF, PF, AF, ZF, SF, TF, DF, OF, NT, AC, ID) of RFLAGS.
RFLAGS_USER = 0x244DD5

_FRAME = Struct("<6Q")  # what #PF pushes: error code, RIP, CS, RFLAGS, RSP, SS
_DR7_FIRST = 0x401  # DR0 enabled, as an instruction breakpoint
_DR7_BOTH = 0x405  # and DR1
_MASK64 = (1 << 64) - 1
_SYSCALL_SIZE = 2
_LONGEST_INSTRUCTION = 15
_SYSTEM_SEGMENTS_WITH_LIMIT = (2, 9, 11)  # LDT, and TSS free and busy


class InstructionFault(Exception):
    """The instruction raises exception `vector` in the guest. `error_code` is None where there is none."""

    def __init__(self, vector: int, error_code: int | None = None) -> None:
        super().__init__(f"exception {vector}")
        self.vector = vector
        self.error_code = error_code


def prepare_vm(vm: Vm) -> None:
    """Ask KVM for the exits that `SoftwareCpu` lives on. Before the first vCPU."""
    vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
    vm.filter_msr_writes(MSR_LSTAR, 2)  # and CSTAR


class SoftwareCpu:
    """Helps one vCPU. `view` gives guest-physical RAM; `cpuid` are the leaves the vCPU was given."""

    def __init__(self, vcpu: Vcpu, view: PhysicalView, cpuid: list[abi.kvm_cpuid_entry2]) -> None:
        self._vcpu = vcpu
        self._view = view
        _, self._layout = xsave_layout(cpuid)
        self._lstar = 0
        self._cstar = 0
        self._star = 0
        self._syscall_mask = 0
        self._fault_handler = 0
        self._stepping = False
        self._after_int3: int | None = None  # RIP, when the last exit was one
        self.counts: dict[str, int] = {}
        # Every exit brings the registers along in the shared page: two system calls less for each.
        vcpu.valid_regs.value = abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS
        self._instructions = {
            0xCC: self._int3,
            0x9B: self._fwait,
            0x0F01: self._group7,
            0x0F03: self._lsl,
            0x0F0B: self._undefined,
            0x0FAE: self._group15,
            0x0FB8: self._popcnt,
            0x0FB9: self._undefined,
            0x0FFF: self._undefined,
        }

    def finish(self, reason: int) -> bool:
        """Deal with exit `reason` when it is one of ours; False leaves it to the caller, untouched."""
        self._after_int3 = None
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

    def save(self) -> dict[str, Any]:
        """What is neither in the registers nor in KVM, JSON-able. The vCPU was last left with
        KVM_EXIT_INTR.
        """
        return {
            "lstar": self._lstar,
            "cstar": self._cstar,
            "fault_handler": self._fault_handler,
            "int3": self._int3_is_pending(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put it into the helper of a vCPU that was loaded before. Raises ValueError."""
        check_keys(state, ("lstar", "cstar", "fault_handler", "int3"))
        self._lstar = check_number(state["lstar"], "lstar", 64)
        self._cstar = check_number(state["cstar"], "cstar", 64)
        self._fault_handler = check_number(state["fault_handler"], "fault_handler", 64)
        self._star = 0
        if type(state["int3"]) is not bool:
            raise ValueError("int3 in the saved state is not true or false")
        if self._fault_handler:
            self._arm()  # was it being stepped over, it is met again
        if state["int3"]:
            self._raise(BP_VECTOR)

    def _int3_is_pending(self) -> bool:
        """#BP was given to KVM, and the guest not entered since: KVM_GET_VCPU_EVENTS does not tell of it."""
        vcpu = self._vcpu
        return self._after_int3 == vcpu.get_regs().rip and vcpu.header.exit_reason == (
            abi.KVM_EXIT_INTERNAL_ERROR
        )

    def _changed(self, fields: int = abi.KVM_SYNC_X86_REGS) -> None:
        if fields & abi.KVM_SYNC_X86_SREGS:
            # KVM sets a bit here at an exit that came between choosing an interrupt and delivering it, never
            # clears it in this shared copy, and takes it for an interrupt to deliver, whatever RFLAGS.IF
            # says.
            self._vcpu.sync.sregs.interrupt_bitmap[:] = [0, 0, 0, 0]
        self._vcpu.dirty_regs.value |= fields

    def _linear(self) -> LinearMemory:
        sregs = self._vcpu.sync.sregs
        return LinearMemory(self._view, sregs.cr0, sregs.cr3, sregs.cr4)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # System calls and page faults

    def _wrmsr(self) -> bool:
        request = self._vcpu.msr
        if request.index not in (MSR_LSTAR, MSR_CSTAR):
            return False
        try:
            self._vcpu.set_msrs({request.index: request.data})
        except OSError:
            request.error = 1  # not a canonical address: KVM raises #GP
            return True
        request.error = 0
        if request.index == MSR_CSTAR:
            self._cstar = request.data
            if self._fault_handler:
                self._arm()
            return True
        self._lstar = request.data
        self._star = 0  # read again: a kernel sets all of these together
        self._find_fault_handler()
        return True

    def _find_fault_handler(self) -> None:
        """Put the breakpoint on the guest's page-fault handler, as its interrupt table names it now."""
        sregs = self._vcpu.sync.sregs
        idt = sregs.idt
        if not self._lstar or not sregs.efer & EFER_LMA or idt.limit < 16 * PF_VECTOR + 15:
            return
        try:
            gate = self._linear().read(idt.base + 16 * PF_VECTOR, 16)
        except (PageFault, NotCanonical):
            return
        handler = int.from_bytes(gate[0:2] + gate[6:8] + gate[8:12], "little")
        if handler != self._fault_handler:
            self._fault_handler = handler
            self._arm()

    def _arm(self) -> None:
        self._stepping = False
        control = abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP
        if self._cstar >> 32:
            places = (self._fault_handler, self._cstar & 0xFFFFFFFF)
            self._vcpu.set_guest_debug(control, places, _DR7_BOTH)
        else:
            self._vcpu.set_guest_debug(control, (self._fault_handler,), _DR7_FIRST)

    def _step(self) -> None:
        self._stepping = True
        self._vcpu.set_guest_debug(abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP)

    def _debug(self) -> None:
        if self._stepping:
            self._arm()
            return
        sync = self._vcpu.sync
        regs = sync.regs
        linear = self._linear()
        if self._cstar >> 32 and regs.rip == self._cstar & 0xFFFFFFFF:
            self._refuse_system_call()
            return
        if sync.sregs.cs.selector & 3:
            # A program jumped to the handler itself, and its stack may hold any frame it likes.
            self._raise_page_fault(regs.rip, self._fetch_fault(linear, regs.rip))
            return
        try:
            error_code, rip, cs, rflags, rsp, _ss = _FRAME.unpack(linear.read(regs.rsp, _FRAME.size))
        except (PageFault, NotCanonical):
            self._pass_breakpoint(linear)  # a broken guest: its own double fault is next
            return
        # The host's SYSCALL mask left RFLAGS.IF clear. A program that only jumps to LSTAR has it set.
        half_done = rip == self._lstar and cs == self._user_code_selector() and not rflags & RFLAGS_IF
        if not half_done or not error_code & FAULT_FETCH or not error_code & FAULT_USER:
            self._count("page fault")
            self._pass_breakpoint(linear)
            return
        self._count("system call")
        # SYSCALL loaded RCX and R11 natively. The RFLAGS pushed have the host's mask applied, so R11 alone
        # tells the program's; interrupts were enabled there, as a program cannot change that.
        regs.r11 = regs.r11 & RFLAGS_USER | RFLAGS_IF | 2
        regs.rflags = regs.r11 & ~self._syscall_mask | 2
        regs.rip = rip
        regs.rsp = rsp
        self._enter_kernel_segments()
        self._changed(abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS)

    def _refuse_system_call(self) -> None:
        """#UD for a SYSCALL in 32-bit code, from which KVM entered the guest's kernel already. Which segments
        the code had is not known; it gets those that SYSRET would give it.
        """
        regs, sregs = self._vcpu.sync.regs, self._vcpu.sync.sregs
        if sregs.cs.selector & 3:
            self._step()  # a program whose own code is at that address
            return
        self._count("32-bit system call")
        self._read_syscall_msrs()
        selector = self._star >> 48 & 0xFFFC | 3
        _set_flat_segment(sregs.cs, selector, 11, privilege=3)
        _set_flat_segment(sregs.ss, selector + 8 & 0xFFFF, 3, privilege=3)
        regs.rip = regs.rcx - _SYSCALL_SIZE & 0xFFFFFFFF
        regs.rflags = regs.r11 & RFLAGS_USER | RFLAGS_IF | 2
        self._changed(abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS)
        self._raise(UD_VECTOR)

    def _enter_kernel_segments(self) -> None:
        """CS and SS as SYSCALL loads them: fixed descriptors, only the selectors come from STAR."""
        selector = self._star >> 32 & 0xFFFC
        sregs = self._vcpu.sync.sregs
        _set_flat_segment(sregs.cs, selector, 11, privilege=0)
        _set_flat_segment(sregs.ss, selector + 8 & 0xFFFF, 3, privilege=0)
        sregs.cs.l, sregs.cs.db = 1, 0

    def _fetch_fault(self, linear: LinearMemory, address: int) -> int:
        """The error code of a user-mode fetch from a page of the kernel."""
        try:
            linear.read(address, 1)
        except (PageFault, NotCanonical):
            return FAULT_FETCH | FAULT_USER
        return FAULT_FETCH | FAULT_USER | FAULT_PRESENT

    def _user_code_selector(self) -> int:
        """The CS that SYSRET returns to in 64-bit mode. SYSCALL from 32-bit code does not enter at LSTAR."""
        if not self._star:
            self._read_syscall_msrs()
        return (self._star >> 48) + 16 & 0xFFFF | 3

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
        except (PageFault, NotCanonical):
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
            self._step()
            return
        self._changed()

    # Instructions

    def _emulation_failure(self) -> bool:
        sregs = self._vcpu.sync.sregs
        if sregs.cs.selector & 3:
            # A program made KVM emulate something (an access to a device, say): its fault, not the machine's.
            self._raise(UD_VECTOR)
            return True
        if not sregs.cs.l:
            return False
        try:
            instruction = Instruction(self._instruction_bytes())
            perform = self._instructions.get(instruction.opcode)
            if perform is None or not perform(instruction):
                return False
        except IndexError:
            return False
        except PageFault as fault:
            self._raise_page_fault(fault.address, fault.error_code)
            return True
        except (MalformedArea, NotCanonical):
            self._raise(GP_VECTOR, 0)
            return True
        except InstructionFault as fault:
            self._raise(fault.vector, fault.error_code)
            return True
        self._count(f"{instruction.opcode:x}/{instruction.reg}")
        return True

    def _instruction_bytes(self) -> bytes:
        """What KVM fetched, and what it did not because it gave up before a page's end."""
        failure = self._vcpu.emulation_failure
        fetched = b""
        if failure.flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            fetched = bytes(failure.insn_bytes[: min(failure.insn_size, _LONGEST_INSTRUCTION)])
        rip = self._vcpu.sync.regs.rip
        missing = min(_LONGEST_INSTRUCTION - len(fetched), 4096 - (rip + len(fetched)) % 4096)
        try:
            return fetched + self._linear().read(rip + len(fetched) & _MASK64, missing)
        except (PageFault, NotCanonical):
            return fetched

    def _raise_page_fault(self, address: int, error_code: int) -> None:
        self._vcpu.sync.sregs.cr2 = address
        self._changed(abi.KVM_SYNC_X86_SREGS)
        self._raise(PF_VECTOR, error_code)

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
        self._advance(instruction.length)
        self._after_int3 = self._vcpu.sync.regs.rip
        return True

    def _undefined(self, instruction: Instruction) -> bool:
        """UD0, UD1 and UD2, by which kernels mark a bug or a warning and look for more at that address."""
        raise InstructionFault(UD_VECTOR)

    def _fwait(self, instruction: Instruction) -> bool:
        if self._vcpu.sync.sregs.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS:
            raise InstructionFault(NM_VECTOR)
        return self._advance(instruction.length)

    def _group7(self, instruction: Instruction) -> bool:
        regs = self._vcpu.sync.regs
        if instruction.modrm == 0xCA:  # clac
            regs.rflags &= ~RFLAGS_AC
        elif instruction.modrm == 0xCB:  # stac
            regs.rflags |= RFLAGS_AC
        elif instruction.modrm == 0xD0:  # xgetbv
            if not self._vcpu.sync.sregs.cr4 & CR4_OSXSAVE:
                raise InstructionFault(UD_VECTOR)
            if regs.rcx & 0xFFFFFFFF:
                raise InstructionFault(GP_VECTOR, 0)
            xcr0 = self._vcpu.get_xcr0()
            regs.rax, regs.rdx = xcr0 & 0xFFFFFFFF, xcr0 >> 32
        else:
            return False
        return self._advance(instruction.length + 1)

    def _lsl(self, instruction: Instruction) -> bool:
        """LSL: Linux keeps the CPU's number in a segment's limit, and reads it on entry from an NMI."""
        regs, sregs = self._vcpu.sync.regs, self._vcpu.sync.sregs
        linear = self._linear()
        if instruction.in_memory:
            address = instruction.address(regs, sregs)
            selector = int.from_bytes(linear.read(address, 2), "little")
        else:
            selector = getattr(regs, instruction.register_operand()) & 0xFFFF
        limit = self._segment_limit(linear, selector)
        regs.rflags &= ~RFLAGS_ZF
        if limit is not None:
            regs.rflags |= RFLAGS_ZF
            if instruction.operand_size_16 and not instruction.wide:
                limit = limit & 0xFFFF | getattr(regs, instruction.register) & ~0xFFFF
            setattr(regs, instruction.register, limit)
        return self._advance(instruction.length)

    def _segment_limit(self, linear: LinearMemory, selector: int) -> int | None:
        """The limit in bytes of a segment in the GDT or LDT that the kernel may look at, or None."""
        sregs = self._vcpu.sync.sregs
        table = sregs.ldt if selector & 4 else sregs.gdt
        offset = selector & ~7
        if offset + 7 > table.limit or not selector & ~3 or (selector & 4 and sregs.ldt.unusable):
            return None
        descriptor = int.from_bytes(linear.read(table.base + offset & _MASK64, 8), "little")
        kind, level = descriptor >> 40 & 0x1F, descriptor >> 45 & 3
        if not kind & 0x10 and kind not in _SYSTEM_SEGMENTS_WITH_LIMIT:
            return None
        if selector & 3 > level and kind & 0x1C != 0x1C:  # a conforming code segment has no such rule
            return None
        limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
        return limit << 12 | 0xFFF if descriptor >> 55 & 1 else limit

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
        prefixed = instruction.repeat or instruction.operand_size_16
        if not instruction.in_memory or prefixed or instruction.reg not in (4, 5):
            return False
        vcpu, sync = self._vcpu, self._vcpu.sync
        if not sync.sregs.cr4 & CR4_OSXSAVE:
            raise InstructionFault(UD_VECTOR)
        if sync.sregs.cr0 & CR0_TS:
            raise InstructionFault(NM_VECTOR)
        regs = sync.regs
        address = instruction.address(regs, sync.sregs)
        if address % 64:
            raise MalformedArea
        xcr0 = vcpu.get_xcr0()
        components = ((regs.rdx & 0xFFFFFFFF) << 32 | regs.rax & 0xFFFFFFFF) & xcr0
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


def _set_flat_segment(segment: abi.kvm_segment, selector: int, kind: int, *, privilege: int) -> None:
    """A 32-bit segment of 4 GiB, of type `kind`."""
    segment.selector, segment.type, segment.dpl = selector, kind, privilege
    segment.base, segment.limit, segment.g = 0, 0xFFFFFFFF, 1
    segment.present, segment.s, segment.unusable = 1, 1, 0
    segment.l, segment.db = 0, 1
