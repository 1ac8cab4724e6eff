"""The agent's protocol against a hostile other end, in both directions, and its flow control as a model."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.agent_guest import ENV, agent
from vmrun.agent import files, protocol
from vmrun.agent import session as sessions
from vmrun.agent.process import Capture
from vmrun.agent.protocol import (
    CREDIT,
    DATA,
    END,
    EXIT,
    HEADER,
    MAGIC,
    REPLY,
    REQUEST,
    RESIZE,
    SIGNAL,
    STOP,
    WINDOW,
    AgentError,
    AgentGone,
    AgentProtocolError,
    frame,
)
from vmrun.agent.session import PULL, AgentSession
from vmrun.agent.streams import InputStream, OutputStream

OWN = b"guest's own nonc"
STARTED = struct.pack("<IB3xI", 0, 0, 7)


class FakeGuest:
    """The guest's end of a session, which says what a test wants."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.nonce = b""

    def answer_hello(self, noise: bytes = b"") -> None:
        hello = self.receive(protocol.HELLO.size)
        self.nonce = hello[24:40]
        self.sock.sendall(noise + protocol.hello(OWN, self.nonce))
        while True:
            hello = self.receive(protocol.HELLO.size)
            if hello[40:56] == OWN:
                return

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part
            data += part
        return data

    def frame(self) -> tuple[int, int, int, bytes]:
        kind, flags, channel, size = HEADER.unpack(self.receive(HEADER.size))
        return kind, flags, channel, self.receive(size)


@contextmanager
def fake(noise: bytes = b"") -> Iterator[tuple[AgentSession, FakeGuest]]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)  # less than a stream's window
    with theirs, AgentSession(ours) as host:
        guest = FakeGuest(theirs)
        thread = threading.Thread(target=guest.answer_hello, args=(noise,))
        thread.start()
        host.hello(20)
        thread.join()
        yield host, guest


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        os.urandom(200_000),
        MAGIC,
        MAGIC * 20,
        protocol.hello(OWN, protocol.NOBODY) * 3,
        protocol.hello(OWN, b"another's nonce!"),
        protocol.hello(OWN, b"another's nonce!")[:-3],
    ],
)
def test_hello_is_found_in_what_an_old_session_left(noise: bytes) -> None:
    with fake(noise) as (host, guest):
        # An answer to a hello sent twice is no surprise.
        guest.sock.sendall(protocol.hello(OWN, guest.nonce))
        thread = threading.Thread(target=host.ping)
        thread.start()
        _, _, channel, fields = guest.frame()
        guest.sock.sendall(frame(REPLY, 0, channel, struct.pack("<IB3x", 0, 0) + fields[4:]))
        thread.join()


def test_other_version() -> None:
    ours, theirs = socket.socketpair()

    def answer() -> None:
        hello = theirs.recv(protocol.HELLO.size)
        theirs.sendall(protocol.HELLO.pack(MAGIC, 9, 0, WINDOW, OWN, hello[24:40]))

    with theirs, AgentSession(ours) as host:
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(AgentError, match="version 9"):
            host.hello(20)
        thread.join()


def start(
    host: AgentSession, guest: FakeGuest, **options: object
) -> tuple[int, threading.Thread, list[object]]:
    """An exec whose reply has not come: its channel, and what comes of it."""
    outcome: list[object] = []

    def run() -> None:
        try:
            process = host.exec(["x"], env=ENV, **options)  # type: ignore[arg-type]
            outcome.append(process)
            outcome.append(process.wait(20))
        except AgentError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    kind, _, channel, _ = guest.frame()
    assert kind == REQUEST
    return channel, thread, outcome


BEFORE_START = [
    frame(DATA, 1, 1, b"x"),
    frame(EXIT, 0, 1, bytes(8)),
    frame(REPLY, 0, 1, b"short"),
    frame(REPLY, 0, 1, struct.pack("<IB3x", 1 << 20, 0)),
    frame(REPLY, 0, 1, struct.pack("<IB3x", 0, 0)),
    frame(REPLY, 0, 2, STARTED),
    frame(99, 0, 1),
    HEADER.pack(DATA, 1, 1, 1 << 20),
    protocol.hello(OWN, protocol.NOBODY),
]
AFTER_START = [
    frame(REPLY, 0, 1, STARTED),
    frame(DATA, 0, 1, b"x"),
    frame(DATA, 3, 1, b"x"),
    frame(DATA, 1, 9, b"x"),
    frame(END, 1, 1) + frame(DATA, 1, 1, b"x"),
    frame(END, 0, 1),
    frame(CREDIT, 0, 1, struct.pack("<I", 1)),
    frame(CREDIT, 1, 1, struct.pack("<I", 1)),
    frame(CREDIT, 0, 1, b"\1"),
    frame(STOP, 1, 1),
    frame(EXIT, 0, 1, b""),
    frame(EXIT, 0, 1, struct.pack("<BBBxI", 2, 0, 0, 0)),
    frame(EXIT, 0, 1, struct.pack("<BBBxI", 1, 0, 65, 0)),
    frame(EXIT, 0, 1, struct.pack("<BBBxI", 1, 0, 0, 0)),
    frame(EXIT, 0, 1, bytes(8)) + frame(DATA, 1, 1, b"x"),
    frame(SIGNAL, 0, 1, bytes(4)),
    frame(REQUEST, 0, 1, bytes(4)),
]


@pytest.mark.parametrize("after", [False, True])
def test_frames_that_may_not_be(after: bool) -> None:
    for bad in AFTER_START if after else BEFORE_START:
        with fake() as (host, guest):
            channel, thread, outcome = start(host, guest)
            assert channel == 1
            guest.sock.sendall((frame(REPLY, 0, 1, STARTED) if after else b"") + bad)
            thread.join(20)
            assert not thread.is_alive()
            # The command may have ended before the mistake; the session never outlives it.
            with pytest.raises(AgentGone):
                host.ping(20)
            assert outcome


def test_flood_beyond_credit_ends_the_session() -> None:
    with fake() as (host, guest):
        channel, thread, outcome = start(host, guest, stdout=PULL)
        guest.sock.sendall(frame(REPLY, 0, channel, STARTED))
        with pytest.raises(OSError, match=r"."):
            for _ in range(WINDOW // 65536 + 100):
                guest.sock.sendall(frame(DATA, 1, channel, bytes(65536)))
        thread.join(20)
        assert isinstance(outcome[-1], AgentProtocolError)


def test_guest_that_reads_nothing_does_not_hold_close_up() -> None:
    with fake() as (host, guest):
        channel, thread, outcome = start(host, guest, stdin=iter(lambda: bytes(65536), b""))
        guest.sock.sendall(frame(REPLY, 0, channel, STARTED))
        while not outcome:
            thread.join(0.01)
        host.close()
        thread.join(20)
        assert isinstance(outcome[-1], AgentGone)


def test_what_the_guest_said_last_counts_though_nothing_can_be_sent() -> None:
    """A sender learns first that the guest is gone, while the exit code waits to be read."""
    with fake() as (host, guest):
        channel, thread, outcome = start(host, guest)
        guest.sock.sendall(frame(REPLY, 0, channel, STARTED))
        host._channels[9] = reader = Stalled()  # type: ignore[assignment]
        code = struct.pack("<BBBxI", 0, 0, 3, 0)
        guest.sock.sendall(frame(REPLY, 0, 9) + frame(EXIT, 0, channel, code))
        guest.sock.close()
        with pytest.raises(AgentGone):
            for _ in range(2):  # the first may find room that the guest left
                host.send(CREDIT, 1, channel, bytes(4))
        reader.go.set()
        thread.join(20)
        assert isinstance(outcome[-1], protocol.ExitStatus) and outcome[-1].code == 3
        with pytest.raises(AgentGone):
            host.ping(20)


def within(work: Callable[[], object]) -> object:
    """What comes of `work`, which is on a thread: should it hang, the test fails and does not."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome, "it hangs"
    return outcome[0]


def test_a_request_that_the_guest_does_not_take_is_given_up() -> None:
    with fake() as (host, _):
        error = within(lambda: host.exec(["x" * 3_000_000], env=ENV, timeout=0.2))
        assert isinstance(error, AgentGone) and "takes nothing" in str(error)
        with pytest.raises(AgentGone, match="takes nothing"):
            host.ping(20)


def stuff(host: AgentSession, guest: FakeGuest) -> int:
    """Have a command's input fill all there is on the way to the guest; its channel."""
    channel, thread, outcome = start(host, guest, stdin=iter(lambda: bytes(65536), b""))
    guest.sock.sendall(frame(REPLY, 0, channel, STARTED))
    await_full(host)
    assert thread.is_alive() and outcome
    return channel


def await_full(host: AgentSession) -> None:
    """Returns when somebody sends, and cannot go on."""
    while not host._sending.locked() or select.select([], [host._sock], [], 0)[1]:
        time.sleep(0.01)


def test_a_request_that_waits_for_others_in_vain_is_as_if_it_had_not_been() -> None:
    with fake() as (host, guest):
        stuff(host, guest)
        assert isinstance(within(lambda: host.ping(0.1)), TimeoutError)
        assert len(host._channels) == 1
        drained = threading.Event()

        def drain() -> None:
            while True:
                kind, _, channel, fields = guest.frame()
                if kind == REQUEST:
                    drained.set()
                    guest.sock.sendall(frame(REPLY, 0, channel, struct.pack("<IB3x", 0, 0) + fields[4:]))
                    return

        threading.Thread(target=drain, daemon=True).start()
        host.ping(20)
        assert drained.is_set()


TREE = b"f" + struct.pack("<IQI", 0o644, 0, 0) + struct.pack("<I", 3) + b"abc" + bytes(4) + b"e"


def copy_out(host: AgentSession, guest: FakeGuest, path: Path) -> tuple[int, threading.Thread, list[object]]:
    """One that has begun: its channel, and what comes of it."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(host.copy_out("/x", str(path), limits=files.Limits(bytes=1000)))
        except AgentError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _, _, channel, _ = guest.frame()
    guest.sock.sendall(frame(REPLY, 0, channel, STARTED))
    return channel, thread, outcome


@pytest.mark.parametrize("apart", [False, True])
def test_nothing_comes_after_the_files(tmp_path: Path, apart: bool) -> None:
    with fake() as (host, guest):
        channel, thread, outcome = copy_out(host, guest, tmp_path / "out")
        guest.sock.sendall(frame(DATA, 1, channel, TREE + (b"" if apart else b"x")))
        if apart:
            guest.sock.sendall(frame(DATA, 1, channel, b"x"))
        thread.join(20)
        assert isinstance(outcome[-1], files.StreamError) and "more" in str(outcome[-1])
        kind, flags, _, _ = guest.frame()
        assert (kind, flags) == (SIGNAL, protocol.FLAG_FAMILY), "it is killed"


@pytest.mark.parametrize("said", [b"", frame(END, 1, 1), frame(END, 1, 1) + frame(END, 2, 1)])
def test_files_that_have_come_and_do_not_end(
    tmp_path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_END_SECONDS", 0.1)
    with fake() as (host, guest):
        channel, thread, outcome = copy_out(host, guest, tmp_path / "out")
        assert channel == 1
        guest.sock.sendall(frame(DATA, 1, 1, TREE) + said)
        thread.join(20)
        assert isinstance(outcome[-1], files.StreamError) and "end" in str(outcome[-1])


def test_a_copy_is_given_up_though_the_guest_does_not_listen(tmp_path: Path) -> None:
    with fake() as (host, guest):
        channel, thread, outcome = copy_out(host, guest, tmp_path / "out")
        stuff(host, guest)
        guest.sock.sendall(frame(DATA, 1, channel, b"nonsense"))
        thread.join(20)
        assert isinstance(outcome[-1], files.StreamError)


def test_a_copy_that_is_done_though_nothing_of_it_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_END_SECONDS", 0.1)
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    with fake() as (host, guest):

        def pretend() -> None:
            kind, _, channel, _ = guest.frame()
            assert kind == REQUEST
            guest.sock.sendall(frame(REPLY, 0, channel, STARTED))
            await_full(host)
            guest.sock.sendall(frame(EXIT, 0, channel, bytes(8)))

        threading.Thread(target=pretend, daemon=True).start()
        error = within(lambda: host.copy_in(str(tmp_path / "file"), "/x"))
        assert isinstance(error, AgentError) and "takes nothing" in str(error)


def test_an_interrupted_session_is_over_for_all_who_wait() -> None:
    with fake() as (host, guest):
        channel, thread, outcome = start(host, guest)
        guest.sock.sendall(frame(REPLY, 0, channel, STARTED))
        stuff(host, guest)
        host.interrupt()
        thread.join(20)
        assert isinstance(outcome[-1], AgentGone)


@pytest.mark.parametrize("hostile", ["\x1b]0;owned\a", "two\nlines", b"\x9b31m", "\u202ereversed"])
def test_what_was_refused_does_not_steer_the_terminal(hostile: str | bytes) -> None:
    text = str(protocol.AgentRefused(os.fsdecode(hostile), 2, protocol.STAGE_EXEC))
    assert text.isprintable() and text.endswith("(program): No such file or directory")


any_frame = st.builds(
    frame,
    st.sampled_from([0, REQUEST, REPLY, DATA, END, CREDIT, EXIT, SIGNAL, RESIZE, STOP, 10, 0xF5]),
    st.integers(0, 4),
    st.integers(0, 3),
    st.one_of(st.binary(max_size=20), st.just(STARTED), st.just(bytes(8)), st.just(struct.pack("<I", 5))),
)


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.one_of(any_frame, any_frame, st.binary(max_size=30)), max_size=20).map(b"".join))
def test_any_guest_gets_a_clean_end(data: bytes) -> None:
    with fake() as (host, guest):
        _, thread, outcome = start(host, guest, stdout=Capture(), stderr=Capture(), stdin=b"input")
        try:
            guest.sock.sendall(data)
            guest.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        thread.join(20)
        assert not thread.is_alive()
        assert outcome


host_frame = st.builds(
    frame,
    st.sampled_from([0, REQUEST, REPLY, DATA, END, CREDIT, EXIT, SIGNAL, RESIZE, STOP, 10, 0xF5]),
    st.integers(0, 4),
    st.integers(0, 3),
    st.one_of(
        st.binary(max_size=40),
        # Operations with fields that are none. Not 8 to 12, which would do something to this machine, nor 5.
        st.builds(
            lambda op, rest: struct.pack("<I", op) + rest,
            st.sampled_from([0, 4, 6, 7, 99]),
            st.binary(max_size=40),
        ),
        st.builds(lambda rest: struct.pack("<IIII", 1, 0, 0, 0) + rest, st.binary(max_size=40)),
        st.builds(lambda n: struct.pack("<I", n), st.integers(0, 1 << 32 - 1)),
        st.just(struct.pack("<IIIIIIII", 1, 0, 0, 0, 0, 0, 1, 3) + b"cat" + bytes(4)),
        st.just(MAGIC),
    ),
)


def test_agent_survives_any_host() -> None:
    """One agent, hostile hosts one after another on its stream, and then a good one, which is served."""
    with agent() as (sock, _):

        @settings(max_examples=80, deadline=None)
        @given(
            data=st.lists(st.one_of(host_frame, host_frame, st.binary(max_size=30)), max_size=20).map(
                b"".join
            )
        )
        def bother(data: bytes) -> None:
            nonce = os.urandom(16)
            seen = b""
            sock.settimeout(0.1)
            while nonce not in seen or len(seen) - seen.index(nonce) < 16:
                # What the host before sent may have taken the first one for its own hello's end.
                sock.sendall(protocol.hello(nonce, protocol.NOBODY))
                try:
                    seen += sock.recv(65536)
                except TimeoutError:
                    pass
            sock.settimeout(20)
            at = seen.index(nonce)
            sock.sendall(protocol.hello(nonce, seen[at - 16 : at]))
            sock.sendall(data)

        bother()
        with AgentSession(sock) as host:
            host.hello(20)
            capture = Capture()
            assert host.exec(["cat"], env=ENV, stdin=b"well", stdout=capture).wait(20).code == 0
            assert bytes(capture.data) == b"well"


def test_agent_bounds_what_it_holds() -> None:
    """A host that sends pings without end and reads nothing is read no further; then it gets every answer."""
    with agent() as (sock, process), AgentSession(sock) as host:
        host.hello(20)
        pings = frame(REQUEST, 0, 9, struct.pack("<I", protocol.OP_PING) + bytes(4000)) * 64
        raw = socket.socket(fileno=os.dup(sock.fileno()))
        with raw:
            host._channels[9] = stalled = Stalled()  # type: ignore[assignment]
            sent = 0
            try:
                while sent < 400 << 20:
                    # For this call only: raw shares its flags with the session's own socket.
                    sent += raw.send(pings[sent % len(pings) :], socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            assert sent < 64 << 20
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096
            assert resident < 16 << 20
            rest = -sent % (HEADER.size + 4004)
            stalled.go.set()
            raw.sendall(pings[sent % len(pings) :][:rest])
            assert stalled.all_came((sent + rest) // (HEADER.size + 4004))
            host._forget(9)


class Stalled:
    """Takes replies only when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.came = 0
        self.changed = threading.Condition()

    def on_reply(self, payload: bytes) -> bool:
        self.go.wait(20)
        with self.changed:
            self.came += 1
            self.changed.notify()
        return True

    def on_failure(self, failure: AgentGone) -> None:
        self.go.set()

    def all_came(self, count: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.came == count, 20)


@given(
    data=st.lists(st.sampled_from([MAGIC, MAGIC[:9], MAGIC[9:], b"\xf5", b"abc", bytes(9)]), max_size=40).map(
        b"".join
    )
)
def test_magic_never_goes_out(data: bytes) -> None:
    cut = list(protocol.pieces(data))
    assert b"".join(cut) == data
    assert MAGIC not in b"".join(frame(DATA, 0, 5, piece) for piece in cut)


def test_long_data_is_cut_to_frames() -> None:
    data = os.urandom(65530) + MAGIC + bytes(200_000)
    cut = list(protocol.pieces(data))
    assert b"".join(cut) == data
    assert max(map(len, cut)) <= protocol.PAYLOAD_MAX
    assert MAGIC not in b"".join(frame(DATA, 0, 5, piece) for piece in cut)


class FlowControl(RuleBasedStateMachine):
    """A sender with InputStream's credit and a receiver with OutputStream: nothing is lost, nothing is held
    beyond a window, and whoever takes everything can always be sent more."""

    def __init__(self) -> None:
        super().__init__()
        self.sender = InputStream()
        self.under_way: list[bytes] = []
        self.credits: list[int] = []
        self.receiver = OutputStream(self.credits.append)
        self.sent = self.arrived = self.taken = 0
        self.credit = WINDOW

    @precondition(lambda self: self.credit)
    @rule(size=st.integers(1, 65536))
    def send(self, size: int) -> None:
        size = self.sender.claim(size)
        assert 0 < size <= self.credit
        self.credit -= size
        self.sent += size
        self.under_way.append(bytes(size))

    @precondition(lambda self: self.under_way)
    @rule()
    def arrive(self) -> None:
        data = self.under_way.pop(0)
        self.receiver.put(data)
        self.arrived += len(data)

    @precondition(lambda self: self.arrived > self.taken)
    @rule()
    def take(self) -> None:
        self.taken += len(self.receiver.take())

    @precondition(lambda self: self.credits)
    @rule()
    def credit_arrives(self) -> None:
        size = self.credits.pop(0)
        self.sender.add_credit(size)
        self.credit += size

    @invariant()
    def bounded(self) -> None:
        assert self.arrived - self.taken <= WINDOW
        assert self.sent - self.arrived + self.arrived - self.taken <= WINDOW
        if not self.under_way and not self.credits and self.arrived == self.taken:
            # All was taken: at most the last piece and a quarter of a window are not given back yet.
            assert self.credit >= WINDOW - WINDOW // 4 - 65536


FlowControl.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestFlowControl = FlowControl.TestCase


def test_credit_from_nowhere() -> None:
    stream = InputStream()
    with pytest.raises(AgentProtocolError):
        stream.add_credit(1)
    stream.stop()
    assert stream.claim(5) == 0
