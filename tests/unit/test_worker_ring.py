"""The thread of a ring: kicks, interrupts, sources, and stopping, with a real queue and a device that
counts.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from devices.errors import GuestError
from devices.virtio.queue import SplitQueue
from devices.worker.ring import DRAINED, MORE, NEED_SOURCE, RingServer
from tests.unit.worker_driver import AVAILABLE, Guest

BIT = 1 << 5


class Echo:
    """Queue 0 uses each chain at once, `batch` a round. Queue 1 uses one for each byte of its source."""

    features = BIT
    queue_count = 2

    def __init__(self) -> None:
        self.source, self.input = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.batch = 1000
        self.rounds = 0
        self.released: list[int] = []
        self.accepted = 0
        self.failure: Callable[[], Exception] | None = None
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.closed = False

    def set_features(self, features: int) -> None:
        self.accepted = features

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes([offset]) * size

    def write_config(self, offset: int, data: bytes) -> None:
        raise GuestError("no")

    def source_fd(self, index: int) -> int:
        return self.source if index == 1 else -1

    def process(self, index: int, queue: SplitQueue) -> int:
        self.rounds += 1
        for _ in range(self.batch):
            if index == 1:
                if queue.next_avail == int.from_bytes(queue._memory.read(AVAILABLE + 2, 2), "little"):
                    return DRAINED
                try:
                    os.read(self.source, 1)
                except BlockingIOError:
                    return NEED_SOURCE
            chain = queue.pop()
            if chain is None:
                return DRAINED
            self.entered.set()
            if self.gate is not None:
                assert self.gate.wait(20)
            if self.failure is not None:
                raise self.failure()
            queue.push(chain.head, 0)
        return MORE

    def release(self, index: int, queue: SplitQueue) -> None:
        self.released.append(index)

    def close(self) -> None:
        self.closed = True
        os.close(self.source)
        os.close(self.input)


class Bench:
    def __init__(self) -> None:
        self.device = Echo()
        self.reports: list[str] = []
        self.failures: list[str] = []
        self.server = RingServer(self.device, self.reports.append, self.failures.append)
        self.guest = Guest()
        self.kick, self.call, self.call2, self.err = (
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)
        )
        self.queue = self.guest.queue()

    def start(self, index: int = 0, kick: int | None = None) -> None:
        self.server.start_queue(index, self.queue, self.kick if kick is None else kick, self.call, self.err)

    def offer(self, kick: bool = True) -> None:
        self.guest.offer([b"x"], [])
        if kick:
            os.eventfd_write(self.kick, 1)

    def close(self) -> None:
        if not self.device.closed:
            self.server.close()
        self.queue.release()
        self.guest.close()
        for fd in (self.kick, self.call, self.call2, self.err):
            os.close(fd)


def signalled(fd: int, seconds: float = 20.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def take(bench: Bench) -> int:
    """Wait for an interrupt; how many chains were used."""
    assert signalled(bench.call)
    os.eventfd_read(bench.call)
    return len(bench.guest.collect())


def test_kick_and_interrupt(bench: Bench) -> None:
    bench.start()
    for _ in range(100):
        bench.offer()
        assert take(bench) == 1
    assert bench.server.stop_queue(0) == 100
    assert bench.device.released == [0]


def test_what_was_there_before_needs_no_kick(bench: Bench) -> None:
    bench.offer(kick=False)
    bench.start()
    assert take(bench) == 1


def test_one_interrupt_for_a_batch(bench: Bench) -> None:
    for _ in range(5):
        bench.offer(kick=False)
    bench.start()
    assert signalled(bench.call)
    bench.server.stop_queue(0)
    assert len(bench.guest.collect()) == 5
    assert os.eventfd_read(bench.call) == 1


def test_no_interrupt_for_a_driver_that_wants_none(bench: Bench) -> None:
    bench.guest.memory.write(AVAILABLE, b"\1\0")
    bench.offer(kick=False)
    bench.start()
    assert bench.device.entered.wait(20)
    bench.server.stop_queue(0)
    assert len(bench.guest.collect()) == 1
    assert not signalled(bench.call, 0)


def test_more_than_a_batch(bench: Bench) -> None:
    bench.device.batch = 2
    for _ in range(7):
        bench.offer(kick=False)
    bench.start()
    used = 0
    while used < 7:
        used += take(bench)
    assert used == 7


def test_stop_waits_for_the_request_at_hand(bench: Bench) -> None:
    bench.device.gate = threading.Event()
    bench.offer()
    bench.start()
    assert bench.device.entered.wait(20)
    result: list[int] = []
    stopper = threading.Thread(target=lambda: result.append(bench.server.stop_queue(0)))
    stopper.start()
    assert result == []
    bench.device.gate.set()
    stopper.join(20)
    assert result == [1]
    assert len(bench.guest.collect()) == 1


def test_a_guest_that_never_lets_it_run_dry_is_stopped_all_the_same(bench: Bench) -> None:
    bench.device.batch = 1
    bench.offer()
    bench.start()
    feeding = True

    def feed() -> None:
        while feeding:
            bench.guest.collect()
            if bench.guest.avail_idx - bench.guest.used_idx < 32:
                bench.guest.offer([b"x"], [])

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        assert bench.device.entered.wait(20)
        bench.server.stop_queue(0)
    finally:
        feeding = False
        feeder.join(20)


def test_a_moved_interrupt(bench: Bench) -> None:
    bench.start()
    bench.offer()
    assert take(bench) == 1
    bench.server.set_call(0, bench.call2)
    bench.offer()
    assert signalled(bench.call2)
    assert not signalled(bench.call, 0)
    bench.server.set_call(0, -1)
    bench.server.set_call(1, bench.call)  # does not run: nothing to move


def test_a_broken_ring_signals_err_and_rests(bench: Bench) -> None:
    bench.start()
    bench.guest.memory.write(AVAILABLE + 2, b"\xff\x7f")
    os.eventfd_write(bench.kick, 1)
    assert signalled(bench.err)
    assert "available index jumped" in bench.reports[0]
    assert bench.server.stop_queue(0) == 0
    assert bench.failures == []


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (lambda: OSError(5, "the tap is gone"), "queue 0: the tap is gone"),
        (lambda: KeyError("x"), "queue 0: KeyError: 'x'"),
    ],
)
def test_other_failures_are_the_workers(bench: Bench, failure: Callable[[], Exception], text: str) -> None:
    bench.device.failure = failure
    bench.offer()
    bench.start()
    bench.device.entered.wait(20)
    bench.server.stop_queue(0)
    assert bench.failures == [text]
    assert not signalled(bench.err, 0)


def test_a_source_is_watched_only_while_there_are_buffers(bench: Bench) -> None:
    os.write(bench.device.input, b"abc")
    bench.start(1)
    bench.offer()
    assert take(bench) == 1
    bench.offer()
    bench.offer()
    used = 0
    while used < 2:
        used += take(bench)
    # Buffers without input: the thread sleeps until the source has some.
    bench.offer()
    os.write(bench.device.input, b"d")
    while used < 3:
        used += take(bench)
    # Input without buffers must not keep the thread spinning: it lets go of the source.
    os.write(bench.device.input, b"e")
    deadline = time.monotonic() + 20
    while bench.device.source in watched():
        assert time.monotonic() < deadline, "the source is watched, and nobody will take its input"
    bench.server.stop_queue(1)


def watched() -> set[int]:
    """What the epoll instances of this process watch (proc(5), /proc/pid/fdinfo)."""
    fds = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            with open(f"/proc/self/fdinfo/{number}") as file:
                fds |= {int(line.split()[1]) for line in file if line.startswith("tfd:")}
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return fds


def test_without_a_kick_the_ring_is_polled(bench: Bench) -> None:
    bench.start(kick=-1)
    bench.offer(kick=False)
    assert take(bench) == 1


def test_server_passes_on_and_closes(bench: Bench) -> None:
    assert bench.server.features == BIT | 1 << 28 | 1 << 32
    bench.server.set_features(BIT)
    assert bench.device.accepted == BIT
    assert bench.server.read_config(3, 2) == b"\3\3"
    with pytest.raises(GuestError):
        bench.server.write_config(0, b"")
    bench.start()
    with pytest.raises(ValueError, match="runs already"):
        bench.start()
    bench.server.close()
    assert bench.device.closed
    assert bench.device.released == [0]


def test_start_and_stop_leave_nothing_open(bench: Bench) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(50):
        bench.start()
        bench.server.stop_queue(0)
    assert os.listdir("/proc/self/fd") == before
