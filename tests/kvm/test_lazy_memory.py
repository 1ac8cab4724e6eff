"""A bare-metal guest over RAM that comes out of a file while it runs: KVM itself waits for the pages."""

import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devices.memory import PAGE_SIZE
from devices.pager import userfaultfd
from tests.kvm.conftest import CODE, TinyMachine
from vmrun.kvm import System, abi
from vmrun.machine.layout import FOUR_GIB, PCI_HOLE_START
from vmrun.machine.memory import Ram
from vmrun.snapshot.memory_file import open_memory, write_memory
from vmrun.snapshot.pager import LazyRam

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.access(userfaultfd.DEVICE, os.R_OK | os.W_OK), reason="no /dev/userfaultfd"),
]

MIB = 1 << 20
FIRST, LAST = 8 * MIB, 24 * MIB  # what the guest sums up
SIZE = PCI_HOLE_START + 32 * MIB
HIGH = 16 * MIB  # the same again, in the region above 4 GiB

# Adds up one number of each page from rsi to rdi, and stores the sum over it.
SUM = f"""
    mov rsi, {FIRST}; mov rdi, {LAST}; call sum
    mov rsi, {FOUR_GIB + HIGH}; mov rdi, {FOUR_GIB + HIGH + 8 * MIB}; call sum
    mov eax, edx; out 0x10, eax
    hlt
sum:
    add edx, [rsi+8]
    mov [rsi], edx
    add rsi, {PAGE_SIZE}
    cmp rsi, rdi
    jb sum
    ret
"""


def number(page: int) -> int:
    return 0 if page % 20 == 3 else (page * 2654435761) & 0xFFFFFFFF


def page_bytes(page: int) -> bytes:
    return struct.pack("<II", number(page), 0) * (PAGE_SIZE // 8) if page % 20 != 3 else bytes(PAGE_SIZE)


class Machine(TinyMachine):
    """A TinyMachine whose RAM is ours. What `load` writes is there before the snapshot is taken."""

    def __init__(self, system: System, ram: Ram) -> None:
        self.system = system
        self.ram = ram.memory.regions[0].view
        self.vm = system.create_vm()
        self.vm.set_tss_address(0xFFFBD000)
        self.vm.create_irqchip()
        ram.plug_into(self.vm)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(system.supported_cpuid())


@pytest.fixture
def saved(tmp_path: Path, assemble: Callable[[str], Any]) -> Iterator[SimpleNamespace]:
    """A guest that is about to sum up its memory, in files."""
    path = tmp_path / "memory"
    with System() as system, Ram(SIZE) as ram:
        machine = Machine(system, ram)
        machine.load(assemble(SUM))
        # The tables of `load` end at 4 GiB: one more directory for what is above.
        table = 0x20000
        struct.pack_into("<Q", machine.ram, 0xB000 + 8 * 4, table | 3)
        for at in range(512):
            struct.pack_into("<Q", machine.ram, table + 8 * at, FOUR_GIB + (at << 21) | 0x83)
        for page in range(FIRST // PAGE_SIZE, LAST // PAGE_SIZE):
            os.pwrite(ram.fd, page_bytes(page), page * PAGE_SIZE)
        for page in range(8 * MIB // PAGE_SIZE):
            os.pwrite(ram.fd, page_bytes(page), PCI_HOLE_START + HIGH + page * PAGE_SIZE)
        facts = write_memory(ram.fd, SIZE, path)
        regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
        machine.ram = memoryview(b"")
        machine.close()
    pages = [*range(FIRST // PAGE_SIZE, LAST // PAGE_SIZE), *range(8 * MIB // PAGE_SIZE)]
    total = sum(number(page) for page in pages) & 0xFFFFFFFF
    yield SimpleNamespace(path=path, facts=facts, regs=regs, sregs=sregs, total=total)


class Restored:
    """That guest over RAM that is empty at first."""

    def __init__(self, stack: ExitStack, saved: SimpleNamespace, *, prefetch: bool = False) -> None:
        memory = stack.enter_context(open_memory(saved.path, saved.facts))
        self.ram = stack.enter_context(Ram(SIZE))
        self.told: list[Any] = []
        system = stack.enter_context(System())
        self.machine = Machine(system, self.ram)
        stack.callback(self.machine.close)
        self.lazy = stack.enter_context(LazyRam(self.ram, memory, self._end, self._halt, prefetch=prefetch))
        self.lazy.start()
        self.machine.vcpu.set_sregs(saved.sregs)
        self.machine.vcpu.set_regs(saved.regs)
        self.thread: threading.Thread | None = None

    def _end(self, code: int, reason: str) -> None:
        self.told.append((code, reason))

    def _halt(self) -> None:
        """As `VcpuThread.stop`."""
        self.told.append("halt")
        assert self.thread is not None and self.thread.ident is not None
        self.machine.vcpu.header.immediate_exit = 1
        signal.pthread_kill(self.thread.ident, signal.SIGRTMIN)

    def await_more(self, size: int) -> None:
        """Until the guest has come so far."""
        while os.fstat(self.ram.fd).st_blocks * 512 < size:
            os.sched_yield()

    def present(self) -> int:
        return os.fstat(self.ram.fd).st_blocks * 512


@pytest.fixture
def restored(saved: SimpleNamespace) -> Iterator[Callable[..., Restored]]:
    with ExitStack() as stack:
        yield lambda **arguments: Restored(stack, saved, **arguments)


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_guest_finds_its_memory(
    restored: Callable[..., Restored], saved: SimpleNamespace, prefetch: bool
) -> None:
    made = restored(prefetch=prefetch)
    assert prefetch or made.present() == 0
    assert struct.unpack("<I", made.machine.run_to_port(0x10)) == (saved.total,)
    # Three stretches of 8 MiB and the tables; nothing of the 3 GiB between.
    assert 24 * MIB <= made.present() < 26 * MIB
    made.lazy.complete()
    assert made.told == []


def test_the_guest_finds_its_memory_when_pagers_die(
    restored: Callable[..., Restored], saved: SimpleNamespace
) -> None:
    made = restored()
    answers: list[bytes] = []
    made.thread = threading.Thread(target=lambda: answers.append(made.machine.run_to_port(0x10)))
    made.thread.start()
    for step in (1, 9, 17):
        made.await_more(step * MIB)
        os.kill(made.lazy._worker.pid, signal.SIGKILL)
    made.thread.join(60)
    assert answers == [struct.pack("<I", saved.total)]
    assert made.lazy.restarts == 3 and made.told == []


def test_the_guest_sees_no_damaged_page(
    restored: Callable[..., Restored], saved: SimpleNamespace, kick_handler: None
) -> None:
    with saved.path.open("r+b") as file:
        file.seek(FIRST + MIB + 8)
        file.write(b"\xff\xff")
    made = restored()
    reasons: list[int] = []
    made.thread = threading.Thread(target=lambda: reasons.append(made.machine.vcpu.run()))
    made.thread.start()
    made.thread.join(60)
    assert reasons == [abi.KVM_EXIT_INTR]
    ((_, reason), halt) = made.told
    assert f"damaged at offset {FIRST + MIB:#x}" in reason and halt == "halt"
    # It stands before the instruction that would have read the page.
    regs = made.machine.vcpu.get_regs()
    assert regs.rsi == FIRST + MIB
    assert CODE <= regs.rip < CODE + PAGE_SIZE
