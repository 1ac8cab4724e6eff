"""Interrupts over a pause, against KVM: what was signalled before it is in the local APIC, what is signalled
during it waits and is delivered once (vmrun/machine/interrupts.py, devices/pci/msix.py)."""

import os
import time
from collections.abc import Iterator

import pytest

from devices.platform.i8042 import I8042
from devices.platform.uart import Uart
from vmrun.kvm import System, Vcpu, Vm, abi
from vmrun.machine.interrupts import Interrupts, Vector

APIC_SPIV, APIC_IRR = 0xF0, 0x200
VECTOR = 0x51


class Board:
    """A VM with interrupt controllers and a vCPU that never runs; its local APIC is on."""

    def __init__(self) -> None:
        self.system = System()
        self.vm: Vm = self.system.create_vm()
        self.vm.create_irqchip()
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        lapic = self.vcpu.get_lapic()
        registers = memoryview(lapic).cast("B")
        registers[APIC_SPIV + 1] = 1
        self.vcpu.set_lapic(lapic)
        self.interrupts = Interrupts(self.vm)

    def requested(self, vector: int = VECTOR) -> bool:
        registers = memoryview(self.vcpu.get_lapic()).cast("B")
        return bool(registers[APIC_IRR + 0x10 * (vector // 32) + vector % 32 // 8] & 1 << vector % 8)

    def forget(self, vector: int = VECTOR) -> None:
        """As if the vCPU had taken it."""
        lapic = self.vcpu.get_lapic()
        registers = memoryview(lapic).cast("B")
        registers[APIC_IRR + 0x10 * (vector // 32) + vector % 32 // 8] &= ~(1 << vector % 8)
        self.vcpu.set_lapic(lapic)

    def vector(self) -> Vector:
        return self.interrupts.vector()

    def line_request(self, gsi: int) -> bool:
        """Whether input `gsi` of the IOAPIC is requested."""
        chip = self.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
        # struct kvm_ioapic_state: base_address (8 bytes), ioregsel and id (4 each), irr.
        irr = int.from_bytes(bytes(memoryview(chip.chip).cast("B")[16:20]), "little")
        return bool(irr & 1 << gsi)

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        self.system.close()


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def wait_for_request(board: Board) -> None:
    """KVM takes what waited in the eventfd in a work queue of its own."""
    deadline = time.monotonic() + 30
    while not board.requested():
        assert time.monotonic() < deadline, "not delivered"
        os.sched_yield()


def test_what_was_signalled_before_is_delivered_when_disconnect_returns(board: Board) -> None:
    vector = board.vector()
    for _ in range(200):
        vector.connect(0xFEE00000, VECTOR)
        os.eventfd_write(vector.fd, 1)
        vector.disconnect()
        assert board.requested()
        assert not vector.pending()
        board.forget()
    vector.close()


def test_what_is_signalled_meanwhile_is_delivered_once(board: Board) -> None:
    vector = board.vector()
    vector.connect(0xFEE00000, VECTOR)
    for _ in range(200):
        vector.disconnect()
        os.eventfd_write(vector.fd, 1)
        assert vector.pending()
        assert not board.requested()
        vector.connect(0xFEE00000, VECTOR)
        wait_for_request(board)
        # A second pause finds nothing to save, and its end delivers nothing again.
        vector.disconnect()
        assert not vector.pending()
        board.forget()
        vector.connect(0xFEE00000, VECTOR)
        vector.disconnect()
        assert not board.requested()
    vector.close()


def test_lines_are_counted_after_a_load(board: Board) -> None:
    """Two users of one input, and one that is alone: the input goes down when the last of them lets go."""
    port, other = (Uart(board.interrupts.line(4), lambda data: None) for _ in range(2))
    port.write(1, 1, 2)
    other.load(port.save())
    assert board.interrupts.asserted == {4: 2}
    assert board.line_request(4)
    port.read(2, 1)
    assert board.line_request(4)
    other.read(2, 1)
    assert board.interrupts.asserted == {4: 0}
    assert not board.line_request(4)


def test_the_controllers_state_is_set_after_the_devices(board: Board) -> None:
    """A line that was up, and whose interrupt was taken, stays up and interrupts nobody again."""
    keyboard = I8042(board.interrupts.line(1), lambda: None)
    for port, value in ((keyboard.command, 0x60), (keyboard.data, 0x01), (keyboard.data, 0xF4)):
        port.write(0, 1, value)
    state = keyboard.save()
    chips = [board.vm.get_irqchip(number) for number in range(3)]
    restored = Board()
    try:
        loaded = I8042(restored.interrupts.line(1), lambda: None)
        loaded.load(state)
        for chip in chips:
            restored.vm.set_irqchip(chip)
        for before, number in zip(chips, range(3), strict=True):
            assert bytes(memoryview(restored.vm.get_irqchip(number).chip)) == bytes(memoryview(before.chip))
        assert restored.line_request(1)
        assert loaded.data.read(0, 1) == 0xFE
        assert not restored.line_request(1)
    finally:
        restored.close()
