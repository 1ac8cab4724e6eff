"""SYSCALL in a program's 32-bit code: KVM's emulator enters the kernel at the lower half of CSTAR, in kernel
mode, on the program's stack. The program must get #UD, and the kernel must live.
"""

import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.kvm.conftest import DIRECTORIES, PDPT, PML4
from tests.kvm.test_state import DONE, SOFTWARE, USER, Machine, machines
from vmrun.kvm import abi

__all__ = ["machines"]

pytestmark = pytest.mark.skipif(not SOFTWARE, reason="this KVM has VMX or SVM")

LOW_DIRECTORY = 0x1A000
# The kernel's entry is at the top of the address space; nothing is mapped at its lower half.
KERNEL = f"""
    mov ecx, 0xC0000081; mov edx, 0x00200010; xor eax, eax; wrmsr
    mov ecx, 0xC0000084; xor edx, edx; mov eax, 0x47700; wrmsr
    mov edx, 0xFFFFFFFF
    mov ecx, 0xC0000083; lea eax, entry[rip]; or eax, 0x80000000; wrmsr
    mov ecx, 0xC0000082; lea eax, entry[rip]; or eax, 0x80000000; wrmsr
    mov ecx, 0xC0000080; rdmsr; or eax, 0x801; wrmsr
    push 0x2B; push 0x300000; push 0x246; push 0x23; push {USER}
    iretq
entry:
    out 0x11, al
.global fault, undefined
undefined:
    mov rbx, [rsp]               # RIP
    mov rsi, [rsp + 8]           # CS
    mov rbp, [rsp + 16]          # RFLAGS
    add qword ptr [rsp], 2
    out 0x10, al
    iretq
fault:
    nop
    out 0x12, al
"""


@pytest.mark.parametrize("moved", [False, True])
def test_the_program_gets_an_exception(
    machines: Callable[..., Machine],
    assemble: Callable[..., Any],
    moved: bool,
) -> None:
    kernel = assemble(KERNEL)
    user = assemble(
        f".code32; nop; syscall; mov edx, 5; syscall; mov edi, {DONE}; mov [edi], edx; .code64", address=USER
    )
    machine = machines()
    machine.load_with_user(kernel, {6: "undefined", 14: "fault"})
    struct.pack_into("<Q", machine.ram, PML4 + 8 * 511, PDPT | 3)
    struct.pack_into("<Q", machine.ram, PDPT + 8 * 510, DIRECTORIES | 3)
    machine.ram[USER : USER + len(user.code)] = user.code
    for offset in (1, 8):
        machine.go_to_port(0x10)
        regs = machine.vcpu.get_regs()
        assert (regs.rbx, regs.rsi) == (USER + offset, 0x23)
        assert regs.rbp & 0x244 == 0x244
        if moved:
            machine.settle()
            machine = machines(machine)
    assert machine.go() == abi.KVM_EXIT_MMIO
    assert machine.vcpu.get_regs().rdx == 5
    assert machine.vcpu.get_sregs().cs.selector == 0x23


def test_a_program_with_code_at_that_address(
    machines: Callable[..., Machine], assemble: Callable[..., Any]
) -> None:
    """It runs, in 64-bit code, where SYSCALL of 32-bit code would enter."""
    kernel = assemble(KERNEL.replace("push 0x23", "push 0x33"))
    low = kernel.labels["entry"] | 0x80000000
    user = assemble(f"mov ebx, {low}; mov edx, 7; mov edi, {DONE}; jmp rbx", address=USER)
    machine = machines()
    machine.load_with_user(kernel, {6: "undefined", 14: "fault"})
    struct.pack_into("<Q", machine.ram, PML4 + 8 * 511, PDPT | 3)
    struct.pack_into("<Q", machine.ram, PDPT + 8 * 510, DIRECTORIES | 3)
    struct.pack_into("<Q", machine.ram, PDPT + 8 * 2, LOW_DIRECTORY | 7)
    struct.pack_into("<Q", machine.ram, LOW_DIRECTORY, USER | 0x87)
    machine.ram[USER : USER + len(user.code)] = user.code
    there = USER + low % 0x200000
    machine.ram[there : there + 2] = b"\x89\x17"  # mov [rdi], edx: KVM emulates it, and meets the breakpoint
    assert machine.go() == abi.KVM_EXIT_MMIO
    assert machine.vcpu.mmio.data[0] == 7
