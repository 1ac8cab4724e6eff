"""What SoftwareCpu does about an exit, with a vCPU that only remembers: right answers, and hostile guests.

A guest may bring any register, page table and code; what comes of it must be an exception in the guest or an
exit that is left to the caller, never one of ours.
"""

import struct
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmrun.kvm import Vcpu, abi
from vmrun.kvm.software.cpu import (
    CR0_MP,
    CR0_TS,
    CR4_OSXSAVE,
    EFER_LMA,
    GP_VECTOR,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSCALL_MASK,
    NM_VECTOR,
    PF_VECTOR,
    RFLAGS_IF,
    UD_VECTOR,
    SoftwareCpu,
)

RAM_SIZE = 1 << 20
CODE, STACK, IDT, AREA, ROOT = 0x8000, 0x9000, 0xA000, 0xC000, 0x1000
LSTAR, HANDLER = 0xFFFF_FFFF_8140_0040, 0xFFFF_FFFF_8140_0B00
KERNEL_CS, USER_CS = 0x10, 0x33
LAYOUT = {2: (576, 256), 5: (832, 64), 6: (896, 512), 7: (1408, 1024)}
FETCH_FAULT = 0x15
CF = 1


class FakeVcpu:
    """Registers, and what KVM was told. KVM refuses an LSTAR that is not canonical, and an MXCSR it does not
    know.
    """

    def __init__(self) -> None:
        self.sync = abi.kvm_sync_regs()
        self.debug = abi.kvm_run_debug()
        self.msr = abi.kvm_run_msr()
        self.emulation_failure = abi.kvm_run_emulation_failure()
        self.internal = abi.kvm_run_internal(suberror=abi.KVM_INTERNAL_ERROR_EMULATION)
        self.valid_regs = self.dirty_regs = type("Field", (), {"value": 0})()
        self.events = abi.kvm_vcpu_events()
        self.xsave = abi.kvm_xsave()
        self.xcr0 = 0xE7
        self.msrs = {MSR_STAR: 0x0023_0010 << 32, MSR_SYSCALL_MASK: 0x257FD5, MSR_LSTAR: 0}
        self.breakpoints: list[tuple[int, ...]] = []

    def set_msrs(self, values: dict[int, int]) -> None:
        if values[MSR_LSTAR] >> 47 not in (0, 0x1FFFF):
            raise OSError
        self.msrs |= values

    def get_msrs(self, indices: tuple[int, ...]) -> dict[int, int]:
        return {index: self.msrs[index] for index in indices}

    def set_guest_debug(self, control: int, breakpoints: tuple[int, ...] = (), dr7: int = 0) -> None:
        self.breakpoints.append(breakpoints)

    def get_events(self) -> abi.kvm_vcpu_events:
        return abi.kvm_vcpu_events()

    def set_events(self, events: abi.kvm_vcpu_events) -> None:
        self.events = events

    def get_xcr0(self) -> int:
        return self.xcr0

    def get_xsave(self) -> abi.kvm_xsave:
        return abi.kvm_xsave.from_buffer_copy(self.xsave)

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        self.xsave = abi.kvm_xsave.from_buffer_copy(xsave)


class Guest:
    """A helped vCPU in kernel mode at CODE, with the first MiB of RAM mapped at 0."""

    def __init__(self) -> None:
        self.ram = bytearray(RAM_SIZE)
        self.vcpu = FakeVcpu()
        leaves = [abi.kvm_cpuid_entry2(function=0xD, index=0, eax=0xE7)]
        leaves += [
            abi.kvm_cpuid_entry2(function=0xD, index=number, eax=size, ebx=offset)
            for number, (offset, size) in LAYOUT.items()
        ]
        self.cpu = SoftwareCpu(cast(Vcpu, self.vcpu), self.view, leaves)
        for level in range(3):
            struct.pack_into("<Q", self.ram, ROOT + 0x1000 * level, ROOT + 0x1000 * (level + 1) | 7)
        for page in range(256):
            struct.pack_into("<Q", self.ram, ROOT + 0x3000 + 8 * page, page << 12 | 3)
        self.regs, self.sregs = self.vcpu.sync.regs, self.vcpu.sync.sregs
        self.regs.rip, self.regs.rsp, self.regs.rflags = CODE, STACK, 2
        self.sregs.cr0, self.sregs.cr3, self.sregs.cr4 = 0x80010001, ROOT, CR4_OSXSAVE
        self.sregs.efer = EFER_LMA
        self.sregs.cs.selector, self.sregs.cs.l = KERNEL_CS, 1
        self.sregs.idt.base, self.sregs.idt.limit = IDT, 0xFFF
        gate = struct.pack(
            "<HHBBHII", HANDLER & 0xFFFF, KERNEL_CS, 0, 0x8E, HANDLER >> 16 & 0xFFFF, HANDLER >> 32, 0
        )
        self.ram[IDT + 16 * PF_VECTOR : IDT + 16 * PF_VECTOR + 16] = gate

    def view(self, gpa: int, size: int) -> memoryview | None:
        return memoryview(self.ram)[gpa : gpa + size] if gpa >= 0 and gpa + size <= RAM_SIZE else None

    def fail(self, code: str | bytes, fetched: int | None = None) -> bool:
        """The emulator gave up at `code`, of which it had fetched so many bytes."""
        data = bytes.fromhex(code) if isinstance(code, str) else code
        where = self.regs.rip
        self.ram[where : where + len(data)] = data
        failure = self.vcpu.emulation_failure
        failure.flags = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        failure.insn_size = min(len(data) if fetched is None else fetched, 15)
        for index, byte in enumerate(data[: failure.insn_size]):
            failure.insn_bytes[index] = byte
        return self.cpu.finish(abi.KVM_EXIT_INTERNAL_ERROR)

    def write_lstar(self, value: int) -> int:
        """The error that the WRMSR ends with."""
        self.vcpu.msr.index, self.vcpu.msr.data, self.vcpu.msr.error = MSR_LSTAR, value, 99
        assert self.cpu.finish(abi.KVM_EXIT_X86_WRMSR)
        return int(self.vcpu.msr.error)

    def reach_handler(self, *frame: int) -> None:
        """The breakpoint on the page-fault handler, with this frame: error code, RIP, CS, RFLAGS, RSP, SS."""
        self.regs.rip = HANDLER
        self.regs.rsp = STACK
        struct.pack_into("<6Q", self.ram, STACK, *frame)
        assert self.cpu.finish(abi.KVM_EXIT_DEBUG)

    @property
    def exception(self) -> tuple[int, int | None] | None:
        exception = self.vcpu.events.exception
        if not exception.injected:
            return None
        return exception.nr, exception.error_code if exception.has_error_code else None


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_system_call(guest: Guest) -> None:
    guest.write_lstar(LSTAR)
    assert guest.vcpu.breakpoints[-1] == (HANDLER,)
    guest.regs.rcx, guest.regs.r11 = 0x401000, RFLAGS_IF | CF | 2
    # The frame's flags have the host's mask applied.
    guest.reach_handler(FETCH_FAULT, LSTAR, USER_CS, 0x10002, 0x7FFF_0000_1000, 0x2B)
    assert (guest.regs.rip, guest.regs.rsp, guest.regs.rcx) == (LSTAR, 0x7FFF_0000_1000, 0x401000)
    assert guest.regs.r11 == RFLAGS_IF | CF | 2
    assert guest.regs.rflags == 2
    assert (guest.sregs.cs.selector, guest.sregs.cs.dpl, guest.sregs.cs.l) == (0x10, 0, 1)
    assert (guest.sregs.ss.selector, guest.sregs.ss.dpl) == (0x18, 0)
    assert guest.exception is None


def test_system_call_does_not_deliver_an_old_interrupt(guest: Guest) -> None:
    """KVM leaves a bit here when an exit cancels an interrupt, and delivers what is set with SREGS."""
    guest.write_lstar(LSTAR)
    guest.sregs.interrupt_bitmap[3] = 1 << 44
    guest.reach_handler(FETCH_FAULT, LSTAR, USER_CS, 0x10002, 0x7FFF_0000_1000, 0x2B)
    assert not any(guest.sregs.interrupt_bitmap)


def test_system_call_keeps_only_flags_that_programs_own(guest: Guest) -> None:
    guest.write_lstar(LSTAR)
    guest.regs.r11 = (1 << 64) - 1
    guest.reach_handler(FETCH_FAULT, LSTAR, USER_CS, 2, STACK, 0x2B)
    assert guest.regs.r11 == 0x244DD5 | RFLAGS_IF | 2
    assert not guest.regs.rflags & (RFLAGS_IF | 0x100 | 0x3000)


@pytest.mark.parametrize(
    "frame",
    [
        (FETCH_FAULT, LSTAR + 1, USER_CS, 2),  # elsewhere in the kernel
        (FETCH_FAULT, LSTAR, KERNEL_CS, 2),
        (FETCH_FAULT, LSTAR, 0x23, 2),  # 32-bit code
        (0x5, LSTAR, USER_CS, 2),  # no fetch
        (FETCH_FAULT, LSTAR, USER_CS, RFLAGS_IF | 2),  # a jump to LSTAR: no SYSCALL masked its flags
    ],
)
def test_true_page_faults_go_to_the_handler(guest: Guest, frame: tuple[int, ...]) -> None:
    guest.write_lstar(LSTAR)
    guest.reach_handler(*frame, STACK, 0x2B)
    assert guest.regs.rip == HANDLER  # a page that the walk cannot read: single-stepped
    assert guest.sregs.cs.selector == KERNEL_CS
    assert guest.vcpu.breakpoints[-1] == ()
    guest.cpu.finish(abi.KVM_EXIT_DEBUG)
    assert guest.vcpu.breakpoints[-1] == (HANDLER,)


def test_a_program_at_the_handler_faults(guest: Guest) -> None:
    """It brings a forged frame on its own stack."""
    guest.write_lstar(LSTAR)
    guest.sregs.cs.selector = USER_CS
    guest.reach_handler(FETCH_FAULT, LSTAR, USER_CS, 2, STACK, 0x2B)
    assert guest.exception == (PF_VECTOR, 0x14)
    assert (guest.sregs.cr2, guest.regs.rip) == (HANDLER, HANDLER)
    assert guest.sregs.cs.selector == USER_CS


@pytest.mark.parametrize("rsp", [0, 0x8FFC, RAM_SIZE - 8, 1 << 47, (1 << 64) - 1, (1 << 64) - 8, 0x9001])
def test_any_stack_at_the_handler(guest: Guest, rsp: int) -> None:
    guest.write_lstar(LSTAR)
    guest.regs.rip, guest.regs.rsp = HANDLER, rsp
    assert guest.cpu.finish(abi.KVM_EXIT_DEBUG)


def test_lstar_that_kvm_refuses(guest: Guest) -> None:
    assert guest.write_lstar(1 << 63) == 1
    assert guest.vcpu.breakpoints == []
    for _ in range(100):
        assert guest.write_lstar(LSTAR) == 0
    assert guest.vcpu.breakpoints == [(HANDLER,)]


@pytest.mark.parametrize(
    ("base", "limit"), [(0, 0), (IDT, 100), (1 << 47, 0xFFF), ((1 << 64) - 8, 0xFFF), (RAM_SIZE, 0xFFF)]
)
def test_idt_that_cannot_be_read(guest: Guest, base: int, limit: int) -> None:
    guest.sregs.idt.base, guest.sregs.idt.limit = base, limit
    assert guest.write_lstar(LSTAR) == 0
    assert guest.vcpu.breakpoints == []


def test_star_is_read_again_with_every_lstar(guest: Guest) -> None:
    guest.write_lstar(LSTAR)
    guest.reach_handler(FETCH_FAULT, LSTAR, USER_CS, 2, STACK, 0x2B)
    guest.vcpu.msrs[MSR_STAR] = 0x0043_0040 << 32
    guest.write_lstar(LSTAR)
    guest.reach_handler(FETCH_FAULT, LSTAR, 0x53, 2, STACK, 0x4B)
    assert guest.sregs.cs.selector == 0x40


@pytest.mark.parametrize(
    ("code", "value", "count"),
    [
        ("f3480fb8c7", 0xFFFF_0000_0000_0001, 17),  # popcnt rax, rdi
        ("f30fb8c7", 0xFFFF_0000_0000_0003, 2),  # popcnt eax, edi
        ("66f30fb8c7", 0xFFFF_0000_0001_0007, 0xAAAA_AAAA_AAAA_0003),  # popcnt ax, di
        ("f3480fb8042500c00000", 0xFF, 8),  # popcnt rax, [AREA]
        ("f3480fb8c7", 0, 0),
    ],
)
def test_popcnt(guest: Guest, code: str, value: int, count: int) -> None:
    guest.regs.rax, guest.regs.rdi = 0xAAAA_AAAA_AAAA_AAAA, value
    struct.pack_into("<Q", guest.ram, AREA, value)
    guest.regs.rflags = 0x8D7
    assert guest.fail(code)
    assert guest.regs.rax == count
    assert guest.regs.rflags == (2 if value else 0x42)
    assert guest.regs.rip == CODE + len(bytes.fromhex(code))


@pytest.mark.parametrize(
    ("code", "exception", "advance"),
    [
        ("cc", (3, None), 1),
        ("0f0b", (UD_VECTOR, None), 0),
        ("0fb9c0", (UD_VECTOR, None), 0),
        ("0fff", (UD_VECTOR, None), 0),
    ],
)
def test_instructions_that_are_exceptions(
    guest: Guest, code: str, exception: tuple[int, int | None], advance: int
) -> None:
    assert guest.fail(code)
    assert guest.exception == exception
    assert guest.regs.rip == CODE + advance


def test_an_instruction_across_two_pages(guest: Guest) -> None:
    """The emulator gives up at the opcode, before it fetches the rest from the next page."""
    guest.regs.rip = CODE + 0x1000 - 4
    assert guest.fail("f3480fb8042500c00000", fetched=4)
    assert guest.regs.rip == CODE + 0x1000 + 6


def test_xsave_and_xrstor(guest: Guest) -> None:
    header = memoryview(guest.vcpu.xsave).cast("B")
    header[160:416] = b"\x77" * 256
    header[24:32] = struct.pack("<II", 0x1F80, 0xFFFF)
    header[512] = 3
    guest.regs.rax, guest.regs.rdx, guest.regs.rdi = 0xFFFFFFFF, 0xFFFFFFFF, AREA
    assert guest.fail("480fae27")  # xsave64 [rdi]
    assert guest.exception is None and guest.regs.rip == CODE + 4
    assert guest.ram[AREA + 160 : AREA + 416] == b"\x77" * 256 and guest.ram[AREA + 512] == 3
    guest.ram[AREA + 160] = 0x11
    assert guest.fail("480fae2f")  # xrstor64 [rdi]
    assert guest.exception is None and guest.regs.rip == CODE + 8
    assert bytes(guest.vcpu.xsave)[160:162] == b"\x11\x77"


@pytest.mark.parametrize("code", ["480fae27", "480fae2f"])
@pytest.mark.parametrize(
    ("address", "exception", "cr2"),
    [
        (AREA + 8, (GP_VECTOR, 0), 0),
        (1 << 47, (GP_VECTOR, 0), 0),
        (0x8000_0000_0000_0000, (GP_VECTOR, 0), 0),
        (RAM_SIZE - 576, (PF_VECTOR, 0), RAM_SIZE),  # the second page is missing
        (RAM_SIZE, (PF_VECTOR, 0), RAM_SIZE),
    ],
)
def test_areas_out_of_reach(
    guest: Guest, code: str, address: int, exception: tuple[int, int], cr2: int
) -> None:
    guest.regs.rax, guest.regs.rdi = 0xFF, address
    assert guest.fail(code)
    assert guest.exception == exception
    assert (guest.sregs.cr2, guest.regs.rip) == (cr2, CODE)


def test_xsave_to_a_page_that_may_not_be_written(guest: Guest) -> None:
    struct.pack_into("<Q", guest.ram, ROOT + 0x3000 + 8 * (AREA >> 12), AREA | 1)
    before = bytes(guest.ram[AREA : AREA + 4096])
    guest.regs.rax, guest.regs.rdi = 7, AREA
    assert guest.fail("480fae27")
    assert guest.exception == (PF_VECTOR, 3) and guest.sregs.cr2 == AREA
    assert guest.ram[AREA : AREA + 4096] == before


def test_xrstor_of_a_malformed_area(guest: Guest) -> None:
    guest.ram[AREA + 512 + 7] = 0x80
    guest.regs.rax, guest.regs.rdi = 7, AREA
    assert guest.fail("480fae2f")
    assert guest.exception == (GP_VECTOR, 0)


@pytest.mark.parametrize("code", ["480fae27", "480fae2f", "9b", "0f01d0"])
def test_not_enabled(guest: Guest, code: str) -> None:
    guest.regs.rdi = AREA
    guest.sregs.cr4 = 0
    assert guest.fail(code)
    assert guest.exception == (None if code == "9b" else (UD_VECTOR, None))


@pytest.mark.parametrize("code", ["480fae27", "480fae2f", "9b"])
def test_task_switched(guest: Guest, code: str) -> None:
    guest.regs.rdi = AREA
    guest.sregs.cr0 |= CR0_TS | CR0_MP
    assert guest.fail(code)
    assert guest.exception == (NM_VECTOR, None)


def test_xgetbv(guest: Guest) -> None:
    guest.regs.rcx = 0xFFFF_FFFF_0000_0000
    assert guest.fail("0f01d0")
    assert (guest.regs.rax, guest.regs.rdx, guest.regs.rip) == (0xE7, 0, CODE + 3)
    guest.regs.rcx = 1
    assert guest.fail("0f01d0")
    assert guest.exception == (GP_VECTOR, 0)


@pytest.mark.parametrize("code", ["0faee8", "f30fae27", "660fae27", "0f01f8", "0fa2", "f20fb8c0", "660fae37"])
def test_other_instructions_are_left_to_the_caller(guest: Guest, code: str) -> None:
    assert not guest.fail(code)
    assert guest.exception is None and guest.regs.rip == CODE


@pytest.mark.parametrize(
    ("selector", "descriptor", "limit"),
    [
        (0x0B, 0x0040F50000000ABC, 0xABC),
        (0x0B, 0x00C0F50000000ABC, 0xABCFFF),
        (0x0B, 0x004FF5000000FFFF, 0xFFFFF),
        (0x0B, 0x0000890000000067, None),  # the selector's level is above the segment's
        (0x08, 0x0000890000000067, 0x67),
        (0x08, 0x00008E0000000067, None),  # a gate has no limit
        (0x0C, 0x0040F50000000ABC, None),  # no LDT
        (0x10, 0x0040F50000000ABC, None),  # behind the table
        (0x00, 0x0040F50000000ABC, None),
    ],
)
def test_lsl(guest: Guest, selector: int, descriptor: int, limit: int | None) -> None:
    guest.sregs.gdt.base, guest.sregs.gdt.limit = AREA, 15
    guest.sregs.ldt.unusable, guest.sregs.ldt.limit = 1, 0xFFFF
    struct.pack_into("<Q", guest.ram, AREA + 8, descriptor)
    guest.regs.rax = 0xFFFF_0000_0000_0000 | selector
    guest.regs.rflags = 0x46 if limit is None else 0x6
    assert guest.fail("480f03c0")  # lsl rax, eax
    assert guest.regs.rax == (0xFFFF_0000_0000_0000 | selector if limit is None else limit)
    assert guest.regs.rflags == (0x6 if limit is None else 0x46)


def test_a_program_cannot_end_the_machine(guest: Guest) -> None:
    guest.sregs.cs.selector = USER_CS
    assert guest.fail("0fa2")
    assert guest.exception == (UD_VECTOR, None)


def test_code_that_is_not_64_bit(guest: Guest) -> None:
    guest.sregs.cs.l = 0
    assert not guest.fail("f30fb8c7")


OPCODES = st.sampled_from(
    ["0fae", "480fae", "f30fb8", "f3480fb8", "cc", "9b", "0f01", "0f0b", "65480fae", "0f38"]
)
NUMBERS = st.integers(0, (1 << 64) - 1) | st.sampled_from(
    [AREA, AREA + 0xF80, RAM_SIZE - 64, 1 << 47, (1 << 64) - 64]
)


@settings(max_examples=300, deadline=None)
@given(
    opcode=OPCODES,
    rest=st.binary(max_size=12),
    numbers=st.lists(NUMBERS, min_size=6, max_size=6),
    area=st.binary(min_size=64, max_size=64),
    cr3=st.sampled_from([ROOT, 0, RAM_SIZE, (1 << 64) - 1]),
    gs=NUMBERS,
)
def test_no_guest_makes_us_raise(
    opcode: str, rest: bytes, numbers: list[int], area: bytes, cr3: int, gs: int
) -> None:
    guest = Guest()
    for name, number in zip(("rax", "rdx", "rdi", "rsi", "rbp", "rsp"), numbers, strict=True):
        setattr(guest.regs, name, number)
    guest.ram[AREA + 512 : AREA + 576] = area
    guest.sregs.cr3, guest.sregs.gs.base = cr3, gs
    guest.fail(bytes.fromhex(opcode) + rest)
    assert len(guest.ram) == RAM_SIZE
    guest.regs.rip = HANDLER
    guest.write_lstar(numbers[0])
    assert guest.cpu.finish(abi.KVM_EXIT_DEBUG)
