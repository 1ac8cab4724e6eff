"""vmmci behind its registers, driven as OpenBSD's vmmci(4) and Linux' out-of-tree driver drive it."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.virtio.transport import VirtioPciFunction
from devices.virtio.vmmci import (
    IDENTITY,
    VMMCI_F_ACK,
    VMMCI_F_SYNCRTC,
    VMMCI_F_TIMESYNC,
    VMMCI_NONE,
    VMMCI_REBOOT,
    VMMCI_SHUTDOWN,
    VMMCI_SYNCRTC,
    Vmmci,
)

ALL = VMMCI_F_TIMESYNC | VMMCI_F_ACK | VMMCI_F_SYNCRTC
COMMAND, SECONDS, MICROSECONDS = 20, 24, 32
STATUS, ISR, DRIVER_OK = 18, 19, 4


class Driver:
    """The guest's side, and what the device told the host's."""

    def __init__(self, guest: Any) -> None:
        self.guest = guest
        self.told: list[Any] = []
        self.now = 1_700_000_000_123_456_789
        self.device = Vmmci(
            lambda: self.told.append("driver"),
            self.told.append,
            lambda: self.told.append("guest"),
            clock=lambda: self.now,
        )
        self.function = VirtioPciFunction(self.device, guest.board, name="vmmci", identity=IDENTITY)
        self.slot = guest.plug(self.function)
        guest.config_write(self.slot, 4, 2, 1)
        self.base = guest.config_read(self.slot, 0x10, 4) & ~3

    def get(self, offset: int, size: int = 4) -> int:
        return int(self.guest.pio.read(self.base + offset, size))

    def set(self, offset: int, size: int, value: int) -> None:
        self.guest.board.guest_out(self.base + offset, size, value)

    def start(self, features: int = ALL) -> None:
        self.set(STATUS, 1, 0)
        self.set(STATUS, 1, 3)
        self.set(4, 4, features & self.get(0))
        self.set(STATUS, 1, 7)
        self.told.clear()

    @property
    def interrupted(self) -> bool:
        """Whether the line is up; the handler then reads ISR."""
        level = bool(self.guest.board.lines[0].level)
        assert (self.get(ISR, 1) == 2) is level
        assert not self.guest.board.lines[0].level
        return level


@pytest.fixture
def driver(guest: Any) -> Iterator[Driver]:
    yield Driver(guest)


def test_identity_and_features(driver: Driver) -> None:
    guest, slot = driver.guest, driver.slot
    assert guest.config_read(slot, 0, 4) == 0x0777_0B5D
    assert guest.config_read(slot, 8, 4) == 0x07800000
    assert guest.config_read(slot, 0x2C, 4) == 0xFFFF_0B5D
    assert guest.capabilities(slot) == []
    assert driver.get(0) == ALL
    assert driver.get(12, 2) == 0, "no queue"


def test_no_driver_is_told_at_once(driver: Driver) -> None:
    assert not driver.device.ready
    assert not driver.device.send(VMMCI_SHUTDOWN)
    driver.set(STATUS, 1, 3)
    assert not driver.device.send(VMMCI_SHUTDOWN), "it has not said DRIVER_OK"
    driver.set(STATUS, 1, 7)
    assert driver.told == ["driver"]
    assert driver.device.send(VMMCI_SHUTDOWN)
    driver.set(STATUS, 1, 0)
    assert driver.told == ["driver", "driver"]
    assert not driver.device.send(VMMCI_SHUTDOWN)


@pytest.mark.parametrize("command", [VMMCI_SHUTDOWN, VMMCI_REBOOT])
def test_a_command_and_its_acknowledgement(driver: Driver, command: int) -> None:
    driver.start()
    assert driver.get(COMMAND) == VMMCI_NONE
    assert driver.device.send(command)
    assert driver.interrupted
    assert driver.get(COMMAND) == command
    assert driver.told == []
    driver.set(COMMAND, 4, command)
    assert driver.told == [command]
    driver.set(COMMAND, 4, command)
    assert driver.told == [command], "it does not get more time by saying it twice"


def test_acknowledging_byte_by_byte(driver: Driver) -> None:
    """As Linux' vp_set writes."""
    driver.start()
    driver.device.send(VMMCI_REBOOT)
    for i, byte in enumerate((VMMCI_REBOOT, 0, 0, 0)):
        driver.set(COMMAND + i, 1, byte)
    assert driver.told == [VMMCI_REBOOT]


def test_the_same_command_again_is_nothing(driver: Driver) -> None:
    driver.start()
    assert driver.device.send(VMMCI_SHUTDOWN)
    assert driver.interrupted
    assert driver.device.send(VMMCI_SHUTDOWN)
    assert not driver.interrupted
    assert driver.device.send(VMMCI_REBOOT)
    assert driver.interrupted
    driver.set(COMMAND, 4, VMMCI_SHUTDOWN)
    assert driver.told == [], "that command does not stand any more"
    driver.set(COMMAND, 4, VMMCI_REBOOT)
    assert driver.told == [VMMCI_REBOOT]


def test_a_guest_that_shuts_down_by_itself_says_so(driver: Driver) -> None:
    driver.start()
    driver.set(COMMAND, 4, VMMCI_SHUTDOWN)
    assert driver.told == ["guest"]
    driver.set(COMMAND, 4, VMMCI_NONE)
    driver.set(COMMAND, 4, VMMCI_REBOOT)
    driver.set(COMMAND, 4, 0xFFFFFFFF)
    assert driver.told == ["guest"]


def test_the_powerdown_of_a_requested_reboot_is_not_the_guest_s_own(driver: Driver) -> None:
    """OpenBSD writes SHUTDOWN at every powerdown, also at the one it was asked for."""
    driver.start()
    driver.device.send(VMMCI_REBOOT)
    driver.set(COMMAND, 4, VMMCI_REBOOT)
    driver.set(COMMAND, 4, VMMCI_SHUTDOWN)
    assert driver.told == [VMMCI_REBOOT]


def test_syncrtc(driver: Driver) -> None:
    driver.start(VMMCI_F_ACK)
    assert not driver.device.syncs_clock
    assert not driver.device.send(VMMCI_SYNCRTC), "not negotiated"
    driver.start()
    assert driver.device.syncs_clock
    assert driver.device.send(VMMCI_SYNCRTC)
    assert driver.interrupted
    assert driver.get(COMMAND) == VMMCI_SYNCRTC
    driver.set(COMMAND, 4, VMMCI_SYNCRTC)
    assert (driver.get(COMMAND), driver.told) == (VMMCI_NONE, [])
    assert driver.device.send(VMMCI_SYNCRTC)
    assert driver.interrupted, "the acknowledged one does not count"


def test_syncrtc_does_not_lose_a_shutdown(driver: Driver) -> None:
    driver.start()
    driver.device.send(VMMCI_SYNCRTC)
    driver.device.send(VMMCI_SHUTDOWN)
    driver.set(COMMAND, 4, VMMCI_SYNCRTC)
    assert driver.get(COMMAND) == VMMCI_SHUTDOWN
    assert not driver.device.send(VMMCI_SYNCRTC)
    assert driver.get(COMMAND) == VMMCI_SHUTDOWN


def test_time_is_taken_at_its_first_byte(driver: Driver) -> None:
    driver.start()
    assert driver.get(SECONDS) == 1_700_000_000
    driver.now += 5_000_000_000
    assert (driver.get(SECONDS + 4), driver.get(MICROSECONDS), driver.get(MICROSECONDS + 4)) == (0, 123456, 0)
    single = bytes(driver.get(SECONDS + i, 1) for i in range(16))
    assert single == (1_700_000_005).to_bytes(8, "little") + (123456).to_bytes(8, "little")
    assert driver.get(MICROSECONDS + 8) == 0


def test_an_acknowledgement_was_not_promised(driver: Driver) -> None:
    driver.start(0)
    assert not driver.device.acknowledges
    driver.start(VMMCI_F_ACK)
    assert driver.device.acknowledges


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("rwws"), st.integers(0, 127), st.sampled_from((1, 2, 4)), st.integers(0, 1 << 32)
        ),
        max_size=40,
    )
)
def test_whatever_is_written_where(fake_guest: Any, steps: list[Any]) -> None:
    guest = fake_guest()
    driver = Driver(guest)
    for kind, offset, size, value in steps:
        value &= (1 << 8 * size) - 1
        if kind == "r":
            driver.get(offset, size)
        elif kind == "w":
            driver.set(offset, size, value)
        else:
            driver.device.send(value % 4)
        assert driver.function.status & ~0xFF == 0
    guest.close()
