"""The keyboard controller without a keyboard: every probe ends at once, and the reset line works."""

import pytest

from devices.platform.i8042 import I8042

OUTPUT_FULL, INPUT_FULL, AUX_DATA, TIMEOUT = 0x01, 0x02, 0x20, 0x40


class Line:
    def __init__(self) -> None:
        self._high = False

    def set_level(self, asserted: bool) -> None:
        self._high = asserted

    def high(self) -> bool:
        return self._high


class Machine:
    def __init__(self) -> None:
        self.line = Line()
        self.resets = 0
        self.i8042 = I8042(self.line, self.reset)

    def reset(self) -> None:
        self.resets += 1

    def status(self) -> int:
        return self.i8042.command.read(0, 1)

    def read(self) -> int:
        return self.i8042.data.read(0, 1)

    def command(self, value: int, *parameters: int) -> None:
        assert not self.status() & INPUT_FULL
        self.i8042.command.write(0, 1, value)
        for parameter in parameters:
            assert not self.status() & INPUT_FULL
            self.i8042.data.write(0, 1, parameter)

    def ask(self, value: int, *parameters: int) -> int:
        self.command(value, *parameters)
        assert self.status() & OUTPUT_FULL
        answer = self.read()
        assert not self.status() & OUTPUT_FULL
        return answer


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_controller_is_there_and_empty(machine: Machine) -> None:
    assert not machine.status() & (OUTPUT_FULL | INPUT_FULL)
    assert machine.status() & 0x10  # not locked
    assert machine.ask(0xAA) == 0x55
    assert machine.ask(0xAB) == 0x01  # SeaBIOS gives the keyboard up here
    assert machine.ask(0xC0) & 0x80
    assert machine.ask(0xD0) & 0x03 == 0x03


def test_config_byte(machine: Machine) -> None:
    assert machine.ask(0x20) == 0x74
    machine.command(0x60, 0x65)
    assert machine.ask(0x20) == 0x65
    machine.command(0xAD)
    assert machine.ask(0x20) == 0x75
    machine.command(0xAE)
    assert machine.ask(0x20) == 0x65
    machine.command(0xA7)
    machine.command(0xA8)
    assert machine.ask(0x20) & 0x20  # no auxiliary port to enable


def test_linux_finds_no_aux_port(machine: Machine) -> None:
    """i8042_check_aux: the loop test must answer, but not from the auxiliary side; then the port test
    decides."""
    machine.command(0xD3, 0x5A)
    assert machine.status() & OUTPUT_FULL
    assert not machine.status() & AUX_DATA
    assert machine.ask(0xA9) not in (0x00, 0xFA, 0xFF)


def test_keyboard_commands_are_refused_by_an_interrupt(machine: Machine) -> None:
    """atkbd's GETID: waiting for its answer is what costs Linux half a second."""
    machine.command(0x60, 0x45)
    assert not machine.line.high()
    for _ in range(2):
        machine.i8042.data.write(0, 1, 0xF2)
        assert machine.line.high()
        assert machine.status() & (OUTPUT_FULL | TIMEOUT) == OUTPUT_FULL | TIMEOUT
        assert machine.read() == 0xFE
        assert not machine.line.high()
        assert not machine.status() & TIMEOUT


def test_controller_answers_do_not_interrupt(machine: Machine) -> None:
    machine.command(0x60, 0x45)
    machine.command(0x20)
    assert not machine.line.high()
    assert machine.read() == 0x45
    machine.command(0xD2, 0x1C)
    assert machine.line.high()
    assert machine.read() == 0x1C


def test_masked_keyboard_does_not_interrupt(machine: Machine) -> None:
    machine.i8042.data.write(0, 1, 0xFF)
    assert not machine.line.high()
    assert machine.read() == 0xFE
    machine.command(0xD4, 0xFF)
    assert machine.read() == 0xFE


def test_reset(machine: Machine) -> None:
    machine.command(0xFF)
    machine.command(0xF1)
    machine.command(0xD1, 0x03)
    assert machine.resets == 0
    machine.command(0xFE)
    assert machine.resets == 1
    machine.command(0xD1, 0x02)
    assert machine.resets == 2


def test_wide_accesses(machine: Machine) -> None:
    assert machine.i8042.command.read(0, 4) >> 8 == 0xFFFFFF
    machine.i8042.command.write(1, 2, 0xFEFE)
    machine.i8042.data.write(3, 4, 0)
    assert machine.resets == 0
    assert not machine.status() & OUTPUT_FULL
