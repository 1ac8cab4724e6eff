"""Clients that connect to a port's socket: one at a time, ends of file, those who are early and those who
hang up.
"""

import os
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.console_driver import OPEN, PORT_READY, Machine, at_end, take
from vmrun.machine import ports
from vmrun.machine.loop import EventLoop
from vmrun.machine.ports import PortListener


class Listening:
    """A machine whose port 1 is `path`."""

    def __init__(self, path: Path) -> None:
        self.machine = Machine()
        self.path = path
        self.listener = PortListener(self.machine.loop, [self.machine.device.port("one")], path)
        self.machine.start_all(1)
        self.clients: list[socket.socket] = []

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        directory = os.open(self.path.parent, os.O_PATH)
        client.connect(f"/proc/self/fd/{directory}/{self.path.name}")
        os.close(directory)
        client.setblocking(False)
        self.machine.settle()
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.listener.close()
        self.listener.close()
        self.machine.close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    listening = Listening(tmp_path / "port")
    yield listening
    listening.close()
    assert not listening.path.exists()


def test_clients_wait_while_somebody_inside_speaks_first(listening: Listening) -> None:
    machine = listening.machine
    listening.listener.hold()
    client = listening.client()
    client.send(b"later")
    machine.give(1, 64)
    machine.settle()
    assert machine.read(1) == b"" and not machine.turn(), "they wake nobody"
    assert listening.listener.links[0].free
    listening.listener.admit()
    machine.settle()
    assert machine.read(1) == b"later"


def test_one_after_the_other(listening: Listening) -> None:
    machine = listening.machine
    first, second, third = (listening.client() for _ in range(3))
    second.send(b"me too")
    machine.write(1, b"hello")
    assert (take(first), take(second)) == (b"hello", b"")
    machine.give(1, 64)
    assert machine.read(1) == b""
    assert not machine.turn(), "waiting clients wake nobody"
    first.close()
    machine.settle()
    assert machine.read(1) == b"me too"
    assert [message[:3] for message in machine.hear() if message[1] == OPEN][-2:] == [
        (1, OPEN, 0),
        (1, OPEN, 1),
    ]
    machine.say(1, OPEN, 0)
    assert at_end(second) and not at_end(third)
    machine.write(1, b"third time")
    assert take(third) == b"third time"


def test_a_guest_that_closes_does_not_reset_a_client_that_wrote(listening: Listening) -> None:
    """The client reads to the end of file, though nobody read what it sent."""
    client = listening.client()
    client.send(bytes(100_000))
    listening.machine.write(1, b"good")
    listening.machine.say(1, OPEN, 0)
    assert take(client, 4) == b"good" and at_end(client)
    with pytest.raises(BrokenPipeError):
        client.send(b"x")


def test_the_words_of_one_who_is_gone_make_way_for_the_next(listening: Listening) -> None:
    machine = listening.machine
    machine.say(1, OPEN, 0)
    gone = listening.client()
    gone.send(b"anybody?")
    gone.close()
    machine.settle()
    assert not machine.turn()
    machine.say(1, OPEN, 1)
    machine.give(1, 64)
    assert machine.read(1) == b"anybody?", "the guest opened in time"
    machine.settle()
    machine.say(1, OPEN, 0)
    gone = listening.client()
    gone.send(b"anybody?")
    gone.close()
    client = listening.client()
    client.send(b"me!")
    machine.say(1, OPEN, 1)
    machine.give(1, 64)
    assert machine.read(1) == b"me!"


def test_one_who_is_gone_is_heard_out_by_a_guest_that_listens(listening: Listening) -> None:
    machine = listening.machine
    gone = listening.client()
    gone.send(b"first")
    machine.give(1, 2)
    gone.close()
    client = listening.client()
    client.send(b"second")
    machine.settle()
    assert machine.read(1) == b"fi"
    machine.give(1, 64)
    assert machine.read(1) == b"rst"
    machine.give(1, 64)
    machine.settle()
    assert machine.read(1) == b"second"


def test_a_guest_that_is_deaf_to_one_who_is_gone_holds_no_place(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = listening.machine
    later: list[Callable[[], None]] = []
    monkeypatch.setattr(machine.loop, "call_later", lambda seconds, call: later.append(call))
    gone = listening.client()
    gone.send(b"anybody?")
    gone.close()
    machine.settle()
    client = listening.client()
    client.send(b"me!")
    machine.give(1, 3)
    later.pop(0)()
    machine.settle()
    assert machine.read(1) == b"any", "it is only slow"
    (link,) = listening.listener.links
    assert not link.free
    later.pop(0)()
    machine.settle()
    assert not later
    machine.give(1, 64)
    assert machine.read(1) == b"me!"
    client.close()
    machine.settle()
    assert link.free


def test_what_one_who_is_gone_has_said_stays_while_nobody_else_comes(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = listening.machine
    later: list[Callable[[], None]] = []
    monkeypatch.setattr(machine.loop, "call_later", lambda seconds, call: later.append(call))
    gone = listening.client()
    gone.send(b"anybody?")
    gone.close()
    machine.settle()
    later.pop(0)()
    machine.settle()
    machine.give(1, 64)
    assert machine.read(1) == b"anybody?"


def test_clients_before_the_driver(tmp_path: Path) -> None:
    listening = Listening(tmp_path / "port")
    try:
        listening.machine.device.reset()
        listening.machine.settle()
        client = listening.client()
        client.send(b"early")
        listening.machine.start_all()
        listening.machine.say(1, PORT_READY, 1)
        assert (1, OPEN, 1, b"") in listening.machine.hear()
        listening.machine.give(1, 64)
        listening.machine.say(1, OPEN, 1)
        assert listening.machine.read(1) == b"early"
    finally:
        listening.close()


def test_strangers_are_not_let_in(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports.os, "geteuid", lambda: 4711)  # type: ignore[attr-defined]
    monkeypatch.setattr(ports, "UCRED", type("", (), {"size": 12, "unpack": lambda data: (1, 4712, 1)}))
    assert at_end(listening.client())
    monkeypatch.undo()
    client = listening.client()
    listening.machine.write(1, b"x")
    assert take(client) == b"x"


def test_no_descriptors_left(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    later = []

    class Full:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def accept(self) -> None:
            raise OSError(24, "Too many open files")

    real = listening.listener._socket
    monkeypatch.setattr(listening.listener, "_socket", Full())
    monkeypatch.setattr(listening.machine.loop, "call_later", lambda seconds, call: later.append(call))
    client = listening.client()
    assert len(later) == 1 and not listening.machine.turn()
    monkeypatch.undo()
    later[0]()
    listening.machine.settle()
    listening.machine.write(1, b"now")
    assert take(client) == b"now"


def test_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    listening = Listening(directory / "port")
    client = listening.client()
    listening.machine.write(1, b"x")
    assert take(client) == b"x"
    listening.close()
    with pytest.raises(FileNotFoundError):
        Listening(tmp_path / "none" / "port")


def test_descriptors_passed_along_are_not_kept(listening: Listening) -> None:
    """Descriptors that a client sends do not stay open in the VMM."""
    client = listening.client()
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(client, [b"with a descriptor"], [0])
    listening.machine.give(1, 64)
    assert listening.machine.read(1) == b"with a descriptor"
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_loop_tells_of_hangups() -> None:
    """Also when neither reading nor writing is of interest, and not once it was told to stop."""
    loop = EventLoop()
    ours, theirs = socket.socketpair()
    seen = []

    def hung_up() -> None:
        seen.append("hung up")
        loop.watch_hangup(ours.fileno(), None)
        loop.call_soon(loop.stop)

    with ours:
        loop.watch(ours.fileno(), lambda: seen.append("readable"))
        loop.watch(ours.fileno(), None)
        loop.watch_hangup(ours.fileno(), hung_up)
        theirs.send(b"x")
        assert not select.select([loop._epoll], [], [], 0)[0]
        theirs.close()
        loop.run()
        assert seen == ["hung up"]
        assert not select.select([loop._epoll], [], [], 0)[0] or os.eventfd_read(loop._wake_fd)
    loop.close()


def test_a_chain_of_more_buffers_than_the_kernel_takes_at_once(listening: Listening) -> None:
    """1024 in an indirect table, and some in the ring before it; one call takes 1024."""
    client = listening.client()
    (link,) = listening.listener.links
    pieces = [bytearray([number % 251]) for number in range(1100)]
    views = [memoryview(piece) for piece in pieces]
    taken = link.send(views)
    taken += link.send(views[taken:])
    assert taken == 1100 and take(client) == b"".join(pieces)
    client.send(b"y" * 1100)
    count = link.receive_into(views)
    count += link.receive_into(views[count:])
    assert count == 1100 and b"".join(pieces) == b"y" * 1100
