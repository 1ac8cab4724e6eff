"""Both streams of a console port against a model, through snapshots: nothing lost, doubled or out of order,
and nothing held by the device.
"""

import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from devices.virtio.console import TURN_BYTES
from tests.unit.console_driver import NAME, OPEN, PORT_READY, READY, Machine, take
from tests.unit.worker_driver import SIZE

BUFFER = 4608  # the least that a UNIX socket has
CHAIN = 20000


class Streams(RuleBasedStateMachine):
    """A guest and a client that talk through port 1. `out` and `input` are what is to arrive at the other."""

    @initialize()
    def begin(self) -> None:
        self.machine = Machine()
        self.machine.start_all(1)
        self.client = self.machine.connect(buffer=BUFFER)
        self.out = b""
        self.input = b""
        self.chains = 0  # of output under way
        self.buffers = 0  # for input under way
        self.counter = 0

    def fresh(self, size: int) -> bytes:
        """Bytes that say where they belong."""
        self.counter += 1
        return (b"%d," % self.counter * (size // 2 + 1))[:size]

    @rule(sizes=st.lists(st.integers(0, CHAIN), max_size=4), kick=st.booleans())
    def guest_writes(self, sizes: list[int], kick: bool) -> None:
        if self.chains == SIZE:
            return
        pieces = [self.fresh(size) for size in sizes] or [b""]
        self.machine.queues[5].offer(pieces, [])
        self.chains += 1
        self.out += b"".join(pieces)
        if kick:
            self.machine.kick(5)

    @rule(sizes=st.lists(st.integers(1, CHAIN), min_size=1, max_size=4), kick=st.booleans())
    def guest_gives_a_buffer(self, sizes: list[int], kick: bool) -> None:
        if self.buffers == SIZE:
            return
        self.machine.queues[4].offer([], sizes)
        self.buffers += 1
        if kick:
            self.machine.kick(4)

    @rule()
    def guest_collects(self) -> None:
        self.chains -= self.machine.written(1)
        answers = self.machine.queues[4].collect()
        self.buffers -= len(answers)
        for _, length, data in answers:
            assert length and data[:length] == self.input[:length]
            assert not data[length:].strip(b"\xee"), "more was written than was said"
            self.input = self.input[length:]

    @rule(limit=st.integers(1, CHAIN))
    def client_reads(self, limit: int) -> None:
        data = take(self.client, limit)
        assert data == self.out[: len(data)]
        self.out = self.out[len(data) :]

    @rule(size=st.integers(1, CHAIN))
    def client_writes(self, size: int) -> None:
        data = self.fresh(size)
        try:
            self.input += data[: self.client.send(data)]
        except BlockingIOError:
            pass

    @rule()
    def turn(self) -> None:
        self.machine.turn()

    @rule()
    def pause(self) -> None:
        self.machine.device.pause()
        self.machine.settle()
        self.machine.device.unpause()

    @rule()
    def restore(self) -> None:
        """Into another process, as it were, that got the connection."""
        self.machine.restore(("one",))

    @invariant()
    def nothing_is_held(self) -> None:
        if not hasattr(self, "machine"):
            return
        assert all(not queue.in_flight for queue in self.machine.device._queues.values())
        assert self.machine.events.reasons == []

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        for _ in range(10000):
            self.machine.settle()
            self.guest_collects()
            self.client_reads(1 << 20)
            if self.buffers < SIZE:
                self.guest_gives_a_buffer([CHAIN], True)
            self.machine.settle()
            self.machine.kick(5)
            if not self.out and not self.input and not self.chains:
                break
        assert (self.out, self.input, self.chains) == (b"", b"", 0)
        self.client.close()
        self.machine.settle()
        self.machine.close()


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@pytest.fixture
def machine() -> Any:
    machine = Machine(("one", "two"), console=True, size=(80, 25))
    yield machine
    machine.close()


def test_a_restored_guest_is_told_that_its_client_is_gone(machine: Machine) -> None:
    machine.start_all(0, 1, 2)
    with machine.connect("one") as client, machine.connect("two"):
        machine.hear()
        machine.device.resize(100, 30)
        client.send(b"lost with the process that had it")
        machine.restore()
    assert machine.device.read_config(0, 4) == b"\x64\0\x1e\0"
    told = machine.hear()
    assert sorted(message[:3] for message in told if message[1] == OPEN) == [(1, OPEN, 0), (2, OPEN, 0)]
    with machine.connect("one") as client:
        assert machine.hear() == [(1, OPEN, 1, b"")]
        machine.write(1, b"a new stream")
        assert take(client) == b"a new stream"


def test_a_client_may_be_there_before_the_restored_guest_runs(machine: Machine) -> None:
    machine.start_all(1)
    client = machine.connect("one")
    machine.hear()
    machine.restore(("one",))
    assert machine.hear() == [(1, OPEN, 0, b""), (1, OPEN, 1, b"")]
    client.close()


def test_the_ports_are_those_of_the_saved_machine(machine: Machine) -> None:
    machine.start()
    machine.say(0xFFFFFFFF, READY, 1)
    machine.device.remove_port("two")
    machine.add("three")
    machine.device.remove_port("one")
    machine.add("two")
    machine.restore()
    ports = {name: machine.device.port(name) for name in ("hvc", "two", "three")}
    assert {name: port.number for name, port in ports.items()} == {"hvc": 0, "two": 1, "three": 2}
    assert ports["two"].host is machine.links["two"] and ports["three"].host is None
    with pytest.raises(KeyError):
        machine.device.port("one")
    machine.say(1, PORT_READY, 1)
    machine.say(1, OPEN, 1)
    with machine.connect("two") as client:
        machine.write(1, b"it works")
        assert take(client) == b"it works"


def test_an_idle_device(machine: Machine) -> None:
    machine.restore()
    machine.start_all(1)
    with machine.connect() as client:
        machine.write(1, b"hello")
        assert take(client) == b"hello"


@pytest.mark.parametrize(
    "change",
    [
        {"max_ports": 4},
        {"size": {"columns": 65536, "rows": 1}},
        {"device_ready": 1},
        {"removed": 8},
        {"removed": -1},
        {"ports": None},
        {"ports": [{}] * 4},
        {"ports": [{"number": 3}]},
        {"ports": [{"number": 1, "name": "ff"}]},
        {"ports": [{"number": 0, "name": b"two".hex()}]},
        {"ports": [{"number": 2, "name": b"hvc".hex()}]},
    ],
)
def test_states_that_cannot_be(machine: Machine, change: dict[str, Any]) -> None:
    machine.device.pause()
    state = machine.device.save()
    other = Machine(("one",), console=True, size=(80, 25))
    try:
        other.device.load(state, None)
        state["own"].update(change)
        with pytest.raises(ValueError, match="virtio device 3"):
            other.device.load(state, None)
    finally:
        other.close()


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1},
        {"offset": True},
        {"offset": (1 << 32) + 1},
        {"ending": 0},
        {"ending": 32769},
        {"pending": 1 << 6},
        {"ready": None},
        {"told_open": 1},
    ],
)
def test_port_states_that_cannot_be(machine: Machine, change: dict[str, Any]) -> None:
    machine.device.pause()
    state = machine.device.save()
    state["own"]["ports"][1].update(change)
    other = Machine(("one", "two"), console=True, size=(80, 25))
    try:
        with pytest.raises(ValueError, match=next(iter(change))):
            other.device.load(state, None)
    finally:
        other.close()


def test_gigabytes_would_take_no_memory(machine: Machine) -> None:
    """What is under way is in the guest's ring and the socket, and in nothing else."""
    machine.start_all(1)
    with machine.connect("one") as client:
        data = os.urandom(TURN_BYTES)
        machine.write(1, b"warm")
        assert take(client) == b"warm"
        tracemalloc.start()
        for _ in range(16):
            machine.queues[5].offer([data], [])
            machine.kick(5)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * TURN_BYTES  # the driver's own buffer is one of them
        total = 0
        while total < 16 * len(data):
            piece = take(client, len(data))
            assert piece == (data + data)[total % len(data) :][: len(piece)]
            total += len(piece)
            machine.settle()


def test_a_slow_port_does_not_hold_the_other(machine: Machine) -> None:
    machine.start_all(1, 2)
    slow, quick = machine.connect("one", buffer=BUFFER), machine.connect("two")
    for _ in range(10):
        machine.write(1, bytes(CHAIN))
    machine.say(1, OPEN, 0)
    machine.say(2, PORT_READY, 1)
    assert (2, NAME, 1, b"two") in machine.hear()
    machine.write(2, b"quick")
    assert take(quick) == b"quick"
    for client in (slow, quick):
        client.close()
    machine.settle()


class Endless:
    """A host that takes and has any number of bytes."""

    def __init__(self) -> None:
        self.moved = 0

    def send(self, buffers: list[memoryview]) -> int:
        self.moved += sum(map(len, buffers))
        return sum(map(len, buffers))

    receive_into = send

    def guest_closed(self) -> None: ...


def test_a_flood_leaves_the_loop_time_for_others(machine: Machine) -> None:
    """With a host that is never full, each turn of the loop moves a bounded number of bytes either way."""
    machine.start_all(1)
    port = machine.device.port("one")
    host = port.host = Endless()
    port.host_opened()
    machine.settle()
    for _ in range(10):
        machine.queues[5].offer([bytes(700_000)], [])
        machine.queues[4].offer([], [700_000])
    for kick in machine.events.kicks[4:6]:
        os.eventfd_write(kick, 1)
    turns = 0
    while True:
        before = host.moved
        if not machine.turn():
            break
        turns += 1
        assert host.moved - before <= 2 * TURN_BYTES
    assert machine.written(1) == 10 and turns >= 20
    assert len(machine.queues[4].collect()) == 10
