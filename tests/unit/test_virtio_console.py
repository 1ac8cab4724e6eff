"""The virtio console through real rings: what the driver is told, the streams, and what broken ones send."""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.virtio import console
from devices.virtio.console import (
    CONTROL_QUEUE_SIZE,
    MAX_PORTS,
    PORT_QUEUE_SIZE,
    TURN_BYTES,
    VirtioConsole,
)
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC
from devices.virtio.transport import VirtioPciFunction
from tests.unit.console_driver import (
    ADD,
    CONSOLE,
    NAME,
    OPEN,
    PORT_READY,
    READY,
    REMOVE,
    RESIZE,
    Machine,
    at_end,
    take,
)

Make = Callable[..., Machine]


@pytest.fixture
def make() -> Iterator[Make]:
    machines: list[Machine] = []

    def do(*names: str, **options: Any) -> Machine:
        machines.append(Machine(names or ("one",), **options))
        return machines[-1]

    yield do
    for machine in machines:
        machine.close()


@pytest.fixture
def one(make: Make) -> Machine:
    """One port, opened by the guest."""
    machine = make()
    machine.start_all(1)
    return machine


def test_identity(guest: Any) -> None:
    ram = Machine()
    device = VirtioConsole(ram.memory, guest.board, size=(80, 25), emergency=lambda data: None)
    assert device.features & 0xFF == 7
    assert device.queue_sizes == (PORT_QUEUE_SIZE,) * 2 + (CONTROL_QUEUE_SIZE,) * 2 + (PORT_QUEUE_SIZE,) * 6
    assert struct.unpack("<HHII", device.read_config(0, 12)) == (80, 25, 4, 0)
    slot = guest.plug(VirtioPciFunction(device, guest.board))
    assert guest.config_read(slot, 0, 4) == 0x1003_1AF4
    ram.close()


def test_what_a_driver_is_told(make: Make) -> None:
    machine = make("one", "two", console=True, size=(80, 25))
    machine.start_all()
    assert machine.told == [(number, ADD, 1, b"") for number in range(3)]
    client = machine.connect("two")
    assert machine.hear() == [], "nothing before the driver has the port"
    machine.say(0, PORT_READY, 1)
    size = struct.pack("<HH", 80, 25)
    assert machine.hear() == [(0, CONSOLE, 1, b""), (0, RESIZE, 1, size), (0, NAME, 1, b"hvc")]
    machine.say(2, PORT_READY, 1)
    assert machine.hear() == [(2, NAME, 1, b"two"), (2, OPEN, 1, b"")]
    machine.say(1, PORT_READY, 1)
    assert machine.hear() == [(1, NAME, 1, b"one")]
    client.close()
    machine.settle()
    assert machine.hear() == [(2, OPEN, 0, b"")]


def test_messages_wait_for_buffers(make: Make) -> None:
    machine = make("one", "two")
    machine.start()
    machine.say(0, READY, 1)
    machine.queues[2].offer([], [8])
    machine.kick(2)
    assert len(machine.queues[2].collect()) == 1
    machine.queues[2].offer([], [64])
    machine.kick(2)
    ((_, length, data),) = machine.queues[2].collect()
    assert data[:length] == struct.pack("<IHH", 2, ADD, 1)


def test_a_reconnection_is_told_as_one(one: Machine) -> None:
    """However often clients came and went while the driver gave no buffers: closed, then open."""
    first = one.connect()
    assert one.hear() == [(1, OPEN, 1, b"")]
    one.queues[2].restart()  # what is there is of no use to the device
    one.device._queues[2].next_avail = one.device._queues[2].next_used = 0
    first.close()
    one.settle()
    for _ in range(5):
        with one.connect():
            pass
        one.settle()
    with one.connect():
        for _ in range(16):
            one.queues[2].offer([], [128])
        one.kick(2)
        assert one.hear() == [(1, OPEN, 0, b""), (1, OPEN, 1, b"")]
    one.settle()
    assert one.hear() == [(1, OPEN, 0, b"")]


def test_streams(one: Machine) -> None:
    with one.connect() as client:
        one.write(1, b"hel", b"lo")
        one.write(1, b" there")
        assert one.written(1) == 2
        assert take(client) == b"hello there"
        client.send(b"general")
        one.settle()
        one.give(1, 3, 2)
        assert one.read(1) == b"gener"
        one.give(1, 64)
        assert one.read(1) == b"al"
        client.send(b"!")
        one.settle()
        one.give(1, 64)
        assert one.read(1) == b"!"


def test_input_waits_until_the_guest_opens(make: Make) -> None:
    machine = make()
    machine.start_all()
    machine.say(1, PORT_READY, 1)
    with machine.connect() as client:
        client.send(b"early")
        machine.give(1, 64)
        assert machine.read(1) == b""
        machine.say(1, OPEN, 1)
        assert machine.read(1) == b"early"


def test_output_waits_for_a_client_and_is_for_one_only(one: Machine) -> None:
    one.write(1, b"x" * 100)
    assert one.written(1) == 0
    client = one.connect()
    assert one.written(1) == 1 and take(client) == b"x" * 100
    client.close()
    one.settle()
    one.write(1, b"y")
    assert one.written(1) == 0
    with one.connect() as client:
        assert take(client) == b"y"


def test_a_client_that_does_not_read_stops_the_guest(one: Machine) -> None:
    with one.connect(buffer=4096) as client:
        data = os.urandom(40 * 5000)
        for start in range(0, len(data), 5000):
            one.write(1, data[start : start + 5000])
        done = one.written(1)
        assert done < 10
        one.kick(5)
        assert one.written(1) == 0
        out = b""
        while piece := take(client, 3000):
            out += piece
            one.settle()
        assert out == data
        assert one.written(1) == 40 - done


def test_a_guest_that_does_not_read_stops_the_client(one: Machine) -> None:
    with one.connect(buffer=4096) as client:
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += client.send(b"z" * 1000)
                one.settle()
        assert sent < 100_000
        got = 0
        while got < sent:
            one.give(1, 700)
            got += len(one.read(1))
        assert got == sent


def test_a_chain_longer_than_a_turn(one: Machine) -> None:
    with one.connect() as client:
        data = os.urandom(3 * TURN_BYTES + 1)
        one.write(1, data[:7], data[7:])
        out = b""
        while len(out) < len(data):
            out += take(client)
            one.settle()
        assert out == data and one.written(1) == 1


def test_a_turn_is_bounded(one: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chains, however small: empty output, control messages, and input of a byte each."""
    monkeypatch.setattr(console, "BATCH", 8)
    with one.connect() as client:
        client.send(bytes(100))
        for index in (3, 4, 5):
            for _ in range(20):
                readable = [struct.pack("<IHH", 1, PORT_READY, 1)] if index == 3 else [b""]
                one.queues[index].offer([] if index == 4 else readable, [1] if index == 4 else [])
            assert one.device.serve(index, one.device._queues[index]), "there is more"
            assert len(one.queues[index].collect()) == 8
            one.kick(index)
            assert len(one.queues[index].collect()) == 12


def test_the_guest_closes(one: Machine) -> None:
    client = one.connect()
    one.write(1, b"last")
    one.say(1, OPEN, 0)
    assert take(client, 4) == b"last" and at_end(client)
    client.close()
    assert one.hear()[-1] == (1, OPEN, 0, b"")
    assert one.links["one"].free


def test_what_was_written_before_the_close_comes_before_the_end(one: Machine) -> None:
    """And what was written after it is for the next client, though the first has not read yet."""
    client = one.connect(buffer=4096)
    data = os.urandom(60000)
    for start in range(0, len(data), 6000):
        one.write(1, data[start : start + 6000])
    one.say(1, OPEN, 0)
    one.say(1, OPEN, 1)
    one.write(1, b"the next")
    out = b""
    while piece := take(client, 3000):
        out += piece
        one.settle()
    assert out == data and at_end(client)
    client.close()
    one.settle()
    with one.connect() as second:
        assert take(second) == b"the next" and not at_end(second)


def test_the_guest_closes_while_nobody_is_there(one: Machine) -> None:
    one.write(1, b"a message")
    one.say(1, OPEN, 0)
    client = one.connect()
    assert take(client, 9) == b"a message" and at_end(client)
    client.close()
    with one.connect() as client:
        assert not at_end(client)


def test_a_reset_ends_what_the_guest_had_opened(make: Make) -> None:
    machine = make("one", "two")
    machine.start_all(1)
    client, waiting = machine.connect("one"), machine.connect("two")
    machine.device.reset()
    machine.settle()
    assert at_end(client) and not at_end(waiting)
    client.close()
    machine.start_all(2)
    assert machine.hear() == [] and (2, OPEN, 1, b"") in machine.told
    machine.write(2, b"hello")
    assert take(waiting) == b"hello"
    waiting.close()


def test_ports_come_and_go(one: Machine) -> None:
    with one.connect() as client:
        one.write(1, b"bye")
        one.device.remove_port("one")
        one.settle()
        assert take(client, 3) == b"bye" and at_end(client)
    assert one.hear()[-1] == (1, REMOVE, 1, b"")
    one.write(1, b"into the void")
    assert one.written(1) == 2
    one.add("new")
    one.settle()
    assert one.hear() == [(1, ADD, 1, b"")]
    one.say(1, OPEN, 1)  # of the port that was there before
    one.say(1, PORT_READY, 1)
    assert one.hear() == [(1, NAME, 1, b"new")]
    assert not one.device.port("new").guest_open
    one.device.remove_port("new")
    one.add("newer")
    one.settle()
    assert one.hear() == [(1, REMOVE, 1, b""), (1, ADD, 1, b"")]
    with pytest.raises(KeyError):
        one.device.port("one")


def test_a_new_port_does_not_begin_with_what_was_left_in_an_old_one(one: Machine) -> None:
    with one.connect(buffer=4096):
        one.write(1, bytes(100_000))
        one.write(1, b"old")
        one.device.remove_port("one")
        one.add("new")
        one.settle()
    assert one.written(1) == 2
    one.say(1, PORT_READY, 1)
    one.say(1, OPEN, 1)
    with one.connect("new") as client:
        one.write(1, b"new")
        assert take(client) == b"new"


def test_a_broken_ring_of_a_port_that_is_removed(one: Machine) -> None:
    one.queues[5].offer([], [8])
    one.device._queues[5].size = 1
    one.memory.write(one.queues[5].base + 0x2002, b"\xff\x7f")
    one.device.remove_port("one")
    assert one.events.reasons == []
    one.settle()
    assert "jumped ahead" in one.events.reasons[0]


def test_ports_that_cannot_be(make: Make) -> None:
    machine = make("one", "two", console=True)
    for name in ("", "a/b", "a\nb", "x" * 65, "one"):
        with pytest.raises(ValueError, match="port"):
            machine.device.add_port(name)
    with pytest.raises(ValueError, match="2 ports exist"):
        machine.device.add_port("three")
    with pytest.raises(ValueError, match="a console already"):
        machine.device.add_port("console", console=True)
    for count in (1, MAX_PORTS + 1):
        with pytest.raises(ValueError, match="give 2 to"):
            VirtioConsole(machine.memory, machine.loop, max_ports=count)  # type: ignore[arg-type]
    ours, theirs = socket.socketpair()
    with machine.connect(), ours, theirs, pytest.raises(RuntimeError, match="in use"):
        machine.links["one"].connect(ours)


def test_size(make: Make) -> None:
    machine = make(console=True, size=(80, 25))
    machine.start_all(0)
    machine.device.resize(100, 40)
    machine.settle()
    assert machine.hear() == [(0, RESIZE, 1, struct.pack("<HH", 100, 40))]
    assert machine.events.config_changes == 1
    assert machine.device.read_config(0, 4) == struct.pack("<HH", 100, 40)
    machine.device.write_config(0, b"\1")
    assert machine.device.read_config(0, 4) == struct.pack("<HH", 100, 40)
    with pytest.raises(ValueError, match="65536"):
        machine.device.resize(80, 65536)
    with pytest.raises(ValueError, match="cannot"):
        make().device.resize(80, 25)


def test_emergency_output(make: Make) -> None:
    out: list[bytes] = []
    machine = make(emergency=out.append)
    machine.device.write_config(8, b"H\0\0\0")
    machine.device.write_config(8, b"i")
    machine.device.write_config(9, b"x")
    make().device.write_config(8, b"?")
    assert out == [b"H", b"i"]


def test_a_driver_without_multiport(make: Make) -> None:
    machine = make("one", console=True)
    machine.start(VIRTIO_F_INDIRECT_DESC)
    with machine.connect("hvc") as client:
        client.send(b"typed")
        machine.write(0, b"printed")
        machine.give(0, 64)
        assert (take(client), machine.read(0)) == (b"printed", b"typed")
        machine.control(b"nobody looks at this")
        machine.write(1, b"nor at that")
        assert machine.written(1) == 0
        machine.device.reset()
        machine.settle()
        assert not at_end(client), "a terminal's line stays"


def test_a_console_is_never_held(make: Make) -> None:
    machine = make(console=True)
    machine.start_all(0)
    machine.write(0, b"nobody is there")
    assert machine.written(0) == 1
    with machine.connect("hvc", buffer=4096):
        for _ in range(20):
            machine.write(0, bytes(10000))
        assert machine.written(0) == 20


def test_output_without_a_console_is_thrown_away(one: Machine) -> None:
    one.write(0, b"boot message")
    assert one.written(0) == 1


def test_half_closed_clients_get_the_output(one: Machine) -> None:
    client = one.connect()
    client.send(b"question")
    client.shutdown(1)
    one.give(1, 64)
    one.give(1, 64)
    assert one.read(1) == b"question"
    one.hear()
    one.write(1, b"answer")
    assert take(client, 6) == b"answer"
    client.close()
    one.settle()
    assert one.hear() == [(1, OPEN, 0, b"")]


def test_the_words_of_a_client_that_is_gone_are_delivered(one: Machine) -> None:
    client = one.connect()
    client.send(b"and goodbye")
    one.write(1, b"never read")
    client.close()
    one.settle()
    assert not one.links["one"].free
    one.give(1, 4)
    assert (1, OPEN, 0, b"") not in one.hear()
    one.give(1, 64)
    one.give(1, 64)
    assert one.read(1) == b"and goodbye"
    assert one.hear() == [(1, OPEN, 0, b"")]


def test_words_that_no_guest_listens_to_make_way(make: Make) -> None:
    machine = make()
    machine.start_all()
    machine.say(1, PORT_READY, 1)
    client = machine.connect()
    client.send(b"hello?")
    client.close()
    machine.settle()
    machine.hear()
    with machine.connect() as second:
        assert machine.hear() == [(1, OPEN, 0, b""), (1, OPEN, 1, b"")]
        second.send(b"hello!")
        machine.give(1, 64)
        machine.say(1, OPEN, 1)
        assert machine.read(1) == b"hello!"


@pytest.mark.parametrize(
    ("queue", "readable", "writable", "reason"),
    [
        (2, [b"x"], [64], "1 bytes to read and 64 to write"),
        (2, [], [7], "0 bytes to read and 7 to write"),
        (2, [], [], "0 to write"),
        (3, [b"1234567"], [], "control message with 7 bytes"),
        (3, [bytes(8)], [8], "8 to write"),
        (3, [], [], "0 bytes to read"),
        (4, [b"x"], [8], "1 bytes to read"),
        (4, [b"x"], [], "1 bytes to read and 0"),
        (5, [b"x"], [8], "8 bytes to write in output"),
        (5, [], [8], "8 bytes to write in output"),
    ],
)
def test_a_broken_driver_needs_a_reset(
    one: Machine, queue: int, readable: list[bytes], writable: list[int], reason: str
) -> None:
    client = one.connect()
    client.send(b"input")
    if queue == 2:
        one.queues[2].restart()
        one.device._queues[2].next_avail = one.device._queues[2].next_used = 0
        one.say(1, PORT_READY, 1)
    one.queues[queue].offer(readable or [b""], writable)
    one.kick(queue)
    assert len(one.events.reasons) == 1 and reason in one.events.reasons[0]
    one.kick(5)
    take(client, 0)
    assert at_end(client)
    client.close()
    one.device.reset()
    one.start_all(1)
    with one.connect() as client:
        one.write(1, b"again")
        assert take(client) == b"again"


def test_a_chain_that_shrinks_while_it_is_sent(one: Machine) -> None:
    with one.connect(buffer=4096):
        one.write(1, bytes(100_000))
        table = one.queues[5].base + 0x10000
        one.memory.write(table + 8, struct.pack("<I", 10))
        one.device.port("one").room()
        one.settle()
    assert "became shorter" in one.events.reasons[0]


def test_messages_that_say_nothing_are_logged_once(one: Machine, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        one.say(7, OPEN, 1)
        one.say(0xFFFFFFFF, PORT_READY, 1)
        one.say(1, 99, 1)
        one.say(1, PORT_READY, 0)
    assert len(caplog.records) == 1
    assert one.hear() == [] and one.events.reasons == []


def test_a_flood_of_openings_ends_the_stream_once(one: Machine) -> None:
    with one.connect() as client:
        one.hear()
        for _ in range(300):
            one.say(1, OPEN, 0)
            one.say(1, OPEN, 1)
            one.say(1, PORT_READY, 1)
        assert at_end(client)
    told = one.hear()
    assert len(told) < 20 and told[-1][:3] in ((1, OPEN, 0), (1, NAME, 1))
    with one.connect() as client:
        one.write(1, b"fine")
        assert take(client) == b"fine"


control = st.tuples(
    st.sampled_from((0, 1, 2, 3, 16, 0xFFFFFFFF)), st.integers(0, 8), st.sampled_from((0, 1, 2, 0xFFFF))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(control, st.booleans()), max_size=30))
def test_any_control_messages(messages: list[tuple[tuple[int, int, int], bool]]) -> None:
    """Whatever a driver says and whenever clients come: after a proper start the port works."""
    machine = Machine(("one", "two"), console=True, size=(80, 25))
    try:
        machine.start_all()
        client = None
        for message, change in messages:
            machine.say(*message)
            if change:
                if client is not None:
                    client.close()
                    machine.settle()
                    client = None
                elif machine.links["one"].free:
                    client = machine.connect()
            machine.hear()
        assert machine.events.reasons == []
        machine.device.reset()
        if client is not None:
            client.close()
        machine.settle()
        machine.start_all(1)
        with machine.connect() as client:
            machine.write(1, b"works")
            assert take(client) == b"works"
    finally:
        machine.close()
