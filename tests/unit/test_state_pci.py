"""The PCI bus with virtio functions on it is saved at any moment and loaded into another: the guest cannot
tell which of the two it is on.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.pci.bars import BarKind
from devices.pci.function import PciFunction
from devices.platform.pvpanic import PvPanic
from devices.virtio.device import ActiveDriver, QueueConfig, QueueEvents
from devices.virtio.transport import VirtioPciFunction, virtio_identity
from tests.unit.state_mutations import mutated, through_json

VERSION_1 = 1 << 32
OFFERED = 1 << 5 | 1 << 28
DISK, CARD = 2, 1
MODERN_SLOT, LEGACY_SLOT, PANIC_SLOT = 1, 2, 3

Step = tuple[str, int, int, int]


class Device:
    """A virtio device that keeps what it was told, and refuses rings at an odd address."""

    features = OFFERED

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        self.queue_sizes: tuple[int, ...] = (8, 4)
        self.config = bytearray(range(1, 25))
        self.driver: ActiveDriver | None = None
        self.calls: dict[int, int] = {}
        self.paused = False
        self.order: list[str] = []

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size]).ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        assert not self.paused
        self.config[offset : offset + len(data)] = data[: max(0, len(self.config) - offset)]

    def activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        assert not self.paused
        self._take(ActiveDriver(features, tuple(queues), events))

    def _take(self, driver: ActiveDriver) -> None:
        if any(queue.descriptors & 1 for queue in driver.queues):
            raise GuestError("odd")
        self.driver = driver
        self.calls = {queue.index: driver.events.call_fd(queue.index) for queue in driver.queues}

    def set_call(self, queue: int, fd: int) -> None:
        assert not self.paused
        self.calls[queue] = fd

    def reset(self) -> None:
        self.driver = None

    def pause(self) -> None:
        self.order.append("pause")
        self.paused = True

    def unpause(self) -> None:
        self.order.append("unpause")
        self.paused = False
        if self.driver is not None:
            self._take(self.driver)

    def save(self) -> dict[str, Any]:
        assert self.paused
        return {"config": self.config.hex()}

    def load(self, state: dict[str, Any], driver: ActiveDriver | None) -> None:
        config = bytes.fromhex(str(state["config"])) if isinstance(state.get("config"), str) else b""
        if len(config) != 24:
            raise ValueError("another configuration")
        if driver is not None:
            self._take(driver)
        self.paused = True
        self.config[:] = config

    def close(self) -> None:
        self.driver = None


class Machine:
    """A bus with a transitional device, a legacy one, and a function that is no virtio device."""

    def __init__(self, fake_guest: Any) -> None:
        self.guest = fake_guest()
        self.board = self.guest.board
        self.bus = self.guest.bus
        self.devices = [Device(DISK), Device(CARD)]
        modern = VirtioPciFunction(self.devices[0], self.board, name="blk0")
        legacy = VirtioPciFunction(self.devices[1], self.board, name="net0", identity=virtio_identity(CARD))
        self.functions = [modern, legacy]
        self.guest.plug(modern, MODERN_SLOT)
        self.guest.plug(legacy, LEGACY_SLOT)
        self.panics = 0
        self.guest.plug(PvPanic(self._panicked), PANIC_SLOT)

    def _panicked(self) -> None:
        self.panics += 1

    def deliver(self) -> list[int]:
        """What KVM and the main loop would take: how often each connected vector was signalled."""
        self.board.run_main_loop()
        return [vector.take() if vector.message is not None else -1 for vector in self.board.vectors]

    def bar(self, slot: int, index: int) -> int:
        return int(self.bus.functions[slot].bar_address(self.bus.functions[slot].bars[index]))

    def take(self, step: Step) -> Any:
        what, where, size, value = step
        value &= (1 << 8 * size) - 1
        slot = (MODERN_SLOT, LEGACY_SLOT, PANIC_SLOT)[where & 1 if what != "config" else where % 3]
        function, device = self.functions[where & 1], self.devices[where & 1]
        answer = None
        if what == "config":
            offset = where % 0xC0 & ~(size - 1)
            self.guest.config_write(slot, offset, size, value)
            answer = self.guest.config_read(slot, offset, size)
        elif what == "command":
            self.guest.config_write(slot, 4, 2, value & 0x407)
        elif what == "common":
            address = self.bar(MODERN_SLOT, 4) + where % 60
            self.board.guest_write(address, size, value)
            answer = self.guest.mmio.read(address, size)
        elif what == "legacy":
            address = self.bar(slot, 0) + where % 48
            self.board.guest_out(address, size, value)
            answer = self.guest.pio.read(address, size)
        elif what == "table":
            address = self.bar(MODERN_SLOT, 1) + where % 48
            self.guest.mmio.write(address, 4, value)
            answer = self.guest.mmio.read(self.bar(MODERN_SLOT, 1) + 0x800, 4)
        elif what == "start":
            self.start(where)
        elif what == "start_legacy":
            self.start_legacy(slot, where)
        elif what == "msix":
            self.guest.config_write(MODERN_SLOT, 0x42, 2, value & 3 << 14)
        elif what == "config_changed":
            function.config_changed()
        elif what == "needs_reset":
            function.needs_reset("test")
        elif what == "used" and device.driver is not None:
            for fd in device.calls.values():
                if fd >= 0:
                    os.eventfd_write(fd, 1)
        return answer, self.deliver(), self.view()

    def start(self, where: int) -> None:
        """A driver of the modern layout, in two of three cases with a ring that works."""
        base = self.bar(MODERN_SLOT, 4)
        self.guest.config_write(MODERN_SLOT, 4, 2, 7)
        for offset, size, value in (
            (20, 1, 0), (20, 1, 3), (8, 4, 1), (12, 4, 1), (8, 4, 0), (12, 4, OFFERED), (20, 1, 11),
            (22, 2, 0), (32, 4, 0x1000 + (where % 3 == 0)), (26, 2, where % 3), (28, 2, 1), (16, 2, 0), (20,
            1, 15),
        ):  # fmt: skip
            self.board.guest_write(base + offset, size, value)

    def start_legacy(self, slot: int, where: int) -> None:
        base = self.bar(slot, 0)
        self.guest.config_write(slot, 4, 2, 7)
        registers = [(18, 1, 0), (18, 1, 3), (4, 4, OFFERED), (14, 2, where % 2), (8, 4, 5), (18, 1, 7)]
        for offset, size, value in (*registers, (16, 2, where % 2)):
            self.board.guest_out(base + offset, size, value)

    def view(self) -> Any:
        """All that a guest or a main loop could notice."""
        fds = {function.kick_fd(queue): (number, queue) for number, function in enumerate(self.functions)
               for queue in range(2)}  # fmt: skip
        return (
            [line.level for line in self.board.lines],
            [(vector.message, vector.pending()) for vector in self.board.vectors],
            sorted(
                (kick.space, kick.address, kick.size, kick.value or 0, fds[kick.fd])
                for kick in self.board.kicks
            ),
            self.guest.pio._table[0],
            self.guest.mmio._table[0],
            [device.driver and (device.driver.features, device.driver.queues) for device in self.devices],
            [
                self.names(function, device)
                for function, device in zip(self.functions, self.devices, strict=True)
            ],
            self.panics,
        )

    def names(self, function: VirtioPciFunction, device: Device) -> list[str]:
        """Where each queue's call goes."""
        known = {-1: "none", function._intx_fd: "INTx"}
        if function.msix is not None:
            known |= {vector.fd: f"vector {number}" for number, vector in enumerate(function.msix.vectors)}
        return [known[fd] for fd in device.calls.values()] if device.driver is not None else []

    def close(self) -> None:
        self.guest.close()


@contextmanager
def machines(fake_guest: Any, count: int) -> Iterator[list[Machine]]:
    built = [Machine(fake_guest) for _ in range(count)]
    try:
        yield built
    finally:
        for machine in built:
            machine.close()


ONCE = ("command", "config", "table", "config_changed", "needs_reset")
OFTEN = ("start", "start_legacy", "common", "legacy", "msix", "used")
STEPS = st.lists(
    st.tuples(
        st.sampled_from([*ONCE, *OFTEN, *OFTEN, "start"]),
        st.integers(0, 0x200),
        st.sampled_from([1, 2, 4]),
        st.one_of(
            st.integers(0, 255),
            st.sampled_from(
                [0xC007, 0x8000, 0xC000, 0xFEE00000, 0xC0000000, 0xC0004000, 0xFFFFFFFF, 0xC040, 0x10]
            ),
        ),
    ),
    max_size=30,
)


def compared(machine: Machine) -> Any:
    return machine.deliver(), machine.view()


@given(before=STEPS, signals=st.lists(st.integers(0, 1), max_size=2), after=STEPS)
@settings(max_examples=150, deadline=None)
def test_a_loaded_bus_goes_on_like_the_one_saved(
    fake_guest: Any, before: list[Step], signals: list[int], after: list[Step]
) -> None:
    with machines(fake_guest, 2) as (machine, other):
        for step in before:
            machine.take(step)
        # Not delivered yet when the machine is paused: the main loop did not come to it.
        for number in signals:
            for fd in machine.devices[number].calls.values():
                if fd >= 0 and machine.devices[number].driver is not None:
                    os.eventfd_write(fd, 1)
        for vector in machine.board.vectors:
            if vector.message is not None:
                vector.take()  # KVM does come to it, when the vectors are disconnected
        machine.bus.pause()
        for function in machine.functions:
            function.config_changed()  # while paused: stays pending
        state = through_json(machine.bus.save())
        other.bus.load(state)
        assert through_json(other.bus.save()) == state
        machine.bus.unpause()
        other.bus.unpause()
        assert compared(other) == compared(machine)
        for step in after:
            assert other.take(step) == machine.take(step), step
        for each in (machine, other):
            each.bus.pause()
        assert other.bus.save() == machine.bus.save()


@given(before=STEPS, data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_state_that_cannot_be_is_refused_and_the_bus_closes(
    fake_guest: Any, before: list[Step], data: st.DataObject
) -> None:
    with machines(fake_guest, 2) as (machine, other):
        for step in before:
            machine.take(step)
        machine.bus.pause()
        state = data.draw(mutated(machine.bus.save()))
        try:
            other.bus.load(state)
        except ValueError:
            return
        other.bus.save()
        other.bus.unpause()
        for step in data.draw(STEPS):
            other.take(step)


def saved(fake_guest: Any) -> dict[str, Any]:
    with machines(fake_guest, 1) as (machine,):
        machine.start(1)
        machine.bus.pause()
        return through_json(machine.bus.save())


@pytest.mark.parametrize(
    ("slot", "key", "value", "message"),
    [
        (MODERN_SLOT, "vendor", 0x8086, "blk0 has another vendor id (6900) than when it was saved (32902)"),
        (PANIC_SLOT, "device", 1, "PCI slot 3: PCI function 1b36:0011 has another device id"),
        (MODERN_SLOT, "bars", [[0, 1, 64]], "PCI slot 1: blk0 has another set of BARs"),
        (MODERN_SLOT, "device_features", 5, "blk0 has another set of features"),
        (MODERN_SLOT, "msix", None, "blk0: msix is not a dictionary"),
        (LEGACY_SLOT, "virtio", [], "the saved state of net0, virtio is not a dictionary"),
        (LEGACY_SLOT, "config", "00" * 256, "config is another function's: byte 0x0"),
    ],
)
def test_another_function_is_refused_by_name(
    fake_guest: Any, slot: int, key: str, value: Any, message: str
) -> None:
    state = saved(fake_guest)
    state["functions"][str(slot)][key] = value
    with machines(fake_guest, 1) as (machine,), pytest.raises(ValueError) as raised:
        machine.bus.load(state)
    assert message in str(raised.value)


def test_slots_must_be_the_same(fake_guest: Any) -> None:
    state = saved(fake_guest)
    more, less = copy.deepcopy(state), copy.deepcopy(state)
    more["functions"]["7"] = more["functions"]["3"]
    del less["functions"]["2"]
    for wrong, message in ((more, "slot 7 is empty"), (less, "slot 2 has net0; it was saved empty")):
        with machines(fake_guest, 1) as (machine,), pytest.raises(ValueError, match=message):
            machine.bus.load(wrong)


def test_a_signal_that_waits_is_delivered_after_the_load(fake_guest: Any) -> None:
    with machines(fake_guest, 2) as (machine, other):
        machine.start(1)
        machine.guest.config_write(MODERN_SLOT, 0x42, 2, 0x8000)
        for vector in range(3):
            table = machine.bar(MODERN_SLOT, 1) + 16 * vector
            for offset, value in ((0, 0xFEE00000), (8, 0x40 + vector), (12, vector == 1)):
                machine.guest.mmio.write(table + offset, 4, value)
        os.eventfd_write(machine.devices[0].calls[0], 1)  # vector 1, which is masked
        machine.bus.pause()
        assert machine.devices[0].order == ["pause"]
        machine.functions[0].config_changed()  # vector 0, which was open until the pause
        assert machine.functions[0].isr == 0
        state = through_json(machine.bus.save())
        assert state["functions"]["1"]["msix"]["pending"] == [False, True, False]
        other.bus.load(state)
        assert [vector.message for vector in other.board.vectors] == [None] * 3
        other.bus.unpause()
        assert other.deliver() == [1, -1, 0]
        other.guest.mmio.write(other.bar(MODERN_SLOT, 1) + 16 + 12, 4, 0)
        assert other.board.vectors[1].message == (0xFEE00000, 0x41)
        assert other.deliver() == [0, 1, 0]


def test_an_intx_that_the_main_loop_has_not_seen_is_not_lost(fake_guest: Any) -> None:
    with machines(fake_guest, 2) as (machine, other):
        machine.start(1)
        os.eventfd_write(machine.devices[0].calls[0], 1)
        machine.bus.pause()
        other.bus.load(through_json(machine.bus.save()))
        for each in (machine, other):
            assert each.board.lines[0].level
            each.bus.unpause()
            assert each.guest.mmio.read(each.bar(MODERN_SLOT, 4) + 0x1000, 1) == 1
            assert not each.board.lines[0].level


def test_no_line_moves_while_paused(fake_guest: Any) -> None:
    """The interrupt controllers may be saved before the devices or after them."""
    with machines(fake_guest, 2) as (machine, other):
        machine.start(1)
        machine.bus.pause()
        before = machine.view()
        machine.functions[0].config_changed()
        machine.functions[0].needs_reset("while paused")
        assert machine.view() == before
        other.bus.load(through_json(machine.bus.save()))
        for each in (machine, other):
            assert not each.board.lines[0].level
            each.bus.unpause()
            assert each.board.lines[0].level
            assert each.guest.mmio.read(each.bar(MODERN_SLOT, 4) + 0x1000, 1) == 2


def test_bars_that_want_one_place_are_mapped_as_they_were(fake_guest: Any) -> None:
    """The one that came first has it, whatever slot it is in; the other gets it when it goes."""
    for first, second in ((MODERN_SLOT, PANIC_SLOT), (PANIC_SLOT, MODERN_SLOT)):
        registers = {MODERN_SLOT: 0x10 + 4 * 4, PANIC_SLOT: 0x10}
        with machines(fake_guest, 2) as (machine, other):
            for slot in (first, second):
                machine.guest.config_write(slot, registers[slot], 4, 0xD0000000)
                machine.guest.config_write(slot, 4, 2, 2)
            machine.bus.pause()
            other.bus.load(through_json(machine.bus.save()))
            for each in (machine, other):
                each.bus.unpause()
            assert compared(other) == compared(machine)
            for each in (machine, other):
                each.guest.config_write(first, 4, 2, 0)
            assert compared(other) == compared(machine)


def test_a_plain_function(fake_guest: Any) -> None:
    one, other = fake_guest(), fake_guest()
    try:
        functions = []
        for guest in (one, other):
            function = PciFunction(vendor_id=1, device_id=2, class_code=3, interrupt_pin=1)
            function.add_bar(2, BarKind.MEMORY_64_PREFETCHABLE, 4096, PvPanic(lambda: None))
            guest.plug(function, 5)
            functions.append(function)
        one.config_write(5, 4, 2, 0x402)
        one.config_write(5, 0x18, 4, 0xC0100000)
        one.config_write(5, 0x3C, 1, 0x77)
        functions[0].intx.set_asserted(True)
        other.bus.load(through_json(one.bus.save()))
        assert functions[1].intx.disabled
        assert functions[1].bars[2].mapped == 0xC0100000
        assert other.config_read(5, 0x3C, 1) == 0x77
    finally:
        one.close()
        other.close()
