"""Cards that look at frames, through real rings: locked MACs, and DHCP answered on the way. As in test_net, a
pair of datagram sockets stands for the tap.
"""

import os
import select
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.net.frames import source_mac
from devices.virtio import net
from devices.worker.ring import DRAINED, NEED_SOURCE
from tests.unit.test_net import FRAME, HEADER, MAC, RECEIVED, RX, TX, VERSION_1, Card
from tests.unit.test_net_dhcp import HOST_MAC, LEASE, Answer, ask, kind, message

OTHER = bytes.fromhex("525400123457")
GROUP = bytes.fromhex("333300000001")
BROADCAST = b"\xff" * 6
DISCOVER = ask(message(kind(1)))


def frame(to: bytes, sender: bytes, size: int = 60) -> bytes:
    return (to + sender + b"\x88\xb5").ljust(size, b"\x5a")


@pytest.fixture
def locked() -> Iterator[Card]:
    card = Card(locked=True)
    yield card
    card.close()


@pytest.fixture
def local() -> Iterator[Card]:
    card = Card(lease=LEASE)
    yield card
    card.close()


@pytest.mark.parametrize("size", [14, 41, 42, 43, 60, 1514, 9014, 65553])
def test_locked_sends_its_own(locked: Card, size: int) -> None:
    mine = frame(OTHER, MAC, size)
    assert locked.transmit(HEADER, mine) == [HEADER + mine]
    assert locked.transmit(HEADER + mine) == [HEADER + mine]


@pytest.mark.parametrize("sender", [OTHER, BROADCAST, bytes(6), MAC[::-1], MAC[:5] + b"\0"])
def test_locked_sends_nothing_forged(locked: Card, sender: bytes) -> None:
    for size in (14, 60, 1514, 65553):
        assert locked.transmit(HEADER, frame(BROADCAST, sender, size)) == []
    assert locked.transmit(HEADER + frame(OTHER, MAC)) == [HEADER + frame(OTHER, MAC)]


@given(
    forged=st.booleans(),
    size=st.integers(14, 120),
    cut=st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_locked_in_any_layout(forged: bool, size: int, cut: list[int]) -> None:
    card = Card(locked=True)
    try:
        one = frame(BROADCAST, OTHER if forged else MAC, size)
        rest, pieces = HEADER + one, []
        for length in cut:
            pieces.append(rest[:length])
            rest = rest[length:]
        sent = card.transmit(*(piece for piece in [*pieces, rest] if piece))
        assert sent == ([] if forged else [HEADER + one])
    finally:
        card.close()


def test_locked_in_crumbs(locked: Card) -> None:
    """More buffers than writev takes: after the checked copy of the head the rest still counts."""
    mine = frame(OTHER, MAC, 1010)
    assert locked.transmit(HEADER, *(mine[i : i + 1] for i in range(1010))) == [HEADER + mine]


def test_what_was_checked_is_what_is_sent(locked: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest writes another source address between the check and the write."""
    mine = frame(OTHER, MAC)
    locked.tx.offer([HEADER, mine], [])
    address = locked.tx._free - len(mine) - 3
    assert locked.tx.memory.read(address, len(mine)) == mine

    def check_then_change(head: bytes) -> bytes:
        found = source_mac(head)
        locked.tx.memory.write(address + 6, OTHER)
        return found

    monkeypatch.setattr(net, "source_mac", check_then_change)
    locked.device.process(TX, locked.transmit_queue)
    assert len(locked.tx.collect()) == 1
    assert locked.wire.recv(2000) == HEADER + mine


def test_locked_receives_what_is_for_it(locked: Card) -> None:
    ours = [frame(to, OTHER, 60 + number) for number, to in enumerate((MAC, BROADCAST, GROUP))]
    for _ in range(4):
        locked.rx.offer([], [5, 1521])
    for one in ours:
        locked.wire.send(HEADER + frame(OTHER, OTHER))
        locked.wire.send(HEADER + one)
        locked.wire.send(HEADER + frame(HOST_MAC, OTHER))
    assert locked.receive() == NEED_SOURCE
    got = locked.rx.collect()
    assert [data[:length] for _, length, data in got] == [RECEIVED + one for one in ours]


def test_others_frames_never_touch_the_guests_memory(locked: Card) -> None:
    locked.rx.offer([], [1526])
    address = locked.rx._free - 1526 - 3
    locked.wire.send(HEADER + frame(OTHER, OTHER, 1514))
    assert locked.receive() == NEED_SOURCE
    assert locked.rx.memory.read(address, 1526) == b"\xee" * 1526


@pytest.mark.parametrize("size", [0, 1, 5, 13])
def test_locked_receives_no_stumps(locked: Card, size: int) -> None:
    locked.rx.offer([], [1526])
    locked.wire.send(HEADER + (MAC + MAC)[:size])
    locked.wire.send(bytes(size))
    assert locked.receive() == NEED_SOURCE
    locked.wire.send(HEADER + frame(MAC, OTHER, 14))
    assert locked.receive() == DRAINED
    ((_, length, data),) = locked.rx.collect()
    assert data[:length] == RECEIVED + frame(MAC, OTHER, 14)


@pytest.mark.parametrize("size", [65535, 65553])
def test_locked_receives_the_largest_and_drops_what_does_not_fit(locked: Card, size: int) -> None:
    locked.rx.offer([], [12 + size])
    for too_long in (size + 1, 70000):
        locked.wire.send(HEADER + frame(MAC, OTHER, too_long))
    assert locked.receive() == NEED_SOURCE
    locked.wire.send(HEADER + frame(MAC, OTHER, size))
    assert locked.receive() == DRAINED
    ((_, length, data),) = locked.rx.collect()
    assert data[:length] == RECEIVED + frame(MAC, OTHER, size)


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def test_a_request_is_answered_and_not_sent(local: Card) -> None:
    source = local.device.source_fd(RX)
    local.rx.offer([], [1526])
    assert local.receive() == NEED_SOURCE
    assert not readable(source)
    assert local.transmit(HEADER, DISCOVER) == []
    assert readable(source)
    assert local.receive() == DRAINED
    ((_, length, data),) = local.rx.collect()
    assert data[:12] == RECEIVED
    assert Answer(data[12:length]).options[53] == b"\2"
    local.rx.offer([], [1526])
    assert local.receive() == NEED_SOURCE
    assert not readable(source)


def test_the_tap_is_still_a_source(local: Card) -> None:
    local.rx.offer([], [1526])
    assert local.receive() == NEED_SOURCE
    local.wire.send(HEADER + FRAME)
    assert readable(local.device.source_fd(RX))
    assert local.receive() == DRAINED
    ((_, length, data),) = local.rx.collect()
    assert data[:length] == RECEIVED + FRAME


def test_a_request_in_crumbs(local: Card) -> None:
    local.rx.offer([], [12, 100, 100, 1000])
    whole = HEADER + DISCOVER
    assert local.transmit(*(whole[i : i + 1] for i in range(len(whole)))) == []
    local.receive()
    ((_, length, data),) = local.rx.collect()
    Answer(data[12:length])


@pytest.mark.parametrize(
    "other",
    [
        FRAME,
        FRAME[:14],
        ask(message(kind(1), ciaddr=LEASE.address)),
        ask(message(kind(1)))[:-1],
        ask(message(kind(1)), ports=(67, 68)),
        ask(message(kind(1)), sender=OTHER),
        # A DHCPv6 solicitation and a router solicitation: IPv6 is nobody's business here.
        bytes.fromhex("333300010002") + MAC + b"\x86\xdd\x60" + bytes(5) + b"\x11\xff" + bytes(60),
        bytes.fromhex("333300000002") + MAC + b"\x86\xdd\x60" + bytes(5) + b"\x3a\xff" + bytes(60),
    ],
)
def test_anything_else_goes_to_the_tap(local: Card, other: bytes) -> None:
    for size in (len(other), 20, 5):
        pieces = [other[at : at + size] for at in range(0, len(other), size)]
        assert local.transmit(HEADER, *pieces) == [HEADER + other]
    local.rx.offer([], [1526])
    assert local.receive() == NEED_SOURCE


def test_answers_wait_for_buffers_and_are_bounded(local: Card) -> None:
    for _ in range(3 * net.MAX_ANSWERS):
        assert local.transmit(HEADER, DISCOVER) == []
    for _ in range(net.MAX_ANSWERS + 1):
        local.rx.offer([], [1526])
    assert local.receive() == NEED_SOURCE
    got = local.rx.collect()
    assert len(got) == net.MAX_ANSWERS
    for _, length, data in got:
        Answer(data[12:length])


def test_an_answer_without_room_is_dropped(local: Card) -> None:
    local.rx.offer([], [12 + 100])
    local.transmit(HEADER, DISCOVER)
    assert local.receive() == NEED_SOURCE
    local.wire.send(HEADER + FRAME)
    assert local.receive() == DRAINED
    ((_, length, data),) = local.rx.collect()
    assert data[:length] == RECEIVED + FRAME


def test_locked_and_local() -> None:
    card = Card(locked=True, lease=LEASE)
    try:
        assert card.transmit(HEADER, ask(message(kind(1)), sender=OTHER)) == []
        card.rx.offer([], [1526])
        assert card.receive() == NEED_SOURCE
        assert card.transmit(HEADER, DISCOVER) == []
        card.receive()
        ((_, length, data),) = card.rx.collect()
        Answer(data[12:length])
    finally:
        card.close()


def test_local_for_a_driver_without_version_1() -> None:
    card = Card(features=0, lease=LEASE)
    try:
        card.rx.offer([], [1526])
        assert card.transmit(bytes(10), DISCOVER) == []
        card.receive()
        ((_, length, data),) = card.rx.collect()
        Answer(data[10:length])
    finally:
        card.close()


@given(size=st.integers(0, 65535), head=st.integers(0, len(DISCOVER)))
@settings(max_examples=60, deadline=None)
def test_any_frame_of_any_size(size: int, head: int) -> None:
    card = Card(locked=True, lease=LEASE)
    try:
        one = (DISCOVER[:head] + os.urandom(size))[:size]
        sent = card.transmit(*(piece for piece in (HEADER, one) if piece))
        assert sent in ([], [HEADER + one])
        card.rx.offer([], [1526])
        card.wire.send(HEADER + one)
        card.receive()
    finally:
        card.close()


def test_a_driver_that_took_the_mtu_gets_nothing_longer() -> None:
    card = Card(VERSION_1 | net.VIRTIO_NET_F_MTU, mtu=1000)
    try:
        card.rx.offer([], [2000])
        card.wire.send(HEADER + frame(MAC, OTHER, 1000 + 14 + 4 + 1))
        assert card.receive() == NEED_SOURCE
        card.wire.send(HEADER + frame(MAC, OTHER, 1000 + 14 + 4))
        assert card.receive() == DRAINED
    finally:
        card.close()


def test_nothing_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    card = Card(locked=True, lease=LEASE)
    card.rx.offer([], [1526])
    card.receive()
    card.close()
    assert set(os.listdir("/proc/self/fd")) == before
