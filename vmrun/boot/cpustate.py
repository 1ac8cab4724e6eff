"""The state of the first CPU at a kernel's first instruction, as plain numbers. VMM process; nothing of KVM
in here.

`vmrun.machine` turns it into registers. Field names are those of the architecture (Intel SDM volume 3,
chapters 2 and 3).
"""

from dataclasses import dataclass

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESERVED = 1 << 1  # always set

_TYPE_CODE = 0xB  # execute/read, accessed
_TYPE_DATA = 0x3  # read/write, accessed
_TYPE_BUSY_TSS = 0xB


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register: selector and descriptor. `limit` is in bytes, whatever the granularity bit `g`
    says.
    """

    selector: int
    base: int
    limit: int
    type: int
    s: int  # 1: code or data, 0: system
    dpl: int
    present: int
    l: int  # 64-bit code  # noqa: E741
    db: int  # 32-bit
    g: int  # the limit counts pages

    def descriptor(self) -> int:
        """The 8 bytes in a GDT that load this segment, as a number."""
        limit = self.limit >> 12 if self.g else self.limit
        flags = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags |= limit >> 16 << 8 | self.l << 13 | self.db << 14 | self.g << 15
        return (
            limit & 0xFFFF
            | (self.base & 0xFFFFFF) << 16
            | (flags & 0xFFFF) << 40
            | (self.base >> 24 & 0xFF) << 56
        )


def flat_code(selector: int, *, long_mode: bool) -> Segment:
    return Segment(
        selector,
        0,
        0xFFFFFFFF,
        _TYPE_CODE,
        s=1,
        dpl=0,
        present=1,
        l=int(long_mode),
        db=int(not long_mode),
        g=1,
    )


def flat_data(selector: int) -> Segment:
    return Segment(selector, 0, 0xFFFFFFFF, _TYPE_DATA, s=1, dpl=0, present=1, l=0, db=1, g=1)


def task_state(selector: int) -> Segment:
    """An active TSS of the smallest size: VMX demands one, and so does the PVH protocol."""
    return Segment(selector, 0, 0x67, _TYPE_BUSY_TSS, s=0, dpl=0, present=1, l=0, db=0, g=0)


@dataclass(frozen=True, slots=True)
class CpuState:
    """Registers named here hold these values; all other general registers and the IDT's limit are 0.

    CS is `code`; DS, ES, FS, GS and SS are `data`; TR is `task`; there is no LDT. Interrupts are off.
    """

    rip: int
    rsp: int
    rsi: int
    rbx: int
    rflags: int
    long_mode: bool
    cr0: int
    cr3: int
    cr4: int
    efer: int
    gdt_address: int
    gdt_limit: int
    code: Segment
    data: Segment
    task: Segment
