"""The platform devices are saved at any moment, loaded into others, and the two cannot be told apart."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.board import IrqLine
from devices.platform.acpi_pm import AcpiPm
from devices.platform.cmos import Cmos
from devices.platform.debug_console import DebugConsole
from devices.platform.fw_cfg import FILE_DIRECTORY, FIRST_FILE, FwCfg
from devices.platform.i8042 import I8042
from devices.platform.post import PostCodes
from devices.platform.uart import Uart
from tests.unit.state_mutations import mutated, through_json

Step = tuple[str, int, int, int]  # what, offset, size, value
Answers = list[Any]

CLOCK = 1_700_000_000.25


class Line(IrqLine):
    """Counts as the board does: a line that is told its level twice is a fault of the device's."""

    def __init__(self) -> None:
        self.level = False

    def set_level(self, asserted: bool) -> None:
        assert asserted != self.level, "the level was driven to what it is"
        self.level = asserted


class Rig:
    """A device, its interrupt line, and all that came out of it."""

    def __init__(self, build: Callable[["Rig"], Any]) -> None:
        self.line = Line()
        self.out: Answers = []
        self.device = build(self)

    def take(self, step: Step) -> Any:
        what, offset, size, value = step
        answer = None
        if what == "read":
            answer = self._target(offset).read(self._offset(offset), size)
        elif what == "write":
            self._target(offset).write(self._offset(offset), size, value & (1 << 8 * size) - 1)
        elif isinstance(self.device, Uart):
            answer = self.device.feed(b"typed in"[: value % 9])
        elif isinstance(self.device, AcpiPm):
            self.device.press_power_button()
        return answer, self.line.level, list(self.out)

    def _target(self, offset: int) -> Any:
        if isinstance(self.device, I8042):
            return self.device.command if offset & 1 else self.device.data
        return self.device

    def _offset(self, offset: int) -> int:
        return 0 if isinstance(self.device, I8042) else offset


def uart(rig: Rig) -> Uart:
    return Uart(rig.line, rig.out.append, lambda: rig.out.append("room"))


def cmos(rig: Rig) -> Cmos:
    return Cmos(64 << 20, clock=lambda: CLOCK)


def i8042(rig: Rig) -> I8042:
    return I8042(rig.line, lambda: rig.out.append("reset"))


def acpi_pm(rig: Rig) -> AcpiPm:
    return AcpiPm(rig.line, lambda: rig.out.append("off"), lambda: rig.out.append("reset"))


def post(rig: Rig) -> PostCodes:
    return PostCodes(lambda now, value: rig.out.append(value))


def debug_console(rig: Rig) -> DebugConsole:
    return DebugConsole(rig.out.append)


def firmware_config(rig: Rig) -> FwCfg:
    return FwCfg({"one": b"first", "two": bytes(300)}, {7: b"seven"})


DEVICES = [uart, cmos, i8042, acpi_pm, post, debug_console, firmware_config]

# Values that mean something to one of these devices, so that random accesses get somewhere.
VALUES = st.one_of(
    st.integers(0, 255),
    st.sampled_from(
        [0x20, 0x60, 0xD1, 0xD2, 0xD3, 0xAA, 0xAD, 0x0A, 0x0B, 0x82, 0x0100, FIRST_FILE, FILE_DIRECTORY]
    ),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "write", "write", "event"]),
        st.integers(0, 13),
        st.sampled_from([1, 1, 1, 2, 4]),
        VALUES,
    ),
    max_size=40,
)


@contextmanager
def stopped_clock() -> Iterator[None]:
    """CLOCK_MONOTONIC stands still: two timers read one after the other show one time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic_ns", lambda: 123_456_789_000)
        yield


def copy_of(rig: Rig, build: Callable[[Rig], Any]) -> Rig:
    state = through_json(rig.device.save())
    copied = Rig(build)
    copied.device.load(state)
    copied.out[:] = rig.out
    assert copied.device.save() == state
    assert copied.line.level == rig.line.level
    return copied


@pytest.mark.parametrize("build", DEVICES)
@given(before=STEPS, after=STEPS)
@settings(max_examples=150, deadline=None)
def test_a_loaded_device_goes_on_like_the_one_saved(
    build: Callable[[Rig], Any], before: list[Step], after: list[Step]
) -> None:
    with stopped_clock():
        rig = Rig(build)
        for step in before:
            rig.take(step)
        copied = copy_of(rig, build)
        for step in after:
            assert copied.take(step) == rig.take(step), step
        assert copied.device.save() == rig.device.save()


@pytest.mark.parametrize("build", DEVICES)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_state_that_cannot_be_is_refused(build: Callable[[Rig], Any], data: st.DataObject) -> None:
    with stopped_clock():
        rig = Rig(build)
        for step in data.draw(STEPS):
            rig.take(step)
        state = data.draw(mutated(rig.device.save()))
        other = Rig(build)
        try:
            other.device.load(state)
        except ValueError as error:
            assert str(error).startswith(("the saved state of ", "ACPI power management has another "))
            return
        copy_of(other, build)
        for offset in range(14):
            other.take(("read", offset, 1, 0))


def test_lines_are_asserted_again() -> None:
    with stopped_clock():
        port = Rig(uart)
        port.take(("write", 1, 1, 0x02))  # the transmitter is empty, and may say so
        controller = Rig(i8042)
        for offset, value in ((1, 0x60), (0, 0x01), (0, 0xF4)):
            controller.take(("write", offset, 1, value))
        power = Rig(acpi_pm)
        power.take(("write", 3, 1, 0x01))
        power.take(("event", 0, 0, 0))
        for rig, build in ((port, uart), (controller, i8042), (power, acpi_pm)):
            assert rig.line.level
            assert copy_of(rig, build).line.level


def test_the_power_management_timer_goes_on_from_where_it_was() -> None:
    rig = Rig(acpi_pm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic_ns", lambda: rig.device.timer_start + 10_000_000_000)
        state = rig.device.save()
        before = rig.device.read(8, 4)
    other = Rig(acpi_pm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic_ns", lambda: 77)  # another host, another boot
        other.device.load(state)
        assert other.device.read(8, 4) == before
        patch.setattr(time, "monotonic_ns", lambda: 77 + 1_000_000_000)
        assert other.device.read(8, 4) == before + 3_579_545


def test_the_clock_shows_the_time_of_the_host_it_is_on() -> None:
    now = CLOCK
    clock = Cmos(64 << 20, clock=lambda: now)
    clock.write(0, 1, 0)
    clock.write(1, 1, 0x30)  # the guest sets the seconds
    state = through_json(clock.save())
    seconds = clock.read(1, 1)
    later = Cmos(64 << 20, clock=lambda: now + 60)
    later.load(state)
    assert later.read(1, 1) == seconds
    later.write(0, 1, 2)
    clock.write(0, 1, 2)
    assert later.read(1, 1) != clock.read(1, 1)
