"""A machine's KVM state saved from one VM and loaded into another, with tiny guests that notice what is
missing.

Guests are stopped at random moments, moved into a new VM with the same memory, and must come to the result
that one which was never stopped comes to.
"""

import json
import random
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.kvm.conftest import DIRECTORIES, PDPT, PML4, TinyMachine
from vmrun.host.check import cpu_flags, kvm_flavour
from vmrun.kvm import System, Vcpu, abi
from vmrun.kvm.software import SoftwareCpu, adjust_cpuid, prepare_vm
from vmrun.kvm.state import load_machine, save_machine, saved_cpuid

SOFTWARE = kvm_flavour() == "pvm"
TSS, KERNEL_STACK = 0x5000, 0x9000
USER = 0x200000  # the second page of 2 MiB is the program's, the first the kernel's
COUNTER, FAULTS = 0x1F000, 0x1F008
DONE = 0xC0000000  # a device's register: a program says there that it is done
XCR0 = 7  # x87, SSE, AVX
CR4_OSFXSR, CR4_OSXSAVE = 1 << 9, 1 << 18

EOI = "mov edi, 0xFEE000B0; mov dword ptr [rdi], 0"
ENABLE_APIC = "mov edi, 0xFEE000F0; mov dword ptr [rdi], 0x1FF"


class Machine(TinyMachine):
    """A TinyMachine with a PIT, more vCPUs and the software CPU where the KVM needs it; can be moved."""

    def __init__(
        self, system: System, cpus: int = 1, leaves: list[abi.kvm_cpuid_entry2] | None = None
    ) -> None:
        super().__init__(system)
        if SOFTWARE:
            prepare_vm(self.vm)
        self.vm.create_pit()
        self.vcpus = [self.vcpu, *(self.vm.create_vcpu(index) for index in range(1, cpus))]
        if leaves is None:
            leaves = system.supported_cpuid()
            if SOFTWARE:
                adjust_cpuid(leaves)
        self.helpers: list[SoftwareCpu | None] = []
        for vcpu in self.vcpus:
            vcpu.set_cpuid(leaves)
            self.helpers.append(SoftwareCpu(vcpu, self.view, leaves) if SOFTWARE else None)

    def view(self, gpa: int, size: int) -> memoryview | None:
        return self.ram[gpa : gpa + size] if gpa + size <= len(self.ram) else None

    def load_with_user(self, program: Any, handlers: dict[int, str] | None = None) -> None:
        """As `load`, and with a TSS, segments for programs, and USER mapped for them; vector registers are
        enabled.
        """
        self.load(program, handlers)
        struct.pack_into("<Q", self.ram, PML4, PDPT | 7)
        for gib in (0, 3):
            struct.pack_into("<Q", self.ram, PDPT + 8 * gib, DIRECTORIES + 4096 * gib | 7)
        struct.pack_into("<Q", self.ram, DIRECTORIES + 8, USER | 0x87)
        struct.pack_into("<Q", self.ram, DIRECTORIES + 4096 * 3, DONE | 0x87)
        flat = (
            0x00AF9B000000FFFF,
            0x00CF93000000FFFF,
            0x00CFFB000000FFFF,
            0x00CFF3000000FFFF,
            0x00AFFB000000FFFF,
        )
        self.ram[0x2000:0x2038] = struct.pack("<7Q", 0, 0, *flat)
        struct.pack_into("<Q", self.ram, TSS + 4, KERNEL_STACK)
        sregs = self.vcpu.get_sregs()
        sregs.gdt.limit = 55
        sregs.tr.selector, sregs.tr.base, sregs.tr.limit, sregs.tr.type = 0x40, TSS, 0x67, 11
        sregs.tr.present, sregs.tr.s, sregs.tr.unusable = 1, 0, 0
        sregs.cr4 |= CR4_OSFXSR | CR4_OSXSAVE
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_xcr0(XCR0)

    def go(self, cpu: int = 0) -> int:
        """Run until an exit that the software CPU leaves to us."""
        vcpu, helper = self.vcpus[cpu], self.helpers[cpu]
        while True:
            reason = vcpu.run()
            if reason == abi.KVM_EXIT_INTR or helper is None or not helper.finish(reason):
                return reason

    def go_to_port(self, port: int) -> None:
        reason = self.go()
        assert reason == abi.KVM_EXIT_IO, f"exit {reason} at {self.vcpu.get_regs().rip:#x}"
        assert self.vcpu.io.port == port

    def settle(self) -> None:
        """Have KVM complete the access that the last exit was for."""
        for vcpu in self.vcpus:
            vcpu.header.immediate_exit = 1
            assert vcpu.run() == abi.KVM_EXIT_INTR
            vcpu.header.immediate_exit = 0

    def save(self) -> dict[str, Any]:
        state = save_machine(self.vm, self.vcpus, self.system.msr_indices())
        helpers = [helper.save() if helper is not None else None for helper in self.helpers]
        return json.loads(json.dumps({"kvm": state, "helpers": helpers}))  # type: ignore[no-any-return]

    def restore(self, state: dict[str, Any], *, elapsed: int = 0) -> None:
        load_machine(self.vm, self.vcpus, state["kvm"], elapsed=elapsed)
        for helper, saved in zip(self.helpers, state["helpers"], strict=True):
            if helper is not None:
                helper.load(saved)

    def close(self) -> None:
        for vcpu in self.vcpus[1:]:
            vcpu.close()
        super().close()


@pytest.fixture
def machines(kick_handler: None) -> Iterator[Callable[..., Machine]]:
    """Makes machines; `machines(other)` is a new one, other's state and memory moved to it."""
    made: list[Machine] = []
    with System() as system:

        def make(other: Machine | None = None, cpus: int = 1) -> Machine:
            if other is None:
                made.append(Machine(system, cpus))
                return made[-1]
            state = other.save()
            machine = Machine(system, len(other.vcpus), saved_cpuid(state["kvm"]["vcpus"][0]))
            made.append(machine)
            machine.ram[:] = other.ram
            machine.restore(state)
            made.remove(other)
            other.close()
            return machine

        yield make
        for machine in made:
            machine.close()


def kick_after(seconds: float, vcpu: Vcpu) -> threading.Timer:
    """Make the calling thread's KVM_RUN end with KVM_EXIT_INTR."""
    target = threading.get_ident()

    def kick() -> None:
        vcpu.header.immediate_exit = 1
        signal.pthread_kill(target, signal.SIGRTMIN)

    timer = threading.Timer(seconds, kick)
    timer.start()
    return timer


def run_moving(
    make: Callable[..., Machine], machine: Machine, moves: int, seconds: float
) -> tuple[Machine, int, list[int]]:
    """Run to the first exit of the guest's own, moving to a new machine at `moves` random moments at most.
    Returns where it is then, that exit, and the MP states it was moved in.
    """
    chance = random.Random(1)
    states: list[int] = []
    while True:
        last = len(states) == moves
        timer = None if last else kick_after(chance.uniform(0, seconds), machine.vcpu)
        reason = machine.go()
        if timer is not None:
            timer.cancel()
            timer.join()
        if reason != abi.KVM_EXIT_INTR:
            return machine, reason, states
        machine.vcpu.header.immediate_exit = 0
        states.append(machine.vcpu.get_mp_state())
        machine = make(machine)


@contextmanager
def running_to_halt(vcpu: Vcpu) -> Iterator[None]:
    """Run `vcpu` in a thread meanwhile, and afterwards until it halts."""
    ending = threading.Event()
    seen: list[int] = []

    def run() -> None:
        while True:
            seen.append(vcpu.run())
            vcpu.header.immediate_exit = 0
            if seen[-1] != abi.KVM_EXIT_INTR:
                return
            if ending.is_set() and vcpu.get_mp_state() == abi.KVM_MP_STATE_HALTED:
                return

    thread = threading.Thread(target=run)
    thread.start()
    yield
    ending.set()
    while thread.is_alive():
        vcpu.header.immediate_exit = 1
        signal.pthread_kill(thread.ident or 0, signal.SIGRTMIN)
        thread.join(0.005)
    vcpu.header.immediate_exit = 0
    assert set(seen) == {abi.KVM_EXIT_INTR}


ENTER_USER = """
    push 0x2B; push 0x300000; push 0x202; push 0x33; push 0x200000
    iretq
"""


def test_general_and_vector_registers_of_a_program(
    machines: Callable[..., Machine], assemble: Callable[..., Any]
) -> None:
    """A program counts in every kind of register, and is moved while it does."""
    if "avx2" not in cpu_flags():
        pytest.skip("no AVX2")
    rounds = 100_000_000
    program = assemble(ENTER_USER)
    user = assemble(
        f"""
        mov rcx, {rounds}
        vpcmpeqq ymm1, ymm1, ymm1     # -1 in each lane
        vpxor ymm0, ymm0, ymm0
        vpxor ymm15, ymm15, ymm15
        push 0x3F80                   # MXCSR with another rounding mode
        ldmxcsr [rsp]
        fldpi
        xor r8, r8
    again:
        inc r8
        inc qword ptr [0x300100]
        vpsubq ymm0, ymm0, ymm1
        vpaddq ymm15, ymm15, ymm1
        dec rcx
        jnz again
        vmovdqu [0x300200], ymm0
        vmovdqu [0x300220], ymm15
        fstp qword ptr [0x300240]
        stmxcsr [0x300248]
        mov edi, {DONE}
        mov [rdi], r8
        """,
        address=USER,
    )
    machine = machines()
    machine.load_with_user(program)
    machine.ram[USER : USER + len(user.code)] = user.code
    machine, reason, states = run_moving(machines, machine, 12, 0.03)
    assert reason == abi.KVM_EXIT_MMIO and len(states) > 1
    assert machine.vcpu.get_regs().r8 == rounds
    assert struct.unpack_from("<Q", machine.ram, 0x300100) == (rounds,)
    assert struct.unpack_from("<4q", machine.ram, 0x300200) == (rounds,) * 4
    assert struct.unpack_from("<4q", machine.ram, 0x300220) == (-rounds,) * 4
    assert struct.unpack_from("<d", machine.ram, 0x300240) == (3.141592653589793,)
    assert struct.unpack_from("<I", machine.ram, 0x300248)[0] & 0xFFC0 == 0x3F80


def system_call_guest(make: Callable[..., Machine], assemble: Callable[..., Any], calls: int) -> Machine:
    """A program that makes `calls` system calls, and as many page faults; RBX counts, DONE is the end."""
    kernel = assemble(
        f"""
        mov ecx, 0xC0000081; mov edx, 0x00200010; xor eax, eax; wrmsr
        mov ecx, 0xC0000084; xor edx, edx; mov eax, 0x47700; wrmsr
        mov ecx, 0xC0000082; lea eax, entry[rip]; wrmsr
        mov ecx, 0xC0000080; rdmsr; or eax, 0x801; wrmsr   # SCE; NXE, for faults to tell of fetches
        {ENTER_USER}
    entry:
        inc qword ptr [{COUNTER}]
        mov rax, [{COUNTER}]
        rex.w sysret
    .global fault
    fault:
        inc qword ptr [{FAULTS}]
        add rsp, 8
        add qword ptr [rsp], 3         # past the load
        iretq
        """
    )
    user = assemble(
        f"""
        mov r14, 0x1000               # the kernel's
        mov r15d, {calls}
        xor rbx, rbx
    again:
        syscall
        inc rbx
        cmp rax, rbx                  # no call is lost, none is made twice
        jne wrong
        mov rdx, [r14]
        dec r15
        jnz again
    wrong:
        mov edi, {DONE}
        mov [rdi], rbx
        """,
        address=USER,
    )
    machine = make()
    machine.load_with_user(kernel, {14: "fault"})
    machine.ram[USER : USER + len(user.code)] = user.code
    return machine


def test_system_calls_and_page_faults(machines: Callable[..., Machine], assemble: Callable[..., Any]) -> None:
    """The kernel's entry points stay known: to the processor, and to the software CPU where there is one."""
    calls = 3000
    machine = system_call_guest(machines, assemble, calls)
    machine, reason, states = run_moving(machines, machine, 40, 0.02)
    assert reason == abi.KVM_EXIT_MMIO, f"{reason} at {machine.vcpu.get_regs().rip:#x}"
    assert len(states) > 5
    assert machine.vcpu.get_regs().rbx == calls
    assert struct.unpack_from("<QQ", machine.ram, COUNTER) == (calls, calls)


TICK = f"handler: inc qword ptr [{COUNTER}]"
WAIT = f"idle: sti; hlt; cli; cmp qword ptr [{COUNTER}], 60; jb idle; out 0x10, al; .global handler"


def test_a_single_step_on_the_way(machines: Callable[..., Machine], assemble: Callable[..., Any]) -> None:
    """Moved while the software CPU steps over the first instruction of the guest's page-fault handler."""
    calls = 50
    machine = system_call_guest(machines, assemble, calls)
    moves = 0
    handler = None
    while (helper := machine.helpers[0]) is not None and moves < 10:
        assert helper.finish(machine.vcpu.run())
        machine.settle()  # KVM takes the registers that were changed
        handler = helper.save()["fault_handler"]
        if handler and machine.vcpu.get_regs().rip == handler:
            machine = machines(machine)
            moves += 1
    assert machine.go() == abi.KVM_EXIT_MMIO
    assert struct.unpack_from("<QQ", machine.ram, COUNTER) == (calls, calls)


COUNT = "mov dword ptr [rdi+0x2F0], 0xB; mov dword ptr [rdi+0x290], 2000000"
APIC_TIMERS = {
    "periodic": (
        f"mov dword ptr [rdi+0x230], 0x20040; {COUNT}",
        "",
    ),
    "one-shot": (
        f"mov dword ptr [rdi+0x230], 0x40; {COUNT}",
        "mov edi, 0xFEE00380; mov dword ptr [rdi], 2000000",
    ),
    "deadline": (
        "mov dword ptr [rdi+0x230], 0x40040; call again",
        "call again",
    ),
}
AGAIN = """
    again: rdtsc; shl rdx, 32; or rax, rdx; add rax, 6000000
    mov rdx, rax; shr rdx, 32; mov ecx, 0x6E0; wrmsr; ret
"""


@pytest.mark.parametrize("timer", APIC_TIMERS)
def test_local_apic_timer(machines: Callable[..., Machine], assemble: Callable[..., Any], timer: str) -> None:
    """A guest that halts until the next tick never wakes when a tick is lost."""
    start, rearm = APIC_TIMERS[timer]
    program = assemble(f"{ENABLE_APIC}; {start}; {WAIT}; {TICK}; {EOI}; {rearm}; iretq; {AGAIN}")
    machine = machines()
    machine.load(program, {0x40: "handler"})
    machine, reason, states = run_moving(machines, machine, 40, 0.006)
    assert (reason, machine.vcpu.io.port) == (abi.KVM_EXIT_IO, 0x10)
    assert abi.KVM_MP_STATE_HALTED in states


def test_pit_through_the_pic(machines: Callable[..., Machine], assemble: Callable[..., Any]) -> None:
    set_up = """
        mov al, 0x11; out 0x20, al; mov al, 0x30; out 0x21, al; mov al, 4; out 0x21, al
        mov al, 1; out 0x21, al; mov al, 0xFE; out 0x21, al
        mov al, 0x34; out 0x43, al; mov al, 0xA0; out 0x40, al; mov al, 0x09; out 0x40, al
    """
    program = assemble(f"{set_up} {WAIT}; {TICK}; mov al, 0x20; out 0x20, al; iretq")
    machine = machines()
    machine.load(program, {0x30: "handler"})
    machine, reason, states = run_moving(machines, machine, 40, 0.006)
    assert (reason, machine.vcpu.io.port) == (abi.KVM_EXIT_IO, 0x10)
    assert abi.KVM_MP_STATE_HALTED in states


def test_pending_interrupts(machines: Callable[..., Machine], assemble: Callable[..., Any]) -> None:
    """One is being served, a lower and a higher one wait: each comes in its turn after the move."""
    program = assemble(
        f"""
        {ENABLE_APIC}
        xor ebx, ebx
        sti
        mov dword ptr [rdi+0x210], 0x40061        # to myself
    until_low: cmp bl, 1
        jne until_low
        out 0x13, al
        hlt
        .global middle, low, high
    middle:
        mov edi, 0xFEE00300
        mov dword ptr [rdi], 0x40041
        mov dword ptr [rdi], 0x40081
        out 0x10, al
        sti
    until_high: cmp bh, 1
        jne until_high
        {EOI}
        iretq
    low:
        out 0x11, al
        mov bl, 1
        {EOI}
        iretq
    high:
        out 0x12, al
        mov bh, 1
        {EOI}
        iretq
        """
    )
    machine = machines()
    machine.load(program, {0x61: "middle", 0x41: "low", 0x81: "high"})
    for port in (0x10, 0x12, 0x11, 0x13):
        machine.go_to_port(port)
        machine.settle()
        machine = machines(machine)


def test_an_interrupt_held_at_the_ioapic(
    machines: Callable[..., Machine], assemble: Callable[..., Any]
) -> None:
    program = assemble(
        f"""
        mov al, 0xFF; out 0x21, al; out 0xA1, al
        mov edi, 0xFEC00000
        mov dword ptr [rdi], 0x10 + 2*10; mov dword ptr [rdi+0x10], 0x8000 + 0x45
        mov dword ptr [rdi], 0x11 + 2*10; mov dword ptr [rdi+0x10], 0
        {ENABLE_APIC}
        out 0x11, al
        sti
        idle: hlt
        jmp idle
        .global handler
        handler: out 0x10, al; {EOI}; iretq
        """
    )
    machine = machines()
    machine.load(program, {0x45: "handler"})
    machine.go_to_port(0x11)
    machine.vm.irq_line(10, 1)
    machine.settle()
    for _ in range(3):
        machine = machines(machine)
        machine.vm.irq_line(10, 1)  # the device's part: KVM does not tell who holds a line
        machine.go_to_port(0x10)
        machine.settle()
    machine.vm.irq_line(10, 0)


def test_an_exception_not_delivered_yet(
    machines: Callable[..., Machine], assemble: Callable[..., Any]
) -> None:
    """INT3, which KVM does not tell of when it is pending; the software CPU remembers."""
    program = assemble(
        "mov ebx, 1; int3; mov ebx, 3; out 0x11, al; .global handler; handler: inc ebx; out 0x10, al; iretq"
    )
    machine = machines()
    machine.load(program, {3: "handler"})
    if machine.helpers[0] is not None:
        assert machine.vcpu.run() == abi.KVM_EXIT_INTERNAL_ERROR
        assert machine.helpers[0].finish(abi.KVM_EXIT_INTERNAL_ERROR)
        machine.settle()
        machine = machines(machine)
    machine.go_to_port(0x10)
    assert machine.vcpu.get_regs().rbx == 2
    machine.settle()
    machine = machines(machine)
    machine.go_to_port(0x11)
    assert machine.vcpu.get_regs().rbx == 3


def test_registers_that_no_program_here_uses(machines: Callable[..., Machine]) -> None:
    """Debug registers, model-specific ones, MTRRs: each comes back."""
    machine = machines()
    msrs = {
        0x174: 0x10,
        0x277: 0x0007040600070401,
        0x2FF: 0xC06,
        0x250: 0x0606060606060606,
        0xC0000102: 0x1234,
    }
    machine.vcpu.set_msrs(msrs)
    machine.vcpu.set_xcr0(3)
    registers = machine.vcpu.get_debugregs()
    registers.db[2], registers.dr6 = 0xABC000, 0xFFFF0FF4
    machine.vcpu.set_debugregs(registers)
    sregs = machine.vcpu.get_sregs()
    sregs.cr2, sregs.cr8 = 0x5555, 3
    machine.vcpu.set_sregs(sregs)
    machine = machines(machine)
    assert machine.vcpu.get_msrs(msrs) == msrs
    assert machine.vcpu.get_xcr0() == 3
    assert bytes(machine.vcpu.get_debugregs()) == bytes(registers)
    assert (machine.vcpu.get_sregs().cr2, machine.vcpu.get_sregs().cr8) == (0x5555, 3)


def test_two_processors(machines: Callable[..., Machine], assemble: Callable[..., Any]) -> None:
    """The second is moved waiting for its SIPI, then halted, and is woken by the first each time."""
    start = f"""
        {ENABLE_APIC}
        mov edi, 0xFEE00310
        out 0x10, al
        mov dword ptr [rdi], 0x01000000
        mov dword ptr [rdi-0x10], 0x4500   # INIT
        mov dword ptr [rdi], 0x01000000
        mov dword ptr [rdi-0x10], 0x4608   # SIPI to 0x8000
    first: cmp byte ptr [0x8100], 1
        jne first
        out 0x11, al
        mov dword ptr [rdi], 0x01000000
        mov dword ptr [rdi-0x10], 0x4400   # NMI
    second: cmp byte ptr [0x8100], 2
        jne second
        out 0x12, al
    """
    machine = machines(cpus=2)
    machine.load(assemble(start))
    # mov ax, 0; mov ds, ax; NMI vector to 0:0x8020; inc byte [0x8100]; hlt; jmp to hlt
    machine.ram[0x8000:0x8018] = bytes.fromhex(
        "b80000 8ed8 c70608002080 c7060a000000 fe060081 f4 ebfd"
    ).ljust(24, b"\x90")
    machine.ram[0x8020:0x8025] = bytes.fromhex("fe060081 cf")  # inc byte [0x8100]; iret
    machine.go_to_port(0x10)
    machine.settle()
    assert machine.vcpus[1].get_mp_state() == abi.KVM_MP_STATE_UNINITIALIZED
    machine = machines(machine)
    assert machine.vcpus[1].get_mp_state() == abi.KVM_MP_STATE_UNINITIALIZED
    for port in (0x11, 0x12):
        with running_to_halt(machine.vcpus[1]):
            machine.go_to_port(port)
        machine.settle()
        assert machine.vcpus[1].get_mp_state() == abi.KVM_MP_STATE_HALTED
        machine = machines(machine)
    assert machine.ram[0x8100] == 2


def test_saved_twice_is_the_same(machines: Callable[..., Machine], assemble: Callable[..., Any]) -> None:
    """And so is what a loaded machine saves: nothing is lost, nothing drifts but time."""
    machine = machines()
    machine.load(assemble(f"{ENABLE_APIC}; mov ebx, 0x1234; out 0x10, al"))
    machine.go_to_port(0x10)
    machine.settle()
    first, second = machine.save(), machine.save()
    other = machines(machine)
    third = other.save()
    for state in (first, second, third):
        clocks = state["kvm"].pop("clocks")
        assert clocks["realtime"] > 0 and clocks["kvm_clock"] > 0 and len(clocks["vcpus"]) == 1
        # A PIT that is loaded begins its count anew, at the host's time.
        pit = state["kvm"]["vm"].pop("kvm_pit_state2")
        assert len(pit) == 2 * 112
    assert first == second
    assert second == third


Change = Callable[[dict[str, Any]], None]


def corruptions(state: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    """For each member of `state`, at any depth: changes that loading must not take, and their names."""

    def walk(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            if key != "cpuid":  # which the caller loads: see test_saved_cpuid_is_checked
                yield (*path, key), value
                yield from walk(value, (*path, key))

    def change(path: tuple[Any, ...], value: Any, name: str = "") -> tuple[str, Change]:
        def do(copy: dict[str, Any]) -> None:
            parent = copy
            for key in path[:-1]:
                parent = parent[key]
            if value is None or name:
                del parent[path[-1]]
            if value is not None:
                parent[name or path[-1]] = value

        return f"{path} {name} = {value!r}", do

    for path, value in walk(state, ()):
        a_register = path[-2:-1] == ("msrs",)
        if not a_register:
            yield change(path, None)
        if isinstance(path[-1], str):
            yield change(path, value, "another")
        for wrong in ("", "zz", -1, 1.5, True, [], {}):
            if not (wrong == {} and path[-1] == "msrs"):
                yield change(path, wrong)
        if isinstance(value, str):
            yield change(path, value[:-2])
            yield change(path, value + "00")
        elif type(value) is int:
            yield change(path, 1 << 64)


def test_corrupt_state_is_refused(machines: Callable[..., Machine]) -> None:
    machine = machines()
    machine.settle()
    state = machine.save()["kvm"]
    tried = 0
    for what, corrupt in corruptions(state):
        copy = json.loads(json.dumps(state))
        corrupt(copy)
        tried += 1
        try:
            load_machine(machine.vm, machine.vcpus, copy)
        except ValueError:
            continue
        pytest.fail(f"{what} was taken")
    assert tried > 300
    load_machine(machine.vm, machine.vcpus, state)


@pytest.mark.parametrize("saved", [None, {}, [], ["00"], ["zz" * 40], [1]])
def test_saved_cpuid_is_checked(saved: Any) -> None:
    with pytest.raises(ValueError, match="saved state"):
        saved_cpuid({"cpuid": saved})


def test_saved_cpuid_is_what_the_guest_sees(machines: Callable[..., Machine]) -> None:
    machine = machines()
    leaves = machine.vcpu.get_cpuid()
    leaves[1].ebx = 0x0A0B0C00
    machine.vcpu.set_cpuid(leaves)
    saved = saved_cpuid(machine.save()["kvm"]["vcpus"][0])
    assert [bytes(leaf) for leaf in saved] == [bytes(leaf) for leaf in machine.vcpu.get_cpuid()]
    assert saved[1].ebx == 0x0A0B0C00


def test_refused_registers_are_named(machines: Callable[..., Machine]) -> None:
    """A model-specific register that KVM does not let us set, unless it has the value already."""
    machine = machines()
    state = machine.save()["kvm"]
    state["vcpus"][0]["msrs"]["0x179"] = machine.vcpu.read_msrs((0x179,)).get(0x179, 0)  # MCG_CAP, read-only
    load_machine(machine.vm, machine.vcpus, state)
    state["vcpus"][0]["msrs"]["0x179"] ^= 1
    state["vcpus"][0]["msrs"]["0x40000fff"] = 5
    with pytest.raises(ValueError, match=r"0x179 = .*, 0x40000fff = 0x5"):
        load_machine(machine.vm, machine.vcpus, state)


def test_registers_that_kvm_has_not_taken(machines: Callable[..., Machine]) -> None:
    machine = machines()
    machine.vcpu.dirty_regs.value = abi.KVM_SYNC_X86_REGS
    with pytest.raises(RuntimeError, match="before KVM took"):
        machine.save()


@pytest.mark.parametrize("hours", [0, 5])
def test_time_goes_on(machines: Callable[..., Machine], assemble: Callable[..., Any], hours: int) -> None:
    elapsed = hours * 3600 * 10**9
    machine = machines()
    machine.load(assemble("out 0x10, al; rdtsc; shl rdx, 32; or rax, rdx; out 0x11, al"))
    machine.go_to_port(0x10)
    machine.settle()
    state = machine.save()
    other = machines()
    other.ram[:] = machine.ram
    other.restore(state, elapsed=elapsed)
    saved = state["kvm"]["clocks"]
    gone = other.vm.get_clock().clock - saved["kvm_clock"]
    assert 0 <= gone - elapsed < 60 * 10**9
    other.go_to_port(0x11)
    tsc = saved["vcpus"][0]["tsc"]
    if not SOFTWARE:
        tsc += elapsed * saved["vcpus"][0]["tsc_khz"] // 1_000_000
    assert 0 < other.vcpu.get_regs().rax - tsc < 60_000 * saved["vcpus"][0]["tsc_khz"]


@pytest.mark.skipif(not SOFTWARE, reason="this KVM has VMX or SVM")
@pytest.mark.parametrize(
    "change",
    [
        {"lstar": None},
        {"lstar": 1 << 64},
        {"cstar": ""},
        {"fault_handler": "0"},
        {"int3": 0},
        {"more": 1},
    ],
)
def test_corrupt_software_cpu_is_refused(machines: Callable[..., Machine], change: dict[str, Any]) -> None:
    helper = machines().helpers[0]
    assert helper is not None
    state = helper.save()
    helper.load(state)
    with pytest.raises(ValueError, match="saved state"):
        helper.load(state | change)
