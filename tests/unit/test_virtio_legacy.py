"""The legacy virtio-pci layout as an old driver meets it, over the same state machine as the modern one."""

import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.virtio.device import QueueConfig, QueueEvents
from devices.virtio.legacy import ring_addresses
from devices.virtio.transport import PciIdentity, VirtioPciFunction

VERSION_1, ANY_LAYOUT = 1 << 32, 1 << 27
OFFERED = 1 << 5 | 1 << 28 | 1 << 40
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
FEATURES, ACCEPTED, ADDRESS, SIZE, SELECT, NOTIFY, STATUS, ISR = 0, 4, 8, 12, 14, 16, 18, 19
PAGE = 0x12345


class FakeDevice:
    device_id = 2
    features = OFFERED
    queue_sizes: tuple[int, ...] = (256, 64)

    def __init__(self) -> None:
        self.config = bytes(range(1, 61))
        self.calls: list[Any] = []
        self.events: QueueEvents | None = None
        self.refuse: str | None = None

    def read_config(self, offset: int, size: int) -> bytes:
        return self.config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self.calls.append(("write_config", offset, data))

    def activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        if self.refuse is not None:
            raise GuestError(self.refuse)
        self.calls.append(("activate", features, queues))
        self.events = events

    def set_call(self, queue: int, fd: int) -> None:
        self.calls.append(("set_call", queue, fd))

    def reset(self) -> None:
        self.calls.append("reset")

    def close(self) -> None:
        self.calls.append("close")


class Driver:
    """An old driver: it knows BAR 0 and the offsets."""

    def __init__(self, guest: Any, device: Any, identity: PciIdentity | None = None) -> None:
        self.guest = guest
        self.board = guest.board
        self.device = device
        self.function = VirtioPciFunction(device, guest.board, identity=identity)
        self.slot = guest.plug(self.function)
        bar = guest.config_read(self.slot, 0x10, 4)
        assert bar & 3 == 1
        self.base = bar & ~3
        guest.config_write(self.slot, 4, 2, 1)
        self.msix = next((offset + 2 for id, offset in guest.capabilities(self.slot) if id == 0x11), 0)

    def get(self, offset: int, size: int) -> int:
        return int(self.guest.pio.read(self.base + offset, size))

    def set(self, offset: int, size: int, value: int) -> None:
        self.board.guest_out(self.base + offset, size, value)

    @property
    def status(self) -> int:
        return self.get(STATUS, 1)

    def set_up_queue(self, index: int, page: int) -> None:
        self.set(SELECT, 2, index)
        self.set(ADDRESS, 4, page)

    def probe(self, features: int = OFFERED & 0xFFFFFFFF) -> None:
        """Everything up to DRIVER_OK."""
        self.set(STATUS, 1, 0)
        self.set(STATUS, 1, ACKNOWLEDGE)
        self.set(STATUS, 1, ACKNOWLEDGE | DRIVER)
        self.set(ACCEPTED, 4, features)
        for index in range(len(self.device.queue_sizes)):
            self.set_up_queue(index, PAGE + 16 * index)

    def start(self) -> None:
        self.probe()
        self.set(STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)

    @property
    def line(self) -> bool:
        return bool(self.board.lines[0].level)


@pytest.fixture
def driver(guest: Any) -> Iterator[Driver]:
    yield Driver(guest, FakeDevice())


@pytest.mark.parametrize(
    ("device_type", "id"), [(1, 0x1000), (2, 0x1001), (3, 0x1003), (4, 0x1005), (8, 0x1004)]
)
def test_identity(guest: Any, device_type: int, id: int) -> None:
    device = FakeDevice()
    device.device_id = device_type
    driver = Driver(guest, device)
    assert guest.config_read(driver.slot, 0, 4) == id << 16 | 0x1AF4
    assert guest.config_read(driver.slot, 8, 1) == 0, "legacy drivers want revision 0"
    assert guest.config_read(driver.slot, 0x2C, 4) == device_type << 16 | 0x1AF4


def test_features_are_the_low_ones(driver: Driver) -> None:
    assert driver.get(FEATURES, 4) == OFFERED & 0xFFFFFFFF | ANY_LAYOUT
    driver.set(FEATURES, 4, 0)
    assert driver.get(FEATURES, 4) == OFFERED & 0xFFFFFFFF | ANY_LAYOUT
    driver.set(ACCEPTED, 4, 1 << 5 | 1 << 6)
    assert driver.get(ACCEPTED, 4) == 1 << 5 | 1 << 6


@pytest.mark.parametrize("size", [1 << shift for shift in range(16)])
def test_ring_addresses_are_those_of_vring_init(size: int) -> None:
    """As Linux' vring_init and the specification's formula have them."""
    descriptors, available, used = ring_addresses(3, size)
    assert (descriptors, available) == (3 * 4096, 3 * 4096 + 16 * size)
    end = available + struct.calcsize(f"<HH{size}HH")
    assert used % 4096 == 0 and end <= used < end + 4096


def test_driver_ok_activates_without_features_ok(driver: Driver) -> None:
    driver.probe(1 << 5 | 1 << 6 | ANY_LAYOUT)
    assert [call for call in driver.device.calls if call != "reset"] == []
    driver.set(STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    queues = [
        QueueConfig(0, 256, PAGE << 12, (PAGE << 12) + 4096, (PAGE << 12) + 8192),
        QueueConfig(1, 64, (PAGE + 16) << 12, (PAGE + 16 << 12) + 1024, (PAGE + 17) << 12),
    ]
    assert driver.device.calls[-1] == ("activate", 1 << 5 | ANY_LAYOUT, queues)
    assert driver.status == ACKNOWLEDGE | DRIVER | DRIVER_OK


def test_queue_registers(driver: Driver) -> None:
    assert (driver.get(SIZE, 2), driver.get(ADDRESS, 4)) == (256, 0)
    driver.set(SIZE, 2, 16)
    assert driver.get(SIZE, 2) == 256
    driver.set_up_queue(1, PAGE)
    assert (driver.get(SIZE, 2), driver.get(ADDRESS, 4)) == (64, PAGE)
    driver.set(ADDRESS, 4, PAGE + 1)
    assert driver.get(ADDRESS, 4) == PAGE + 1, "not live yet"
    driver.set(ADDRESS, 4, 0)
    assert not driver.function.queues[1].enabled
    driver.set_up_queue(2, PAGE)
    assert (driver.get(SIZE, 2), driver.get(ADDRESS, 4), driver.get(SELECT, 2)) == (0, 0, 2)
    driver.set_up_queue(0, 0xFFFFFFFF)
    driver.set(STATUS, 1, DRIVER_OK)
    assert driver.device.calls[-1][2][0].descriptors == 0xFFFFFFFF << 12


def test_a_live_ring_stays_and_address_zero_resets(driver: Driver) -> None:
    driver.start()
    driver.set_up_queue(0, PAGE + 5)
    assert driver.get(ADDRESS, 4) == PAGE
    assert driver.device.calls[-1] != "reset"
    driver.set(ADDRESS, 4, 0)
    assert driver.device.calls[-1] == "reset"
    assert (driver.status, driver.get(ADDRESS, 4), driver.board.kicks) == (0, 0, [])


def test_kicks_are_there_while_a_legacy_driver_runs_the_device(driver: Driver) -> None:
    assert driver.board.kicks == []
    driver.start()
    function, port = driver.function, driver.base + NOTIFY
    wanted = [("pio", port, 2, function.kick_fd(queue), queue) for queue in range(2)]
    kicks = driver.board.kicks
    assert [(kick.space, kick.address, kick.size, kick.fd, kick.value) for kick in kicks] == wanted
    driver.set(NOTIFY, 2, 1)
    assert os.eventfd_read(function.kick_fd(1)) == 1
    driver.guest.config_write(driver.slot, 4, 2, 0)
    assert kicks == []
    driver.guest.config_write(driver.slot, 4, 2, 1)
    assert len(kicks) == 2
    driver.set(STATUS, 1, 0)
    assert kicks == []


def test_other_notifications_reach_the_queue_as_well(driver: Driver) -> None:
    driver.start()
    driver.set(NOTIFY, 4, 1)  # with status and ISR behind it: no reset, status bits are there
    assert driver.device.calls[-1] == "reset", "a status of zero is one all the same"
    driver.start()
    driver.set(NOTIFY, 1, 1)
    assert os.eventfd_read(driver.function.kick_fd(1)) == 1
    driver.set(NOTIFY, 2, 2)
    driver.set(NOTIFY, 2, 0xFFFF)
    assert driver.get(NOTIFY, 2) == 0


def test_the_first_notification_starts_the_device(driver: Driver) -> None:
    """Linux before 3.18 used its disk while it probed, and set DRIVER_OK afterwards."""
    driver.probe()
    driver.set(NOTIFY, 2, 7)
    assert not driver.function.active, "there is no such queue"
    driver.set(NOTIFY, 2, 1)
    assert driver.function.active
    assert os.eventfd_read(driver.function.kick_fd(1)) == 1
    assert driver.status == ACKNOWLEDGE | DRIVER
    assert len(driver.board.kicks) == 2
    calls = list(driver.device.calls)
    driver.set(ACCEPTED, 4, 0)
    assert driver.get(ACCEPTED, 4) == OFFERED & 0xFFFFFFFF, "the device looked"
    driver.set(STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert driver.device.calls == calls
    assert driver.status == ACKNOWLEDGE | DRIVER | DRIVER_OK


def test_a_notification_does_not_start_what_has_no_ring(driver: Driver) -> None:
    driver.set(STATUS, 1, ACKNOWLEDGE | DRIVER)
    driver.set(NOTIFY, 2, 0)
    assert driver.device.calls == []
    driver.device.refuse = "the ring is nowhere"
    driver.set_up_queue(0, PAGE)
    driver.set(NOTIFY, 2, 0)
    assert driver.status & NEEDS_RESET
    driver.device.refuse = None
    driver.set(NOTIFY, 2, 0)
    assert not driver.function.active, "only a reset helps"


def test_a_broken_device_can_be_reset_and_goes_on(driver: Driver) -> None:
    driver.start()
    assert driver.device.events is not None
    driver.device.events.needs_reset("the ring is nonsense")
    assert driver.status == ACKNOWLEDGE | DRIVER | DRIVER_OK | NEEDS_RESET
    assert driver.line
    assert driver.get(ISR, 1) == 2
    assert not driver.line
    driver.start()
    assert driver.status == ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert driver.device.calls[-1][0] == "activate"


def test_isr_is_cleared_by_reading_and_lowers_the_line(driver: Driver) -> None:
    driver.start()
    os.eventfd_write(driver.function.call_fd(0), 1)
    driver.board.run_main_loop()
    driver.function.config_changed()
    assert driver.line
    driver.set(ISR, 1, 0xFF)
    assert driver.line, "writing it is nothing"
    assert driver.get(ISR, 1) == 3
    assert not driver.line
    assert driver.get(ISR, 1) == 0
    driver.function.config_changed()
    assert driver.get(STATUS, 2) >> 8 == 2, "a wider read reads it too"
    assert not driver.line


def test_device_configuration_moves_with_msix(driver: Driver) -> None:
    guest = driver.guest
    assert driver.get(20, 4) == 0x04030201
    driver.set(24, 1, 0xAB)
    assert driver.device.calls[-1] == ("write_config", 4, b"\xab")
    assert driver.get(STATUS, 4) == 0x0201 << 16
    guest.config_write(driver.slot, driver.msix, 2, 0x8000)
    assert driver.get(20, 4) == 0xFFFF_FFFF
    driver.set(20, 2, 2)
    driver.set(SELECT, 2, 1)
    driver.set(22, 2, 1)
    assert (driver.get(20, 2), driver.get(22, 2)) == (2, 1)
    driver.set(22, 2, 3)
    assert driver.get(22, 2) == 0xFFFF, "there are three vectors"
    driver.set(SELECT, 2, 9)
    assert driver.get(22, 2) == 0xFFFF
    assert driver.get(24, 4) == 0x04030201
    assert driver.get(22, 4) == 0x0201 << 16 | 0xFFFF
    driver.set(22, 4, 0xBBAA0000)
    assert driver.device.calls[-1] == ("write_config", 0, b"\xaa\xbb")
    guest.config_write(driver.slot, driver.msix, 2, 0)
    assert driver.get(20, 4) == 0x04030201
    assert driver.get(124, 4) == 0, "past the end"


def test_a_function_of_its_own_identity_is_legacy_only(guest: Any) -> None:
    device = FakeDevice()
    device.queue_sizes = ()
    driver = Driver(guest, device, PciIdentity(0x0B5D, 0x0777, 0x078000, 0, 0x0B5D, 0xFFFF))
    assert guest.config_read(driver.slot, 0, 4) == 0x0777_0B5D
    assert guest.config_read(driver.slot, 0x2C, 4) == 0xFFFF_0B5D
    assert guest.capabilities(driver.slot) == []
    assert [guest.config_read(driver.slot, 0x14 + 4 * bar, 4) for bar in range(5)] == [0] * 5
    assert driver.get(FEATURES, 4) == OFFERED & 0xFFFFFFFF
    driver.start()
    driver.function.config_changed()
    assert driver.line
    assert driver.get(ISR, 1) == 2
    driver.set(STATUS, 1, FEATURES_OK)
    assert not driver.status & FEATURES_OK


accesses = st.lists(
    st.tuples(
        st.sampled_from("rrwwwwwmkdp"),
        st.integers(0, 27) | st.integers(0, 127) | st.sampled_from((ADDRESS, SELECT, NOTIFY, STATUS)),
        st.sampled_from((1, 2, 4)),
        st.sampled_from((0, 1, 2, 4, 7, 8, 0xFFFF)) | st.integers(0, (1 << 32) - 1),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(accesses)
def test_whatever_an_old_driver_does_nothing_raises(fake_guest: Any, steps: list[Any]) -> None:
    """Any width, anywhere, also through both layouts at once; the device sees only what it was promised."""
    guest = fake_guest()
    device = FakeDevice()
    driver = Driver(guest, device)
    guest.config_write(driver.slot, 4, 2, 3)
    common = guest.config_read(driver.slot, 0x20, 4) & ~0xF
    function = driver.function
    for kind, offset, size, value in steps:
        value &= (1 << 8 * size) - 1
        if kind == "r":
            assert 0 <= driver.get(offset, size) < 1 << 8 * size or offset + size > 128
        elif kind == "w":
            driver.set(offset, size, value)
        elif kind == "m":
            guest.mmio.write(common + offset, size, value)
        elif kind == "k":
            driver.set(NOTIFY, 2, value & 3)
        elif kind == "p":
            driver.probe(value)
        else:
            guest.config_write(
                driver.slot, *((4, 2, value & 3) if offset & 1 else (driver.msix, 2, value << 15))
            )
        guest.board.run_main_loop()
        assert bool(guest.board.kicks) or not function._legacy._kicks
        if not function.active:
            assert not [kick for kick in guest.board.kicks if kick.space == "pio"]
        assert driver.line == (bool(function.isr) and not function.msix.enabled)
        assert function.status & ~0xFF == 0
    active = False
    for call in device.calls:
        if call == "reset":
            active = False
        elif call[0] == "activate":
            assert not active, "activated twice without a reset"
            assert call[1] & ~(OFFERED | VERSION_1 | ANY_LAYOUT) == 0
            active = True
        elif call[0] == "set_call":
            assert active
    guest.close()
    assert device.calls[-1] == "close"
