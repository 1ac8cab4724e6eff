"""Frames over a stream socket: the framing, the card through real rings, and a worker that meets a passt of
ours and hangs on it. One that is killed is in test_workers_restart.
"""

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.net.dhcp import Lease
from devices.net.filter import UDP
from devices.net.stream import MAX_FRAME, FrameStream
from devices.virtio.device import VIRTIO_ID_NET
from devices.virtio.net_stream import StreamNetDevice
from devices.worker.ring import DRAINED, NEED_SOURCE
from tests.unit.test_net_dhcp import Answer, ask, kind, message
from tests.unit.test_net_filter import GATEWAY, GATEWAY_MAC, GUEST, PUBLIC, outbound, packet
from tests.unit.worker_driver import Guest
from tests.unit.worker_session import Session

MAC = bytes.fromhex("525400123456")
VERSION_1 = 1 << 32
RX, TX = 0, 1
HEADER = bytes(12)
RECEIVED = bytes(10) + b"\1\0"
LEASE = Lease(MAC, socket.inet_aton(GUEST), GATEWAY_MAC, socket.inet_aton(GATEWAY))
WORDS = {"mac": MAC.hex(":"), "local": GATEWAY, "hostmac": GATEWAY_MAC.hex(":")}


def framed(frame: bytes) -> bytes:
    return struct.pack(">I", len(frame)) + frame


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def read_frame(sock: socket.socket) -> bytes:
    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = sock.recv(size - len(data))
            assert piece
            data += piece
        return data

    return exactly(int.from_bytes(exactly(4), "big"))


class Wire:
    """A FrameStream and the other end of its socket."""

    def __init__(self) -> None:
        self.ours, self.far = socket.socketpair()
        self.ours.setblocking(False)
        self.far.settimeout(10)
        self.stream = FrameStream(self.ours.fileno())

    def frames(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(bytes(self.stream.receive()))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self.stream.close()
        self.ours.close()
        self.far.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


@given(
    frames=st.lists(st.binary(max_size=300), max_size=12),
    cuts=st.lists(st.integers(1, 400), max_size=12),
    settles=st.sets(st.integers(0, 12)),
)
@settings(max_examples=60, deadline=None)
def test_pieces_become_frames(frames: list[bytes], cuts: list[int], settles: set[int]) -> None:
    wire = Wire()
    try:
        data = b"".join(map(framed, frames))
        found = []
        for number, cut in enumerate([*cuts, len(data)]):
            wire.far.sendall(data[:cut])
            data = data[cut:]
            found += wire.frames()
            if number in settles:
                wire.stream.settle()
        assert found == frames
    finally:
        wire.close()


@given(frames=st.lists(st.binary(max_size=200), min_size=1, max_size=8), taken=st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_a_successor_finds_a_frame_at_the_start(frames: list[bytes], taken: int) -> None:
    """Also without a farewell: it may get again what its predecessor had, and loses nothing."""
    wire = Wire()
    try:
        wire.far.sendall(b"".join(map(framed, frames)) + framed(bytes(50))[:17])
        for _ in range(min(taken, len(frames))):
            wire.stream.receive()
        wire.stream.close()  # gives nothing back, as after a kill
        wire.stream = FrameStream(wire.ours.fileno())
        found = wire.frames()
        assert found == frames
        wire.far.sendall(framed(bytes(50))[17:])
        assert wire.frames() == [bytes(50)]
    finally:
        wire.close()


def test_a_successor_after_settling_gets_nothing_twice(wire: Wire) -> None:
    wire.far.sendall(framed(b"first") + framed(b"second"))
    assert bytes(wire.stream.receive()) == b"first"
    wire.stream.settle()
    wire.stream.close()
    wire.stream = FrameStream(wire.ours.fileno())
    assert wire.frames() == [b"second"]


def test_half_a_frame_wakes_nobody(wire: Wire) -> None:
    wire.far.sendall(framed(bytes(100))[:50])
    assert readable(wire.stream.input_fd)
    assert wire.frames() == []
    assert not readable(wire.stream.input_fd)
    wire.far.sendall(framed(bytes(100))[50:])
    assert readable(wire.stream.input_fd)
    assert wire.frames() == [bytes(100)]


@pytest.mark.parametrize("size", [0, 13, 14, 1514, 40_000, MAX_FRAME])
def test_frames_of_all_sizes(wire: Wire, size: int) -> None:
    frame = os.urandom(size)
    wire.far.sendall(framed(frame))
    assert wire.frames() == [frame]
    wire.stream.send(frame)
    assert read_frame(wire.far) == frame


@pytest.mark.parametrize("size", [MAX_FRAME + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_length_beyond_reason_ends_it(wire: Wire, size: int) -> None:
    wire.far.sendall(framed(b"fine") + struct.pack(">I", size))
    assert bytes(wire.stream.receive()) == b"fine"
    with pytest.raises(OSError, match=f"sent a frame of {size} bytes"):
        wire.stream.receive()


@pytest.mark.parametrize("last", [b"", b"\0\0", framed(b"half a frame")[:9]])
def test_the_other_end_goes(wire: Wire, last: bytes) -> None:
    wire.far.sendall(framed(b"farewell") + last)
    wire.far.close()
    assert bytes(wire.stream.receive()) == b"farewell"
    with pytest.raises(OSError, match="gone"):
        while True:
            wire.stream.receive()
    wire.stream.send(b"x" * 60)
    assert wire.stream.flush()  # sent to nobody, and not kept


def test_a_full_socket_keeps_the_rest_of_one_frame(wire: Wire) -> None:
    sent = 0
    while wire.stream.flush():
        assert sent < 100
        wire.stream.send(bytes([sent & 0xFF]) * MAX_FRAME)
        sent += 1
    assert not readable(wire.stream.output_fd)
    got: list[bytes] = []
    while len(got) < sent:
        got.append(read_frame(wire.far))
        wire.stream.flush()
    assert got == [bytes([number & 0xFF]) * MAX_FRAME for number in range(sent)]
    assert wire.stream.flush() and readable(wire.stream.output_fd)


def test_nothing_follows_half_a_frame(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without memory takes the beginning and not the rest, and what follows is taken for that."""
    while wire.stream.flush():
        wire.stream.send(bytes(MAX_FRAME))

    def write(*_: object) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(os, "write", write)
    for _ in range(2):
        with pytest.raises(OSError, match="buffer"):
            wire.stream.flush()


class Card:
    """A stream card, its two queues, and `far`, where passt would be."""

    def __init__(self, mtu: int | None = None) -> None:
        ours, self.far = socket.socketpair()
        self.far.settimeout(10)
        self.outbound = outbound()
        self.device = StreamNetDevice(ours.detach(), MAC, mtu, lease=LEASE, outbound=self.outbound)
        self.device.set_features(VERSION_1)
        self.rx = Guest()
        self.tx = Guest(self.rx.memory, 1)
        self.receive_queue = self.rx.queue()
        self.transmit_queue = self.tx.queue()

    def receive(self) -> int:
        return self.device.process(RX, self.receive_queue)

    def transmit(self, frame: bytes) -> int:
        self.tx.offer([HEADER, frame[:20], frame[20:]] if frame[20:] else [HEADER + frame], [])
        return self.device.process(TX, self.transmit_queue)

    def close(self) -> None:
        self.device.release(RX, self.receive_queue)
        self.device.close()
        self.far.close()
        self.receive_queue.release()
        self.transmit_queue.release()
        self.rx.close()


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    yield card
    card.close()


def test_what_is_allowed_goes_out_framed(card: Card) -> None:
    frame = packet(PUBLIC, payload=b"hello")
    assert card.transmit(packet("10.0.0.1")) == DRAINED
    assert card.transmit(frame) == DRAINED
    assert len(card.tx.collect()) == 2
    assert read_frame(card.far) == frame
    assert card.outbound.denied == 1


def test_frames_come_in_with_a_header_that_says_nothing(card: Card) -> None:
    card.rx.offer([], [12, 1514])
    card.far.sendall(framed(b"\x5a" * 13) + framed(b"\xff" * 14) + framed(b"\xa5" * 60)[:30])
    assert card.receive() == DRAINED
    ((_, length, data),) = card.rx.collect()  # a frame too short for a header of Ethernet's is none
    assert data[:length] == RECEIVED + b"\xff" * 14
    card.rx.offer([], [1526])
    assert card.receive() == NEED_SOURCE
    card.far.sendall(framed(b"\xa5" * 60)[30:])
    assert readable(card.device.source_fd(RX))
    assert card.receive() == DRAINED
    ((_, length, data),) = card.rx.collect()
    assert data[:length] == RECEIVED + b"\xa5" * 60


def test_a_frame_that_does_not_fit_is_dropped(card: Card) -> None:
    card.rx.offer([], [12 + 100])
    card.far.sendall(framed(bytes(101)) + framed(bytes(MAX_FRAME)) + framed(b"\1" * 100))
    assert card.receive() == DRAINED
    ((_, length, data),) = card.rx.collect()
    assert data[:length] == RECEIVED + b"\1" * 100


def test_a_released_ring_leaves_the_rest_to_its_successor(card: Card) -> None:
    card.rx.offer([], [1526])
    card.far.sendall(framed(b"\1" * 60) + framed(b"\2" * 60))
    assert card.receive() == DRAINED
    card.device.release(RX, card.receive_queue)
    successor = FrameStream(card.device._tap_fd)
    assert bytes(successor.receive()) == b"\2" * 60
    successor.close()


def test_dhcp_is_answered_here(card: Card) -> None:
    card.rx.offer([], [1526])
    assert card.transmit(ask(message(kind(1)))) == DRAINED
    assert readable(card.device.source_fd(RX))
    assert card.receive() == DRAINED
    ((_, length, data),) = card.rx.collect()
    assert Answer(data[12:length]).given == LEASE.address
    card.transmit(packet(PUBLIC, 99, UDP))
    assert read_frame(card.far) == packet(PUBLIC, 99, UDP)  # and nothing before it


def test_a_passt_that_reads_nothing_stops_the_sender_and_loses_nothing(card: Card) -> None:
    frame = packet(PUBLIC, 9, UDP, payload=bytes(40_000))
    outcomes = [card.transmit(frame) for _ in range(60)]
    assert NEED_SOURCE in outcomes and DRAINED in outcomes
    sent = len(outcomes)
    assert card.device.process(TX, card.transmit_queue) == NEED_SOURCE
    assert not readable(card.device.source_fd(TX))
    for _ in range(sent):
        assert read_frame(card.far) == frame
        card.device.process(TX, card.transmit_queue)
    assert readable(card.device.source_fd(TX))
    assert len(card.tx.collect()) == sent


def session(far_end: socket.socket, **words: str) -> Session:
    return Session("net", VIRTIO_ID_NET, 2, {**WORDS, **words}, {"stream": far_end.fileno()})


def test_a_worker_serves_a_stream() -> None:
    ours, far = socket.socketpair()
    far.settimeout(30)
    with ours, far, session(ours, allow="10.1.0.0/16:80+192.0.2.9:0", own="10.1.0.7", private="0") as card:
        assert not card.device.features & 0xFFFF & ~(1 << 5)  # VIRTIO_NET_F_MAC, and no offloads
        allowed = [packet("10.1.0.1", 80), packet("192.0.2.9", 5), packet(GATEWAY, 53, UDP)]
        for frame in (packet(PUBLIC), packet("10.1.0.7", 80), packet("10.1.0.1", 81), *allowed):
            card.offer(TX, [HEADER + frame], [])
        card.collect(TX, 6)
        assert [read_frame(far) for _ in allowed] == allowed
        card.offer(RX, [], [1526])
        far.sendall(framed(b"\x11" * 60)[:7])
        far.sendall(framed(b"\x11" * 60)[7:])
        ((_, length, data),) = card.collect(RX)
        assert data[:length] == RECEIVED + b"\x11" * 60


def test_a_worker_waits_for_a_passt_that_is_slow() -> None:
    """Its transmit queue goes on by itself when there is room, and ends in good order when there is not."""
    ours, far = socket.socketpair()
    far.settimeout(30)
    frame = packet(PUBLIC, 9, UDP, payload=bytes(40_000))
    with ours, far, session(ours) as card:
        for _ in range(20):
            card.offer(TX, [HEADER + frame], [])
        for _ in range(20):
            assert read_frame(far) == frame
        card.collect(TX, 20)
        for _ in range(20):
            card.offer(TX, [HEADER + frame], [])
        card.device.reset()  # while it is stuck
        assert not card.failures


def test_a_worker_whose_passt_is_gone_says_so() -> None:
    ours, far = socket.socketpair()
    with ours, session(ours) as card:
        card.offer(RX, [], [1526])
        far.close()
        assert card.worker.wait(30)
        assert card.worker.describe_exit() == (
            "worker net0 exited with status 1: queue 0: what serves this card's network is gone"
        )


def test_a_worker_meets_a_passt_taken_over() -> None:
    ours, far = socket.socketpair()
    with ours, far, session(ours) as card:
        card.offer(RX, [], [1526])
        far.sendall(b"\xff" * 100_000)
        assert card.worker.wait(30)
        assert "sent a frame of 4294967295 bytes" in card.worker.describe_exit()
