"""ACPI fixed hardware as ACPICA drives it."""

import time

import pytest

from devices.platform.acpi_pm import CONTROL, ENABLE, POWER_BUTTON, RESET, STATUS, TIMER, TIMER_HZ, AcpiPm


class Line:
    def __init__(self) -> None:
        self._high = False

    def set_level(self, asserted: bool) -> None:
        self._high = asserted

    def high(self) -> bool:
        return self._high


class Machine:
    def __init__(self, timer_bits: int = 32) -> None:
        self.line = Line()
        self.events: list[str] = []
        self.pm = AcpiPm(
            self.line,
            lambda: self.events.append("off"),
            lambda: self.events.append("reset"),
            timer_bits=timer_bits,
        )


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_power_button(machine: Machine) -> None:
    machine.pm.press_power_button()
    assert not machine.line.high()  # nobody enabled it
    machine.pm.write(STATUS, 2, 0xFFFF)
    assert machine.pm.read(STATUS, 2) == 0
    machine.pm.write(ENABLE, 2, POWER_BUTTON)
    assert machine.pm.read(ENABLE, 2) == POWER_BUTTON
    machine.pm.press_power_button()
    assert machine.line.high()
    assert machine.pm.read(STATUS, 2) == POWER_BUTTON
    machine.pm.write(STATUS, 2, 0xFFFF & ~POWER_BUTTON)  # zeroes leave it
    assert machine.line.high()
    machine.pm.write(STATUS, 2, POWER_BUTTON)
    assert not machine.line.high()
    assert machine.pm.read(STATUS, 4) == POWER_BUTTON << 16


def test_enable_registers_read_back(machine: Machine) -> None:
    """acpi_enable_event reads back what it wrote and complains otherwise."""
    for bit in (0, 5, 8, 9, 10):
        machine.pm.write(ENABLE, 2, 1 << bit)
        assert machine.pm.read(ENABLE, 2) == 1 << bit
    machine.pm.write(ENABLE, 2, 0xFFFF)
    assert machine.pm.read(ENABLE, 2) == 0x0721


def test_acpi_mode_is_always_on(machine: Machine) -> None:
    machine.pm.write(CONTROL, 2, 0)
    assert machine.pm.read(CONTROL, 2) & 1


def test_power_off_as_acpica_does_it(machine: Machine) -> None:
    control = machine.pm.read(CONTROL, 2) & ~0x3C00 | 5 << 10
    machine.pm.write(CONTROL, 2, control)
    assert machine.events == []
    machine.pm.write(CONTROL, 2, control | 1 << 13)
    assert machine.events == ["off"]
    assert machine.pm.read(CONTROL, 2) == control  # SLP_EN reads as zero


def test_power_off_by_one_byte(machine: Machine) -> None:
    machine.pm.write(CONTROL + 1, 1, 5 << 2 | 1 << 5)
    assert machine.events == ["off"]


@pytest.mark.parametrize("sleep", [0, 1, 2, 3, 4, 6, 7])
def test_other_sleep_states_do_not_exist(machine: Machine, sleep: int) -> None:
    machine.pm.write(CONTROL, 2, sleep << 10 | 1 << 13)
    assert machine.events == []


def test_reset_register(machine: Machine) -> None:
    machine.pm.write(RESET, 1, 0)
    assert machine.events == []
    machine.pm.write(RESET, 1, 1)
    assert machine.events == ["reset"]


def test_timer_runs_at_its_rate(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = machine.pm.timer_start
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    assert machine.pm.read(TIMER, 4) == 0
    now += 1_000_000_000
    assert machine.pm.read(TIMER, 4) == TIMER_HZ
    now += 1200 * 1_000_000_000
    assert machine.pm.read(TIMER, 4) == 1201 * TIMER_HZ & 0xFFFFFFFF
    narrow = Machine(24)
    narrow.pm.timer_start = now - 10 * 1_000_000_000
    assert narrow.pm.read(TIMER, 4) == 10 * TIMER_HZ & 0xFFFFFF
    machine.pm.write(TIMER, 4, 0)
    assert machine.pm.read(TIMER, 4) == 1201 * TIMER_HZ & 0xFFFFFFFF


def test_timer_width() -> None:
    with pytest.raises(ValueError):
        Machine(16)
