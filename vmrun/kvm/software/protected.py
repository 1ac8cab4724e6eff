"""IRET in 32-bit protected mode, which KVM's emulator knows in real mode only (SDM volume 2, IRET/IRETD).

iPXE takes interrupts there, with neither paging nor privilege levels. That is all that is done here: a return
within CPL 0, segments from the GDT, linear addresses being physical ones. A guest that does something else
with IRET stops, as it would without this.
"""

from struct import Struct

from vmrun.kvm import abi
from vmrun.kvm.software.paging import PhysicalView

IRET = 0xCF

_CR0_PE, _CR0_PG = 1 << 0, 1 << 31
_RFLAGS_NT, _RFLAGS_VM = 1 << 14, 1 << 17
_RFLAGS_LOADED = 0x3D7FD5  # all that CPL 0 may change, without VM
_RFLAGS_RESERVED = 1 << 1
_MASK32 = 0xFFFFFFFF
_CODE = 0x18  # S and the type's code bit; conforming or not is the same within one level
_FRAME = Struct("<III")  # EIP, CS, EFLAGS


def interrupt_return(regs: abi.kvm_regs, sregs: abi.kvm_sregs, view: PhysicalView) -> bool:
    """Carry out IRET on `regs` and `sregs`; False, and nothing changed, for what is not done here."""
    cs = sregs.cs
    flat = sregs.cr0 & (_CR0_PE | _CR0_PG) == _CR0_PE and not regs.rflags & (_RFLAGS_NT | _RFLAGS_VM)
    if not flat or not cs.db or not sregs.ss.db or cs.selector & 3:
        return False
    stack = view(sregs.ss.base + regs.rsp & _MASK32, _FRAME.size)
    if stack is None:
        return False
    rip, selector, rflags = _FRAME.unpack(stack)
    offset = selector & 0xFFF8
    if rflags & _RFLAGS_VM or selector & 7 or not offset or offset + 7 > sregs.gdt.limit:
        return False
    entry = view(sregs.gdt.base + offset & _MASK32, 8)
    if entry is None:
        return False
    descriptor = int.from_bytes(entry, "little")
    kind, level, present = descriptor >> 40 & 0x1F, descriptor >> 45 & 3, descriptor >> 47 & 1
    granular = descriptor >> 55 & 1
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    if granular:
        limit = limit << 12 | 0xFFF
    if kind & _CODE != _CODE or level or not present or rip > limit:
        return False
    cs.selector = selector & 0xFFFF
    cs.base = descriptor >> 16 & 0xFFFFFF | descriptor >> 32 & 0xFF000000
    cs.limit, cs.g = limit, granular
    cs.type, cs.s, cs.dpl, cs.present, cs.unusable = kind & 0xF | 1, 1, 0, 1, 0
    cs.avl, cs.l, cs.db = descriptor >> 52 & 1, 0, descriptor >> 54 & 1
    regs.rip = rip
    regs.rsp = regs.rsp + _FRAME.size & _MASK32
    regs.rflags = rflags & _RFLAGS_LOADED | _RFLAGS_RESERVED
    return True
