"""The modern virtio-pci transport as a driver meets it: capabilities, live queues, interrupts, reset."""

import fcntl
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.virtio.device import QueueConfig, QueueEvents
from devices.virtio.transport import VirtioPciFunction

VERSION_1 = 1 << 32
OFFERED = 1 << 5 | 1 << 28 | 1 << 40
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
NO_VECTOR = 0xFFFF
MSIX_ENABLE = 0x8000


class FakeDevice:
    """A virtio device that writes down what it is told."""

    device_id = 2
    features = OFFERED

    def __init__(self, queue_sizes: tuple[int, ...] = (256, 64)) -> None:
        self.queue_sizes = queue_sizes
        self.config = bytearray(range(1, 25))
        self.calls: list[Any] = []
        self.events: QueueEvents | None = None
        self.refuse: str | None = None
        self.on_reset: Callable[[], None] = lambda: None

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size]).ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        if self.refuse is not None:
            raise GuestError(self.refuse)
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
        self.on_reset()

    def close(self) -> None:
        self.calls.append("close")


class Driver:
    """The driver's side: finds the structures by the capabilities and uses the registers by their names."""

    FIELDS = {
        "device_feature_select": (0, 4),
        "device_feature": (4, 4),
        "driver_feature_select": (8, 4),
        "driver_feature": (12, 4),
        "config_msix_vector": (16, 2),
        "num_queues": (18, 2),
        "device_status": (20, 1),
        "config_generation": (21, 1),
        "queue_select": (22, 2),
        "queue_size": (24, 2),
        "queue_msix_vector": (26, 2),
        "queue_enable": (28, 2),
        "queue_notify_off": (30, 2),
        "queue_desc": (32, 8),
        "queue_driver": (40, 8),
        "queue_device": (48, 8),
    }

    def __init__(self, guest: Any, device: FakeDevice) -> None:
        self.guest = guest
        self.board = guest.board
        self.device = device
        self.function = VirtioPciFunction(device, guest.board, name="test0")
        self.slot = guest.plug(self.function)
        guest.config_write(self.slot, 4, 2, 2)
        self.caps: dict[int, int] = {}
        self.at: dict[int, int] = {}  # cfg_type -> address of the structure
        for capability, offset in guest.capabilities(self.slot):
            if capability == 0x11:
                self.msix_control = offset + 2
            else:
                cfg_type = guest.config_read(self.slot, offset + 3, 1)
                bar = guest.config_read(self.slot, offset + 4, 1)
                self.caps[cfg_type] = offset
                base = guest.config_read(self.slot, 0x10 + 4 * bar, 4) & ~0xF
                self.at[cfg_type] = base + guest.config_read(self.slot, offset + 8, 4)
        self.common, self.notify, self.isr, self.config = (self.at[cfg_type] for cfg_type in (1, 2, 3, 4))

    def get(self, name: str) -> int:
        offset, size = self.FIELDS[name]
        return int(self.guest.mmio.read(self.common + offset, size))

    def set(self, name: str, value: int) -> None:
        offset, size = self.FIELDS[name]
        self.board.guest_write(self.common + offset, size, value)

    @property
    def status(self) -> int:
        return self.get("device_status")

    def add_status(self, bits: int) -> None:
        self.set("device_status", self.status | bits)

    def read_isr(self) -> int:
        return int(self.guest.mmio.read(self.isr, 1))

    def accept(self, features: int) -> bool:
        self.add_status(ACKNOWLEDGE)
        self.add_status(DRIVER)
        for word in range(2):
            self.set("driver_feature_select", word)
            self.set("driver_feature", features >> 32 * word & 0xFFFFFFFF)
        self.add_status(FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def set_up_queue(self, index: int, vector: int = NO_VECTOR) -> None:
        self.set("queue_select", index)
        for offset, field in enumerate(("queue_desc", "queue_driver", "queue_device")):
            address = 0x1_0000_0000 + 0x10000 * index + 0x1000 * offset
            place = self.common + self.FIELDS[field][0]
            self.board.guest_write(place, 4, address & 0xFFFFFFFF)
            self.board.guest_write(place + 4, 4, address >> 32)
        self.set("queue_msix_vector", vector)
        self.set("queue_enable", 1)

    def start(self, features: int = OFFERED | VERSION_1) -> None:
        assert self.accept(features)
        for index in range(len(self.device.queue_sizes)):
            self.set_up_queue(index, index + 1)
        self.set("config_msix_vector", 0)
        self.add_status(DRIVER_OK)

    def switch_msix(self, on: bool) -> None:
        self.guest.config_write(self.slot, self.msix_control, 2, MSIX_ENABLE if on else 0)

    @property
    def line(self) -> bool:
        return bool(self.board.lines[0].level)


@pytest.fixture
def driver(guest: Any) -> Iterator[Driver]:
    yield Driver(guest, FakeDevice())


def test_identity(driver: Driver) -> None:
    guest, slot = driver.guest, driver.slot
    assert guest.config_read(slot, 0, 4) == 0x1001_1AF4
    assert guest.config_read(slot, 8, 4) == 0x01000000
    assert guest.config_read(slot, 0x2C, 2) == 0x1AF4
    assert guest.config_read(slot, 0x2E, 2) == 2
    assert guest.config_read(slot, 0x3D, 1) == 1
    assert sorted(driver.caps) == [1, 2, 3, 4, 5]
    assert driver.get("num_queues") == 2
    notify = driver.caps[2]
    assert guest.config_read(slot, notify + 2, 1) == 20
    assert guest.config_read(slot, notify + 16, 4) == 4
    assert guest.config_read(slot, notify + 12, 4) == 8
    assert guest.config_read(slot, driver.msix_control, 2) == 2  # three vectors


def test_unknown_device_types_are_modern_only_and_have_a_class(guest: Any) -> None:
    device = FakeDevice()
    device.device_id = 63
    function = VirtioPciFunction(device, guest.board)
    slot = guest.plug(function)
    assert guest.config_read(slot, 0, 4) == 0x107F_1AF4
    assert guest.config_read(slot, 8, 4) == 0xFF000001
    assert guest.config_read(slot, 0x2E, 2) >= 0x40
    assert guest.config_read(slot, 0x10, 4) == 0, "no legacy BAR"


def test_features_are_offered_by_word(driver: Driver) -> None:
    words = []
    for select in (0, 1, 2, 0xFFFFFFFF):
        driver.set("device_feature_select", select)
        words.append(driver.get("device_feature"))
    assert words == [OFFERED & 0xFFFFFFFF, OFFERED >> 32 | 1, 0, 0]


@pytest.mark.parametrize(
    ("features", "fine"),
    [
        (VERSION_1, True),
        (VERSION_1 | OFFERED, True),
        (OFFERED, False),
        (0, False),
        (VERSION_1 | 1, False),
        (VERSION_1 | 1 << 63, False),
    ],
)
def test_features_ok(driver: Driver, features: int, fine: bool) -> None:
    assert driver.accept(features) is fine
    assert driver.status == ACKNOWLEDGE | DRIVER | (FEATURES_OK if fine else 0)
    if fine:
        driver.set("driver_feature_select", 0)
        driver.set("driver_feature", 0xFFFFFFFF)
        assert driver.function.driver_features == features
    else:
        driver.add_status(DRIVER_OK)
        assert driver.status & NEEDS_RESET
        assert not driver.function.active


def test_features_beyond_64_bits_are_refused_too(driver: Driver) -> None:
    driver.set("driver_feature_select", 2)
    driver.set("driver_feature", 1)
    assert not driver.accept(VERSION_1)
    driver.set("driver_feature_select", 0x80000000)
    driver.set("driver_feature", 1)
    driver.set("driver_feature_select", 2)
    driver.set("driver_feature", 0)
    assert driver.accept(VERSION_1)


def test_driver_ok_activates_with_the_enabled_queues(driver: Driver) -> None:
    assert driver.accept(VERSION_1)
    driver.set("queue_select", 1)
    driver.set("queue_size", 16)
    driver.set_up_queue(1)
    driver.add_status(DRIVER_OK)
    queue = QueueConfig(1, 16, 0x1_0001_0000, 0x1_0001_1000, 0x1_0001_2000)
    assert driver.device.calls == [("activate", VERSION_1, [queue])]
    driver.set("device_status", driver.status)
    assert len(driver.device.calls) == 1, "writing the same status again does nothing"
    driver.set("device_status", DRIVER)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, "bits cannot be taken back"


def test_queue_registers(driver: Driver) -> None:
    assert driver.get("queue_size") == 256
    for bad in (0, 3, 255, 512, 0xFFFF):
        driver.set("queue_size", bad)
        assert driver.get("queue_size") == 256
    driver.set("queue_size", 128)
    assert driver.get("queue_size") == 128
    driver.set("queue_enable", 0)
    driver.set("queue_enable", 2)
    assert driver.get("queue_enable") == 0
    driver.set("queue_select", 1)
    assert (driver.get("queue_size"), driver.get("queue_notify_off")) == (64, 1)
    driver.set("queue_select", 2)
    assert driver.get("queue_select") == 2
    for name in (
        "queue_size",
        "queue_enable",
        "queue_notify_off",
        "queue_desc",
        "queue_driver",
        "queue_device",
    ):
        driver.set(name, 1)
        assert driver.get(name) == 0
    assert driver.get("queue_msix_vector") == NO_VECTOR


def test_a_live_queue_cannot_be_moved(driver: Driver) -> None:
    assert driver.accept(VERSION_1)
    driver.set_up_queue(0)
    before = [driver.get(name) for name in ("queue_size", "queue_desc", "queue_driver", "queue_device")]
    driver.set("queue_size", 16)
    for name in ("queue_desc", "queue_driver", "queue_device"):
        driver.set(name, 0xDEAD0000)
    driver.set("queue_enable", 0)
    assert before == [
        driver.get(name) for name in ("queue_size", "queue_desc", "queue_driver", "queue_device")
    ]
    assert driver.get("queue_enable") == 1
    driver.add_status(DRIVER_OK)
    driver.set_up_queue(1)
    assert driver.get("queue_enable") == 0, "too late: the device has looked"


def test_wrong_widths_do_what_the_bytes_say(driver: Driver) -> None:
    mmio, common = driver.guest.mmio, driver.common
    driver.set("queue_desc", 0x1122334455667788)
    assert mmio.read(common + 34, 2) == 0x5566
    assert mmio.read(common + 35, 4) == 0x22334455
    mmio.write(common + 33, 1, 0xAA)
    assert driver.get("queue_desc") == 0x112233445566AA88
    mmio.write(common + 16, 4, 0xFFFF0002)  # config_msix_vector and the read-only num_queues
    assert (driver.get("config_msix_vector"), driver.get("num_queues")) == (2, 2)
    mmio.write(common + 20, 4, 1 << 16 | ACKNOWLEDGE)  # status, generation, queue_select
    assert (driver.status, driver.get("queue_select")) == (ACKNOWLEDGE, 1)
    assert mmio.read(common + 56, 8) == 0
    assert mmio.read(common + 0xFFC, 8) == 0


def test_device_config(driver: Driver) -> None:
    mmio = driver.guest.mmio
    assert mmio.read(driver.config, 8) == 0x0807060504030201
    assert mmio.read(driver.config + 3, 2) == 0x0504
    assert mmio.read(driver.config + 0xFFE, 4) == 0
    mmio.write(driver.config + 4, 2, 0xBBAA)
    assert driver.device.calls == [("write_config", 4, b"\xaa\xbb")]
    driver.device.refuse = "no"
    mmio.write(driver.config, 1, 0)
    assert driver.status & NEEDS_RESET


def test_status_zero_resets_everything_before_it_returns(driver: Driver) -> None:
    driver.start()
    assert driver.function.active
    seen: list[int] = []
    driver.device.on_reset = lambda: seen.append(driver.function.status)
    driver.set("device_status", 0)
    assert seen and driver.device.calls[-1] == "reset"
    assert driver.status == 0
    assert not driver.function.active
    assert driver.function.driver_features == 0
    assert driver.get("config_msix_vector") == NO_VECTOR
    for index, size in enumerate((256, 64)):
        driver.set("queue_select", index)
        assert (driver.get("queue_size"), driver.get("queue_enable"), driver.get("queue_desc")) == (
            size,
            0,
            0,
        )
        assert driver.get("queue_msix_vector") == NO_VECTOR
    driver.start(VERSION_1)
    assert driver.device.calls[-1][0:2] == ("activate", VERSION_1)


def test_kicks_are_registered_while_the_bar_is_mapped(driver: Driver) -> None:
    board, guest = driver.board, driver.guest
    assert sorted((kick.space, kick.address, kick.size, kick.fd) for kick in board.kicks) == [
        ("mmio", driver.notify + 4 * queue, 0, driver.function.kick_fd(queue)) for queue in range(2)
    ]
    driver.start()
    board.guest_write(driver.notify + 4, 2, 1)
    assert driver.device.events is not None
    assert os.eventfd_read(driver.device.events.kick_fd(1)) == 1
    guest.config_write(driver.slot, 4, 2, 0)
    assert board.kicks == []
    guest.config_write(driver.slot, 0x20, 4, 0xD0000000)
    guest.config_write(driver.slot, 4, 2, 2)
    assert [kick.address for kick in board.kicks] == [0xD0003000, 0xD0003004]


def test_a_notification_that_reaches_the_bus_kicks_as_well(driver: Driver) -> None:
    mmio = driver.guest.mmio
    mmio.write(driver.notify + 4, 2, 0)
    mmio.write(driver.notify + 4, 4, 0)
    assert os.eventfd_read(driver.function.kick_fd(1)) == 2
    for offset in (8, 0xFFC):  # no such queue
        mmio.write(driver.notify + offset, 4, 0)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.function.kick_fd(0))
    os.eventfd_write(driver.function.kick_fd(0), (1 << 64) - 2)
    mmio.write(driver.notify, 2, 0)  # a full counter does not block a vCPU
    assert mmio.read(driver.notify, 4) == 0


def test_eventfds_do_not_block_and_are_not_inherited(driver: Driver) -> None:
    for fd in (driver.function.kick_fd(0), driver.function.call_fd(0)):
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_intx(driver: Driver) -> None:
    driver.start()
    fds = {driver.function.call_fd(queue) for queue in range(2)}
    assert len(fds) == 1
    os.eventfd_write(fds.pop(), 3)
    driver.board.run_main_loop()
    assert driver.line
    assert driver.guest.config_read(driver.slot, 6, 2) & 8
    driver.guest.config_write(driver.slot, 4, 2, 2 | 1 << 10)
    assert not driver.line
    driver.guest.config_write(driver.slot, 4, 2, 2)
    assert driver.line
    assert driver.read_isr() == 1
    assert not driver.line
    assert driver.read_isr() == 0
    driver.board.run_main_loop()
    assert not driver.line


def test_reset_takes_back_an_interrupt_on_its_way(driver: Driver) -> None:
    driver.start()
    os.eventfd_write(driver.function.call_fd(0), 1)
    callback = driver.board.watched[driver.function.call_fd(0)]
    driver.set("device_status", 0)
    callback()
    assert not driver.line
    driver.start()
    driver.function.config_changed()
    assert driver.line
    driver.set("device_status", 0)
    assert not driver.line
    assert driver.read_isr() == 0


def test_msix_calls(driver: Driver) -> None:
    driver.switch_msix(True)
    driver.start()
    vectors = driver.board.vectors
    assert [driver.function.call_fd(queue) for queue in range(2)] == [vectors[1].fd, vectors[2].fd]
    driver.device.calls.clear()
    driver.set("queue_select", 1)
    driver.set("queue_msix_vector", 0)
    assert driver.device.calls == [("set_call", 1, vectors[0].fd)]
    driver.set("queue_msix_vector", 3)
    assert driver.get("queue_msix_vector") == NO_VECTOR
    assert driver.device.calls[1:] == [("set_call", 1, -1)]
    driver.set("config_msix_vector", 3)
    assert driver.get("config_msix_vector") == NO_VECTOR


def test_switching_msix_while_active_moves_the_calls(driver: Driver) -> None:
    driver.start()
    intx = driver.function.call_fd(0)
    driver.device.calls.clear()
    driver.switch_msix(True)
    vectors = driver.board.vectors
    assert driver.device.calls == [("set_call", 0, vectors[1].fd), ("set_call", 1, vectors[2].fd)]
    os.eventfd_write(intx, 1)  # the device had not heard of it yet
    driver.board.run_main_loop()
    assert not driver.line
    assert [vector.take() for vector in vectors] == [0, 1, 1]
    driver.device.calls.clear()
    driver.switch_msix(False)
    assert driver.device.calls == [("set_call", 0, intx), ("set_call", 1, intx)]


def test_config_change(driver: Driver) -> None:
    driver.function.config_changed()
    assert not driver.line, "no interrupt before DRIVER_OK"
    assert driver.get("config_generation") == 1
    driver.start()
    driver.function.config_changed()
    assert driver.line
    assert driver.read_isr() == 2
    driver.switch_msix(True)
    driver.function.config_changed()
    assert not driver.line
    assert [vector.take() for vector in driver.board.vectors] == [1, 0, 0]
    assert driver.read_isr() == 2
    driver.set("config_msix_vector", NO_VECTOR)
    driver.function.config_changed()
    assert [vector.take() for vector in driver.board.vectors] == [0, 0, 0]
    for _ in range(252):
        driver.function.config_changed()
    assert driver.get("config_generation") == 0


def test_needs_reset_is_told_and_logged_once(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.device.refuse = "the ring is nonsense"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            driver.start()
            assert driver.status & NEEDS_RESET
            assert driver.line
            assert driver.read_isr() == 2
            driver.add_status(FAILED)
            assert driver.status & NEEDS_RESET
            driver.set("device_status", 0)
            assert driver.status == 0
    assert caplog.messages == ["test0 needs a reset: the ring is nonsense"]
    driver.set("device_status", NEEDS_RESET)
    assert driver.status == 0, "the driver cannot set it"


def test_the_main_loop_never_waits_for_a_reset(driver: Driver) -> None:
    """A device whose reset needs the main loop: callbacks there return while the lock is held."""
    driver.start()
    finished: list[bool] = []

    def main_loop() -> None:
        os.eventfd_write(driver.function.call_fd(0), 1)
        driver.board.run_main_loop()
        driver.function.config_changed()
        driver.function.needs_reset("its worker died")
        driver.read_isr()

    def reset() -> None:
        thread = threading.Thread(target=main_loop, daemon=True)
        thread.start()
        thread.join(10)
        finished.append(not thread.is_alive())

    driver.device.on_reset = reset
    driver.set("device_status", 0)
    assert finished == [True]
    assert driver.status == 0
    assert not driver.line


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Let threads take turns every few bytecodes instead of every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_vcpus_and_main_loop_at_the_same_time(driver: Driver, eager_threads: None) -> None:
    """One vCPU starts and resets, one moves the BAR and switches MSI-X, and interrupts come all the while."""
    guest, function = driver.guest, driver.function
    ecam = 0xE0000000 + (driver.slot << 15)
    stop = threading.Event()
    failures: list[BaseException] = []
    intx = function.call_fd(0)
    callback = driver.board.watched[intx]
    turns = {"mover": 0, "main loop": 0, "driver": 0}

    def mover() -> None:
        guest.mmio.write(ecam + 4, 2, 0)
        guest.mmio.write(ecam + driver.msix_control, 2, MSIX_ENABLE * (turns["mover"] & 1))
        guest.mmio.write(ecam + 4, 2, 2)

    def main_loop() -> None:
        os.eventfd_write(intx, 1)
        callback()
        function.config_changed()
        function.notify(turns["main loop"] & 1)
        if turns["main loop"] % 4 == 0:
            function.read_isr()

    def restart() -> None:
        # The BAR comes and goes: straight to the registers, as an access that was on its way does.
        with function.lock:
            function.set_driver_features(1, 1)
            function.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
            function.enable_queue(function.queues[0])
            function.set_queue_vector(function.queues[0], 1)
            function.set_status(DRIVER_OK)
        function.bars[4].device.write(20, 1, 0)

    def repeat(name: str, turn: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                turn()
                turns[name] += 1
                if min(turns.values()) >= 200:
                    stop.set()
        except BaseException as failure:
            failures.append(failure)
            stop.set()

    jobs = {"mover": mover, "main loop": main_loop, "driver": restart}
    threads = [threading.Thread(target=repeat, args=job, daemon=True) for job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    assert driver.line == (bool(function.isr) and not function.msix.enabled)
    assert function.config_generation == turns["main loop"] & 0xFF
    assert driver.device.calls.count("reset") == turns["driver"]


def test_pci_configuration_access(driver: Driver) -> None:
    guest, slot, window = driver.guest, driver.slot, driver.caps[5]

    def point(bar: int, offset: int, length: int) -> int:
        guest.config_write(slot, window + 4, 1, bar)
        guest.config_write(slot, window + 8, 4, offset)
        guest.config_write(slot, window + 12, 4, length)
        return window + 16

    bar = guest.config_read(slot, driver.caps[1] + 4, 1)
    guest.config_write(slot, 4, 2, 0)  # works without memory decoding: that is what it is for
    assert guest.config_read(slot, point(bar, 18, 2), 2) == 2
    guest.config_write(slot, point(bar, 20, 1), 1, ACKNOWLEDGE)
    assert driver.function.status == ACKNOWLEDGE
    guest.config_write(slot, point(bar, 0x3004, 2), 2, 1)
    assert os.eventfd_read(driver.function.kick_fd(1)) == 1
    guest.config_write(slot, window + 16, 4, 0x5A5A5A5A)
    os.eventfd_read(driver.function.kick_fd(1))
    beyond = ((bar, offset, 4) for offset in (0x4000, 0xFFFFFFFC))
    for nonsense in (
        (2, 0, 4),
        (6, 0, 4),
        (255, 0, 4),
        (bar, 1, 4),
        (bar, 0, 3),
        (bar, 0, 8),
        (bar, 0, 0),
        *beyond,
    ):
        data = point(*nonsense)
        guest.config_write(slot, data, 4, 0x11223344)
        assert guest.config_read(slot, data, 4) == 0x11223344
    guest.config_write(slot, point(1, 0, 4), 4, 0xFEE00000)
    guest.config_write(slot, 4, 2, 2)
    assert guest.mmio.read(guest.config_read(slot, 0x14, 4), 4) == 0xFEE00000


def test_close_releases_everything_in_order(guest: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    driver = Driver(guest, FakeDevice((8,) * 5))
    driver.start()
    os.eventfd_write(driver.function.call_fd(0), 1)
    [callback] = guest.board.watched.values()
    driver.function.config_changed()
    guest.bus.lock.acquire()
    driver.function.close()
    guest.bus.lock.release()
    assert driver.device.calls[-1] == "close"
    assert len(os.listdir("/proc/self/fd")) == before
    assert guest.board.watched == {}
    assert guest.board.kicks == []
    assert not driver.line
    callback()  # it was on its way
    driver.function.config_changed()
    driver.function.notify(0)
    driver.function.close()


registers = st.tuples(
    st.integers(0, 64) | st.integers(0, 0x4000) | st.sampled_from((20, 22, 28, 0x1000, 0x3000)),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((0, 1, 2, 4, 8, 15, 0xFFFF, (1 << 64) - 1)) | st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("rrwwwwcms"), registers), max_size=60))
def test_whatever_the_driver_does_the_transport_keeps_its_word(fake_guest: Any, accesses: list[Any]) -> None:
    """Any width, anywhere: nothing raises, and the device sees only what it was promised."""
    guest = fake_guest()
    device = FakeDevice()
    driver = Driver(guest, device)
    base = driver.common
    for kind, (offset, size, value) in accesses:
        value &= (1 << 8 * size) - 1
        if kind == "r":
            assert 0 <= guest.mmio.read(base + offset, size) < 1 << 8 * size
        elif kind == "w":
            guest.board.guest_write(base + offset, size, value)
        elif kind == "m":
            driver.switch_msix(bool(value & 1))
        elif kind == "s" and driver.accept(VERSION_1):
            driver.set_up_queue(value & 1, size)
            driver.add_status(DRIVER_OK)
        else:
            guest.config_write(
                driver.slot, driver.caps[5] + 4 + offset % 16, min(size, 4), value & 0xFFFFFFFF
            )
        guest.board.run_main_loop()
        function = driver.function
        for queue, limit in zip(function.queues, device.queue_sizes, strict=True):
            assert 0 < queue.size <= limit
            assert queue.size & (queue.size - 1) == 0
            assert queue.vector < 3 or queue.vector == NO_VECTOR
        assert function.status & ~0xFF == 0
        if function.status & FEATURES_OK:
            assert function.driver_features & ~(OFFERED | VERSION_1) == 0
            assert function.driver_features & VERSION_1
        if function.active and not function._legacy._running:  # the window reaches the other layout too
            assert function.status & (DRIVER_OK | FEATURES_OK) == DRIVER_OK | FEATURES_OK
        assert driver.line == (bool(function.isr) and not function.msix.enabled)
    active = False
    for call in device.calls:
        if call == "reset":
            active = False
        elif call[0] == "activate":
            assert not active, "activated twice without a reset"
            active = True
        elif call[0] == "set_call":
            assert active
    assert guest.config_read(driver.slot, 0, 4) == 0x1001_1AF4
    guest.close()
    assert device.calls[-1] == "close"
