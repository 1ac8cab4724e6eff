"""virtio-rng behind its registers, and with it what serves queues in the VMM: kicks, turns, errors, reset."""

import os
import struct
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.memory import GuestMemory, MemoryRegion
from devices.virtio.rng import MAX_REQUEST, QUEUE_SIZE, TURN_REQUESTS, VirtioRng
from devices.virtio.transport import VirtioPciFunction

RAM = 1 << 20
RING = 0x10  # page; QUEUE_SIZE descriptors, the available ring behind them, the used ring in the next page
DESCRIPTORS, AVAILABLE, USED = RING << 12, (RING << 12) + 16 * QUEUE_SIZE, (RING + 1) << 12
BUFFERS = 0x40000
NEXT, WRITE = 1, 2
NEEDS_RESET = 64


class Guest:
    """A legacy driver of the device, on a fake board."""

    def __init__(self, fake: Any) -> None:
        self.fake = fake
        fd = os.memfd_create("ram")
        os.ftruncate(fd, RAM)
        self.memory = GuestMemory([MemoryRegion(0, RAM, fd, 0)])
        os.close(fd)
        self.device = VirtioRng(self.memory, fake.board)
        self.function = VirtioPciFunction(self.device, fake.board, name="rng")
        slot = fake.plug(self.function)
        fake.config_write(slot, 4, 2, 1)
        self.base = fake.config_read(slot, 0x10, 4) & ~3
        self.available = 0

    def out(self, offset: int, size: int, value: int) -> None:
        self.fake.board.guest_out(self.base + offset, size, value)

    @property
    def status(self) -> int:
        return int(self.fake.pio.read(self.base + 18, 1))

    def start(self) -> None:
        self.out(18, 1, 0)
        self.memory.write(RING << 12, bytes(0x2000))
        self.available = 0
        self.out(18, 1, 3)
        self.out(4, 4, 0)
        self.out(14, 2, 0)
        self.out(8, 4, RING)
        self.out(18, 1, 7)

    def offer(self, head: int, parts: list[tuple[int, int, int]]) -> None:
        """Descriptors from `head` on: address, length, WRITE or 0."""
        for index, (address, length, flags) in enumerate(parts):
            more = index < len(parts) - 1
            entry = struct.pack("<QIHH", address, length, flags | (NEXT if more else 0), head + index + 1)
            self.memory.write(DESCRIPTORS + 16 * (head + index), entry)
        self.memory.write(AVAILABLE + 4 + 2 * (self.available % QUEUE_SIZE), struct.pack("<H", head))
        self.available += 1
        self.memory.write(AVAILABLE + 2, struct.pack("<H", self.available & 0xFFFF))

    def kick(self) -> None:
        self.out(16, 2, 0)
        self.fake.board.run_main_loop()

    @property
    def used(self) -> list[tuple[int, int]]:
        (count,) = struct.unpack("<H", self.memory.read(USED + 2, 2))
        return [struct.unpack("<II", self.memory.read(USED + 4 + 8 * i, 8)) for i in range(count)]  # type: ignore[misc]

    def close(self) -> None:
        self.fake.bus.close()
        self.memory.close()  # BufferError if a view of the ring was kept


@pytest.fixture
def rng(guest: Any) -> Iterator[Guest]:
    rng = Guest(guest)
    yield rng
    rng.close()


def test_identity(rng: Guest) -> None:
    assert rng.fake.config_read(1, 0, 4) == 0x1005_1AF4


def test_numbers_fill_exactly_what_was_offered(rng: Guest) -> None:
    rng.start()
    rng.offer(5, [(BUFFERS, 10, WRITE), (BUFFERS + 0x1000, 7, WRITE)])
    rng.kick()
    assert rng.used == [(5, 17)]
    first, second = rng.memory.read(BUFFERS, 0x1000), rng.memory.read(BUFFERS + 0x1000, 0x1000)
    assert first[:10].strip(b"\0") and second[:7].strip(b"\0")
    assert not first[10:].strip(b"\0") and not second[7:].strip(b"\0")
    rng.fake.board.run_main_loop()
    assert rng.fake.pio.read(rng.base + 19, 1) == 1


def test_numbers_differ(rng: Guest) -> None:
    rng.start()
    for head in range(2):
        rng.offer(head, [(BUFFERS + 64 * head, 64, WRITE)])
    rng.kick()
    assert rng.memory.read(BUFFERS, 64) != rng.memory.read(BUFFERS + 64, 64)


def test_a_request_is_bounded(rng: Guest) -> None:
    rng.start()
    rng.offer(0, [(BUFFERS, MAX_REQUEST - 1, WRITE), (BUFFERS + MAX_REQUEST, 0x1000, WRITE)])
    rng.kick()
    assert rng.used == [(0, MAX_REQUEST)]
    assert not rng.memory.read(BUFFERS + MAX_REQUEST + 1, 0x1000).strip(b"\0")


def test_a_long_queue_takes_several_turns_of_the_main_loop(rng: Guest) -> None:
    rng.start()
    for head in range(TURN_REQUESTS + 1):
        rng.offer(head, [(BUFFERS, 8, WRITE)])
    rng.kick()
    assert len(rng.used) == TURN_REQUESTS
    rng.fake.board.run_main_loop()
    assert rng.used == [(head, 8) for head in range(TURN_REQUESTS + 1)]
    rng.fake.board.run_main_loop()
    assert len(rng.used) == TURN_REQUESTS + 1


def test_buffers_from_before_driver_ok_are_served(rng: Guest) -> None:
    rng.start()
    rng.out(18, 1, 0)
    rng.out(14, 2, 0)
    rng.out(8, 4, RING)
    rng.offer(0, [(BUFFERS, 8, WRITE)])
    rng.out(18, 1, 7)
    rng.fake.board.run_main_loop()
    assert rng.used == [(0, 8)]


def test_no_interrupt_when_the_driver_wants_none(rng: Guest) -> None:
    rng.start()
    rng.memory.write(AVAILABLE, b"\1\0")
    rng.offer(0, [(BUFFERS, 8, WRITE)])
    rng.kick()
    rng.fake.board.run_main_loop()
    assert (len(rng.used), rng.fake.pio.read(rng.base + 19, 1)) == (1, 0)


@pytest.mark.parametrize(
    "parts",
    [
        [(BUFFERS, 8, 0)],
        [(BUFFERS, 8, 0), (BUFFERS, 8, WRITE)],
        [(BUFFERS, 0, WRITE)],
        [(RAM - 4, 8, WRITE)],
        [(1 << 63, 8, WRITE)],
    ],
)
def test_a_malformed_request_needs_a_reset_and_then_all_is_well(rng: Guest, parts: list[Any]) -> None:
    rng.start()
    rng.offer(0, [(BUFFERS, 8, WRITE)])
    rng.offer(1, parts)
    rng.kick()
    assert rng.status & NEEDS_RESET
    assert rng.used == [(0, 8)]
    rng.offer(8, [(BUFFERS, 8, WRITE)])
    rng.kick()
    assert rng.used == [(0, 8)], "nothing is touched any more"
    rng.start()
    rng.offer(3, [(BUFFERS, 8, WRITE)])
    rng.kick()
    assert (rng.status, rng.used) == (7, [(3, 8)])


def test_a_ring_outside_memory(rng: Guest) -> None:
    rng.out(8, 4, RAM >> 12)
    rng.out(18, 1, 7)
    assert rng.status & NEEDS_RESET
    rng.start()
    assert rng.status == 7


def test_wake_serves_without_a_kick(rng: Guest) -> None:
    rng.device.wake(0)
    rng.start()
    rng.fake.board.run_main_loop()
    rng.offer(0, [(BUFFERS, 8, WRITE)])
    rng.device.wake(0)
    rng.device.wake(7)
    rng.fake.board.run_main_loop()
    assert rng.used == [(0, 8)]


def test_reset_while_the_ring_is_busy(rng: Guest) -> None:
    """When the reset has returned, nothing in the ring's memory changes, whatever the main loop was at."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    kick_fd = rng.function.kick_fd(0)
    stop = threading.Event()
    failures: list[BaseException] = []

    def main_loop() -> None:
        try:
            while not stop.is_set():
                for callback in list(rng.fake.board.watched.values()):
                    callback()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=main_loop, daemon=True)
    thread.start()
    try:
        for _ in range(100):
            rng.start()
            for head in range(QUEUE_SIZE):
                rng.offer(head, [(BUFFERS + 16 * head, 16, WRITE)])
            os.eventfd_write(kick_fd, 1)
            rng.out(18, 1, 0)
            before = rng.memory.read(USED, 0x1000), rng.memory.read(BUFFERS, 0x1000)
            os.eventfd_write(kick_fd, 1)
            assert before == (rng.memory.read(USED, 0x1000), rng.memory.read(BUFFERS, 0x1000))
    finally:
        stop.set()
        thread.join(30)
        sys.setswitchinterval(switch)
    assert failures == []


descriptors = st.tuples(
    st.sampled_from((0, BUFFERS, RAM - 8, RAM, 1 << 52, (1 << 64) - 8, DESCRIPTORS, USED)),
    st.sampled_from((0, 1, 8, 16, 4096, MAX_REQUEST + 1, 0xFFFFFFFF)),
    st.integers(0, 7),
    st.integers(0, QUEUE_SIZE) | st.just(0xFFFF),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(descriptors, max_size=QUEUE_SIZE),
    st.lists(st.integers(0, QUEUE_SIZE), max_size=QUEUE_SIZE),
    st.integers(0, 0xFFFF),
)
def test_hostile_rings(fake_guest: Any, table: list[Any], heads: list[int], index: int) -> None:
    fake = fake_guest()
    rng = Guest(fake)
    rng.start()
    rng.memory.write(DESCRIPTORS, b"".join(struct.pack("<QIHH", *entry) for entry in table))
    rng.memory.write(AVAILABLE + 4, struct.pack(f"<{len(heads)}H", *heads))
    rng.memory.write(AVAILABLE + 2, struct.pack("<H", min(index, 2 * QUEUE_SIZE)))
    for _ in range(QUEUE_SIZE // TURN_REQUESTS + 2):
        rng.kick()
    rng.start()
    rng.offer(0, [(BUFFERS, 8, WRITE)])
    rng.kick()
    assert (rng.status, rng.used) == (7, [(0, 8)])
    rng.close()
