"""Tiny bare-metal guests: a few instructions, assembled in the test, entered in long mode with memory
identity-mapped.
"""

import ctypes
import mmap
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmrun.kvm import System, Vcpu, Vm, abi

RAM_SIZE = 4 << 20
CODE = 0x10000
STACK = 0x9000
IDT = 0x3000
PML4, PDPT, DIRECTORIES = 0xA000, 0xB000, 0xC000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.kvm)


class Program:
    """Machine code to load at CODE, and where its labels are."""

    def __init__(self, code: bytes, labels: dict[str, int]) -> None:
        self.code = code
        self.labels = labels


@pytest.fixture
def assemble(tmp_path: Path) -> Callable[[str], Program]:
    """Assemble Intel-syntax source; labels must be made global by `.global` to be found."""
    if shutil.which("as") is None:
        pytest.skip("no assembler (Debian: binutils)")

    def do(source: str, address: int = CODE) -> Program:
        (tmp_path / "guest.s").write_text(f".intel_syntax noprefix\n.global _start\n_start:\n{source}\n")
        subprocess.run(["as", "-o", "guest.o", "guest.s"], cwd=tmp_path, check=True)
        subprocess.run(
            ["ld", "-N", f"-Ttext={address:#x}", "-o", "guest.elf", "guest.o"], cwd=tmp_path, check=True
        )
        subprocess.run(["objcopy", "-O", "binary", "guest.elf", "guest.bin"], cwd=tmp_path, check=True)
        names = subprocess.run(["nm", "guest.elf"], cwd=tmp_path, check=True, capture_output=True, text=True)
        labels = {line.split()[2]: int(line.split()[0], 16) for line in names.stdout.splitlines()}
        return Program((tmp_path / "guest.bin").read_bytes(), labels)

    return do


@pytest.fixture
def bare_kernel(tmp_path: Path, assemble: Callable[..., Program]) -> Callable[[str], Path]:
    """Assemble source into an ELF file that `vmrun boot --kernel` takes."""

    def do(source: str) -> Path:
        assemble(source, address=0x100000)
        return tmp_path / "guest.elf"

    return do


class TinyMachine:
    """RAM, a VM with interrupt controllers, and one vCPU about to execute a program in long mode."""

    def __init__(self, system: System) -> None:
        self.mapping = mmap.mmap(-1, RAM_SIZE, flags=mmap.MAP_SHARED)
        self.ram = memoryview(self.mapping)
        self.system = system
        self.vm: Vm = system.create_vm()
        self.vm.set_tss_address(0xFFFBD000)
        self.vm.create_irqchip()
        self._pin = ctypes.c_char.from_buffer(self.mapping)
        self.vm.set_memory(0, 0, RAM_SIZE, ctypes.addressof(self._pin))
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(system.supported_cpuid())

    def load(self, program: Program, handlers: dict[int, str] | None = None) -> None:
        """Put `program` into RAM with interrupt gates to its labels, and the vCPU at its start."""
        self.ram[CODE : CODE + len(program.code)] = program.code
        # The first 4 GiB, identity-mapped in pages of 2 MiB: RAM, and the interrupt controllers' registers.
        struct.pack_into("<Q", self.ram, PML4, PDPT | 3)
        for gib in range(4):
            struct.pack_into("<Q", self.ram, PDPT + 8 * gib, DIRECTORIES + 4096 * gib | 3)
        for page in range(2048):
            struct.pack_into("<Q", self.ram, DIRECTORIES + 8 * page, page << 21 | 0x83)
        for vector, label in (handlers or {}).items():
            address = program.labels[label]
            gate = struct.pack("<HHBBHII", address & 0xFFFF, 0x10, 0, 0x8E, address >> 16 & 0xFFFF, 0, 0)
            self.ram[IDT + 16 * vector : IDT + 16 * vector + 16] = gate
        self.ram[0x2000:0x2020] = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
        sregs = self.vcpu.get_sregs()
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, 0x18
            segment.type, segment.present, segment.s, segment.g, segment.db, segment.dpl = 3, 1, 1, 1, 1, 0
        sregs.cs.selector, sregs.cs.type, sregs.cs.l, sregs.cs.db = 0x10, 11, 1, 0
        sregs.gdt.base, sregs.gdt.limit = 0x2000, 31
        sregs.idt.base, sregs.idt.limit = IDT, 4095
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000011, PML4, 0x20, 0x500
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(abi.kvm_regs(rip=CODE, rsp=STACK, rflags=2))

    def run_to_port(self, port: int) -> bytes:
        """Run until the guest writes to `port`; returns what it wrote. Any other exit fails the test."""
        reason = self.vcpu.run()
        assert reason == abi.KVM_EXIT_IO, f"exit {reason} at {self.vcpu.get_regs().rip:#x}"
        io = self.vcpu.io
        assert (io.port, io.direction) == (port, abi.KVM_EXIT_IO_OUT)
        return bytes(memoryview(self.vcpu.page)[io.data_offset : io.data_offset + io.size * io.count])

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()


@pytest.fixture
def tiny() -> Iterator[TinyMachine]:
    with System() as system:
        machine = TinyMachine(system)
        yield machine
        machine.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def kick_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGRTMIN, lambda number, frame: None)
    yield
    signal.signal(signal.SIGRTMIN, before)
