"""Messages on a stream that arrives in any pieces, from a peer that sends anything."""

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.vhost.channel import MAX_FDS, MAX_PAYLOAD, Channel
from devices.vhost.messages import HEADER, REPLY, VERSION, ProtocolError
from tests.unit.vhost_toy import open_fds

Pair = tuple[Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = open_fds()
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        yield channel, theirs
    channel.close()
    assert open_fds() == before


def header(request: int = 5, flags: int = VERSION, size: int = 0) -> bytes:
    return HEADER.pack(request, flags, size)


def test_message_with_descriptors_arrives_whole(pair: Pair) -> None:
    channel, theirs = pair
    sender = Channel(theirs)
    reader, writer = os.pipe()
    sender.send(7, b"payload!", [reader, writer], REPLY)
    message = channel.receive(timeout=5)
    assert (message.request, message.flags, message.payload) == (7, VERSION | REPLY, b"payload!")
    assert len(message.fds) == 2
    assert not any(os.get_inheritable(fd) for fd in message.fds)
    taken = message.take_fd()
    message.close()
    os.fstat(taken)
    for fd in (taken, reader, writer):
        os.close(fd)


@given(
    messages=st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=40)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 30), max_size=30),
)
@settings(max_examples=50, deadline=None)
def test_messages_do_not_depend_on_how_the_stream_is_cut(
    messages: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    stream = b"".join(header(number, size=len(payload)) + payload for number, payload in messages)
    received = []
    with theirs:
        while stream:
            cut = cuts.pop() if cuts else len(stream)
            theirs.sendall(stream[:cut])
            stream = stream[cut:]
            try:
                while True:
                    message = channel.receive(timeout=0)
                    received.append((message.request, message.payload))
            except TimeoutError:
                pass
    assert received == messages
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()


def test_descriptors_of_the_next_message_are_not_taken(pair: Pair) -> None:
    channel, theirs = pair
    theirs.sendall(header(1, size=2) + b"ab")
    socket.send_fds(theirs, [header(2)], [0])
    assert channel.receive(timeout=5).fds == []
    second = channel.receive(timeout=5)
    assert second.request == 2
    assert len(second.fds) == 1
    second.close()


def test_close_between_messages_and_inside_one(pair: Pair) -> None:
    channel, theirs = pair
    theirs.sendall(header(size=8) + b"half")
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="middle"):
        channel.receive()


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (header(size=MAX_PAYLOAD + 1), "bytes"),
        (header(size=0xFFFFFFFF), "bytes"),
        (header(flags=0), "version"),
        (header(flags=2), "version"),
    ],
)
def test_what_is_no_message_is_refused_and_its_descriptors_closed(
    pair: Pair, stream: bytes, text: str
) -> None:
    channel, theirs = pair
    before = open_fds()
    socket.send_fds(theirs, [stream], [0, 1, 2])
    with pytest.raises(ProtocolError, match=text):
        channel.receive(timeout=5)
    assert open_fds() == before


@pytest.mark.parametrize("count", [MAX_FDS + 1, MAX_FDS + 2, 200])
def test_too_many_descriptors(pair: Pair, count: int) -> None:
    channel, theirs = pair
    before = open_fds()
    socket.send_fds(theirs, [header()], [0] * count)
    with pytest.raises(ProtocolError, match="file descriptors"):
        channel.receive(timeout=5)
    assert open_fds() == before


def test_too_many_descriptors_in_pieces(pair: Pair) -> None:
    channel, theirs = pair
    before = open_fds()
    for piece in (header()[:4], header()[4:8], header()[8:]):
        socket.send_fds(theirs, [piece], [0] * (MAX_FDS - 1))
    with pytest.raises(ProtocolError, match="file descriptors"):
        channel.receive(timeout=5)
    assert open_fds() == before


def test_half_a_message_is_no_reason_to_wait_longer(pair: Pair) -> None:
    channel, theirs = pair
    theirs.sendall(header()[:5])
    with pytest.raises(TimeoutError):
        channel.receive(timeout=0.02)
    theirs.sendall(header()[5:])
    assert channel.receive(timeout=5).request == 5


def test_a_peer_that_does_not_read_ends_the_wait(pair: Pair) -> None:
    channel, _ = pair
    with pytest.raises(TimeoutError):
        for _ in range(10000):
            channel.send(1, bytes(MAX_PAYLOAD), timeout=0.02)


def test_sending_to_nobody_is_the_end(pair: Pair) -> None:
    channel, theirs = pair
    theirs.close()
    with pytest.raises(EOFError):
        channel.send(1)
