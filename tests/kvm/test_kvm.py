"""vmrun.kvm against the real /dev/kvm: exits, eventfds, interrupts, kicks. Nothing of vmrun but the
bindings.
"""

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vmrun.kvm import abi
from vmrun.kvm.vm import default_routes, msi_route

ENABLE_APIC = """
    mov edi, 0xFEE000F0
    mov dword ptr [rdi], 0x1FF
"""
ACKNOWLEDGE = """
    mov edi, 0xFEE000B0
    mov dword ptr [rdi], 0
"""


def test_port_output_and_input(tiny: Any, assemble: Callable[[str], Any]) -> None:
    tiny.load(assemble("mov al, 0x42; out 0x10, al; in eax, 0x14; mov ebx, eax; out 0x10, al"))
    assert tiny.run_to_port(0x10) == b"\x42"
    assert tiny.vcpu.run() == abi.KVM_EXIT_IO
    io = tiny.vcpu.io
    assert (io.direction, io.port, io.size) == (abi.KVM_EXIT_IO_IN, 0x14, 4)
    memoryview(tiny.vcpu.page)[io.data_offset : io.data_offset + 4] = (0xCAFE1234).to_bytes(4, "little")
    assert tiny.run_to_port(0x10) == b"\x34"
    assert tiny.vcpu.get_regs().rbx == 0xCAFE1234


def test_string_output_comes_in_bunches(tiny: Any, assemble: Callable[[str], Any]) -> None:
    program = assemble(
        'lea rsi, text[rip]; mov ecx, 5; mov dx, 0x3F8; rep outsb; out 0x10, al; text: .ascii "hello"'
    )
    tiny.load(program)
    said = b""
    while tiny.vcpu.run() == abi.KVM_EXIT_IO and tiny.vcpu.io.port == 0x3F8:
        io = tiny.vcpu.io
        said += bytes(memoryview(tiny.vcpu.page)[io.data_offset : io.data_offset + io.size * io.count])
    assert said == b"hello"


def test_memory_mapped_registers(tiny: Any, assemble: Callable[[str], Any]) -> None:
    tiny.load(assemble("mov edi, 0xC0000010; mov dword ptr [rdi], 0x11223344; mov bx, [rdi+4]; out 0x10, al"))
    assert tiny.vcpu.run() == abi.KVM_EXIT_MMIO
    mmio = tiny.vcpu.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xC0000010, 4, 1)
    assert bytes(mmio.data[:4]) == b"\x44\x33\x22\x11"
    assert tiny.vcpu.run() == abi.KVM_EXIT_MMIO
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xC0000014, 2, 0)
    ctypes.memmove(mmio.data, b"\xad\xde", 2)
    tiny.run_to_port(0x10)
    assert tiny.vcpu.get_regs().rbx == 0xDEAD


def test_ioeventfd_takes_port_writes(tiny: Any, assemble: Callable[[str], Any], eventfd: int) -> None:
    tiny.vm.ioeventfd(eventfd, 0xC010, 2, pio=True)
    tiny.load(assemble("mov dx, 0xC010; mov ecx, 100; again: out dx, ax; loop again; out 0x10, al"))
    tiny.run_to_port(0x10)  # no exit before it
    assert os.eventfd_read(eventfd) == 100
    tiny.vm.ioeventfd(eventfd, 0xC010, 2, pio=True, assign=False)
    tiny.load(assemble("mov dx, 0xC010; out dx, ax"))
    assert tiny.run_to_port(0xC010) == b"\0\0"


def test_ioeventfd_takes_memory_writes_of_any_size(
    tiny: Any, assemble: Callable[[str], Any], eventfd: int
) -> None:
    tiny.vm.ioeventfd(eventfd, 0xC0001000, 0, pio=False)
    writes = "mov word ptr [rdi], 1; mov dword ptr [rdi], 2; mov byte ptr [rdi], 3"
    tiny.load(assemble(f"mov edi, 0xC0001000; {writes}; out 0x10, al"))
    tiny.run_to_port(0x10)
    assert os.eventfd_read(eventfd) == 3


def test_ioeventfd_with_a_value_lets_others_through(
    tiny: Any, assemble: Callable[[str], Any], eventfd: int
) -> None:
    tiny.vm.ioeventfd(eventfd, 0xC010, 2, pio=True, value=7)
    tiny.load(assemble("mov dx, 0xC010; mov ax, 7; out dx, ax; mov ax, 8; out dx, ax"))
    assert tiny.run_to_port(0xC010) == b"\x08\0"
    assert os.eventfd_read(eventfd) == 1


def test_irqfd_delivers_an_msi(tiny: Any, assemble: Callable[[str], Any], eventfd: int) -> None:
    tiny.vm.set_gsi_routing([*default_routes(), msi_route(24, 0xFEE00000, 0x41)])
    tiny.vm.irqfd(eventfd, 24)
    handler = f".global handler; handler: mov al, 0x41; out 0x10, al; {ACKNOWLEDGE}; iretq"
    program = assemble(f"{ENABLE_APIC}; out 0x11, al; sti; idle: hlt; jmp idle; {handler}")
    tiny.load(program, {0x41: "handler"})
    tiny.run_to_port(0x11)
    for _ in range(3):
        os.eventfd_write(eventfd, 1)
        assert tiny.run_to_port(0x10) == b"\x41"


def test_a_signal_from_before_the_irqfd_is_delivered(
    tiny: Any, assemble: Callable[[str], Any], eventfd: int
) -> None:
    """MSI-X unmasking relies on it: what was signalled while masked must not be lost."""
    program = assemble(
        f"{ENABLE_APIC}; out 0x11, al; sti; idle: hlt; jmp idle; .global handler; handler: out 0x10, al"
    )
    tiny.load(program, {0x41: "handler"})
    tiny.run_to_port(0x11)
    os.eventfd_write(eventfd, 1)
    tiny.vm.set_gsi_routing([*default_routes(), msi_route(24, 0xFEE00000, 0x41)])
    tiny.vm.irqfd(eventfd, 24)
    tiny.run_to_port(0x10)


def test_level_interrupt_through_the_ioapic(tiny: Any, assemble: Callable[[str], Any]) -> None:
    route = """
        mov al, 0xFF
        out 0x21, al                            # the PICs share the line, and nobody set them up
        out 0xA1, al
        mov edi, 0xFEC00000
        mov dword ptr [rdi], 0x10 + 2*10        # redirection entry of input 10
        mov dword ptr [rdi+0x10], 0x8000 + 0x45 # level, vector 0x45
        mov dword ptr [rdi], 0x11 + 2*10
        mov dword ptr [rdi+0x10], 0
    """
    handler = f".global handler; handler: out 0x10, al; {ACKNOWLEDGE}; iretq"
    tiny.load(
        assemble(f"{ENABLE_APIC}{route}out 0x11, al; sti; idle: hlt; jmp idle; {handler}"), {0x45: "handler"}
    )
    tiny.run_to_port(0x11)
    tiny.vm.irq_line(10, 1)
    tiny.run_to_port(0x10)
    tiny.run_to_port(0x10)  # still asserted: it comes again after the acknowledgement
    tiny.vm.irq_line(10, 0)


def test_registers_go_in_and_out(tiny: Any, assemble: Callable[[str], Any]) -> None:
    tiny.load(assemble("out 0x10, al"))
    regs = tiny.vcpu.get_regs()
    regs.r8, regs.r15 = 0x0123456789ABCDEF, 2**64 - 1
    tiny.vcpu.set_regs(regs)
    tiny.run_to_port(0x10)
    regs = tiny.vcpu.get_regs()
    assert (regs.r8, regs.r15) == (0x0123456789ABCDEF, 2**64 - 1)
    assert tiny.vcpu.get_msrs([0x174]) == {0x174: 0}
    tiny.vcpu.set_msrs({0x174: 0x10})
    assert tiny.vcpu.get_msrs([0x174]) == {0x174: 0x10}
    assert tiny.vcpu.translate(0x10000) == 0x10000
    assert tiny.vcpu.translate(0x8000000000) is None


def test_registers_come_with_the_exit(tiny: Any, assemble: Callable[[str], Any]) -> None:
    tiny.load(assemble("mov rbx, 0x123456789; out 0x10, al; mov rcx, rbx; out 0x10, al"))
    tiny.vcpu.valid_regs.value = abi.KVM_SYNC_X86_REGS
    tiny.run_to_port(0x10)
    assert tiny.vcpu.sync.regs.rbx == 0x123456789
    tiny.run_to_port(0x10)
    assert tiny.vcpu.sync.regs.rcx == 0x123456789


def test_kicks_reach_a_guest_that_never_exits(
    tiny: Any, assemble: Callable[[str], Any], kick_handler: None
) -> None:
    """A thousand times: set the flag, send the signal, see KVM_EXIT_INTR."""
    tiny.load(assemble("forever: jmp forever"))
    rounds = 1000
    stopped = threading.Semaphore(0)

    def run() -> None:
        for _ in range(rounds):
            assert tiny.vcpu.run() == abi.KVM_EXIT_INTR
            tiny.vcpu.header.immediate_exit = 0
            stopped.release()

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(rounds):
        tiny.vcpu.header.immediate_exit = 1
        signal.pthread_kill(thread.ident or 0, signal.SIGRTMIN)
        assert stopped.acquire(timeout=10)
    thread.join()


def test_a_kick_before_the_run_is_not_lost(tiny: Any, assemble: Callable[[str], Any]) -> None:
    tiny.load(assemble("forever: jmp forever"))
    tiny.vcpu.header.immediate_exit = 1
    assert tiny.vcpu.run() == abi.KVM_EXIT_INTR


def test_a_triple_fault_shuts_down(tiny: Any, assemble: Callable[[str], Any]) -> None:
    tiny.load(assemble("ud2"))  # and no handlers at all
    assert tiny.vcpu.run() == abi.KVM_EXIT_SHUTDOWN


def test_errors_carry_the_call_and_errno(tiny: Any) -> None:
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION") as caught:
        tiny.vm.set_memory(1, 0x1001, 4096, 0)
    assert caught.value.errno == errno.EINVAL


def test_a_second_cpu_starts(tiny: Any, assemble: Callable[[str], Any]) -> None:
    """INIT and SIPI from the first: the second begins in real mode at the page that the SIPI names."""
    start = f"""{ENABLE_APIC}
        mov edi, 0xFEE00310
        mov dword ptr [rdi], 0x01000000
        mov dword ptr [rdi-0x10], 0x4500   # INIT
        mov dword ptr [rdi], 0x01000000
        mov dword ptr [rdi-0x10], 0x4608   # SIPI to 0x8000
        out 0x10, al
    """
    tiny.load(assemble(start))
    tiny.ram[0x8000:0x8004] = b"\xb0\x99\xe6\x12"  # mov al, 0x99; out 0x12, al
    with tiny.vm.create_vcpu(1) as second:
        second.set_cpuid(tiny.system.supported_cpuid())
        seen: list[tuple[int, int]] = []

        def run() -> None:
            while (reason := second.run()) == abi.KVM_EXIT_INTR:
                pass
            seen.append((reason, second.io.port))

        thread = threading.Thread(target=run)
        thread.start()
        tiny.run_to_port(0x10)
        thread.join(timeout=30)
        assert seen == [(abi.KVM_EXIT_IO, 0x12)]
