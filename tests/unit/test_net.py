"""The virtio-net device through real rings. A pair of datagram sockets stands for the tap: like it, they
keep frames apart.
"""

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.net import dhcp
from devices.virtio import net
from devices.virtio.net import NetDevice
from devices.worker.ring import DRAINED, MORE, NEED_SOURCE
from tests.unit.worker_driver import Guest

MAC = bytes.fromhex("525400123456")
VERSION_1 = 1 << 32
RX, TX = 0, 1
HEADER = bytes(12)
RECEIVED = bytes(10) + b"\1\0"
FRAME = bytes(range(60))


class Card:
    """A network card, its two queues, and `wire`: what the other end of the tap sees."""

    def __init__(
        self,
        features: int = VERSION_1,
        mtu: int | None = None,
        locked: bool = False,
        lease: dhcp.Lease | None = None,
    ) -> None:
        tap, self.wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.wire.setblocking(False)
        self.wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.device = NetDevice(tap.detach(), MAC, mtu, locked=locked, lease=lease)
        self.device.set_features(features)
        self.rx = Guest()
        self.tx = Guest(self.rx.memory, 1)
        self.receive_queue = self.rx.queue()
        self.transmit_queue = self.tx.queue()

    def receive(self) -> int:
        return self.device.process(RX, self.receive_queue)

    def transmit(self, *readable: bytes, writable: tuple[int, ...] = ()) -> list[bytes]:
        """Send one chain; what came out of the tap, header and all."""
        head = self.tx.offer(list(readable), list(writable))
        assert self.device.process(TX, self.transmit_queue) == DRAINED
        ((used, length, _),) = self.tx.collect()
        assert (used, length) == (head, 0)
        frames = []
        while True:
            try:
                frames.append(self.wire.recv(1 << 18))
            except BlockingIOError:
                return frames

    def close(self) -> None:
        self.device.release(RX, self.receive_queue)
        self.device.close()
        self.wire.close()
        self.receive_queue.release()
        self.transmit_queue.release()
        self.rx.close()


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    yield card
    card.close()


def test_transmit(card: Card) -> None:
    assert card.transmit(HEADER, FRAME) == [HEADER + FRAME]
    assert card.transmit(HEADER + FRAME) == [HEADER + FRAME]
    assert card.transmit(HEADER[:5], HEADER[5:] + FRAME[:3], FRAME[3:]) == [HEADER + FRAME]


def test_no_number_of_the_guests_header_reaches_the_tap(card: Card) -> None:
    assert card.transmit(b"\xff" * 12 + FRAME) == [HEADER + FRAME]


@pytest.mark.parametrize("size", [0, 1, 11, 12, 13, 25, 12 + 65554, 100_000, 1 << 17])
def test_frames_that_are_none_are_dropped(card: Card, size: int) -> None:
    assert card.transmit(bytes(size)) == []
    assert card.transmit(HEADER + FRAME) == [HEADER + FRAME]


@pytest.mark.parametrize("size", [14, 60, 1514, 9014, 65535, 65553])
def test_frames_of_all_sizes(card: Card, size: int) -> None:
    frame = os.urandom(size)
    assert card.transmit(HEADER + frame) == [HEADER + frame]


def test_a_frame_in_nothing_but_crumbs(card: Card) -> None:
    """More buffers than writev takes."""
    frame = os.urandom(750)
    readable = [HEADER[index : index + 1] for index in range(12)] + [frame[i : i + 1] for i in range(750)]
    assert card.transmit(*readable) == [HEADER + frame]
    monster = [bytes([index & 0xFF]) for index in range(1012)]
    assert len(card.transmit(*(HEADER[i : i + 1] for i in range(12)), *monster)) == 1


def test_a_chain_without_anything_to_send(card: Card) -> None:
    assert card.transmit(writable=(100,)) == []


def test_transmit_ignores_room_for_answers(card: Card) -> None:
    assert card.transmit(HEADER + FRAME, writable=(64,)) == [HEADER + FRAME]


def test_a_tap_that_takes_nothing_loses_frames_and_no_buffers(card: Card) -> None:
    card.wire.close()
    card.tx.offer([HEADER + FRAME], [])
    assert card.device.process(TX, card.transmit_queue) == DRAINED
    assert len(card.tx.collect()) == 1


def test_receive(card: Card) -> None:
    card.rx.offer([], [12, 1514])
    card.rx.offer([], [1600])
    card.wire.send(HEADER + FRAME)
    card.wire.send(HEADER + FRAME[:14])
    assert card.receive() == DRAINED
    first, second = card.rx.collect()
    assert first[1] == 12 + len(FRAME)
    assert first[2].startswith(RECEIVED + FRAME + b"\xee")
    assert second[1] == 12 + 14
    assert second[2].startswith(RECEIVED + FRAME[:14] + b"\xee")


def test_header_flags_of_the_tap_do_not_reach_the_guest(card: Card) -> None:
    card.rx.offer([], [1526])
    card.wire.send(b"\xff" * 12 + FRAME)
    card.receive()
    ((_, _, data),) = card.rx.collect()
    assert data[:12] == RECEIVED


def test_without_buffers_the_tap_is_left_alone(card: Card) -> None:
    card.wire.send(HEADER + FRAME)
    assert card.receive() == DRAINED
    card.rx.offer([], [1526])
    assert card.receive() == DRAINED
    assert len(card.rx.collect()) == 1


def test_with_buffers_and_no_frame_the_source_is_needed(card: Card) -> None:
    card.rx.offer([], [1526])
    assert card.receive() == NEED_SOURCE
    assert card.receive() == NEED_SOURCE
    card.wire.send(HEADER + FRAME)
    assert card.receive() == DRAINED
    assert len(card.rx.collect()) == 1


def test_a_frame_that_does_not_fit_is_dropped_and_its_buffer_kept(card: Card) -> None:
    card.rx.offer([], [12 + 100])
    card.wire.send(HEADER + bytes(101))
    card.wire.send(HEADER + bytes(5000))
    assert card.receive() == NEED_SOURCE
    assert card.rx.collect() == []
    card.wire.send(HEADER + bytes(100))
    assert card.receive() == DRAINED
    ((_, length, data),) = card.rx.collect()
    assert (length, data) == (112, RECEIVED + bytes(100))


@pytest.mark.parametrize("room", [1, 11, 12, 25])
def test_buffers_that_hold_no_frame_go_back_unused(card: Card, room: int) -> None:
    card.rx.offer([], [room])
    card.rx.offer([b"readable only"], [])
    good = card.rx.offer([], [1526])
    card.wire.send(HEADER + FRAME)
    assert card.receive() == DRAINED
    assert [length for _, length, _ in card.rx.collect()] == [0, 0, 12 + len(FRAME)]
    assert good == 2


def test_release_gives_the_waiting_buffer_back(card: Card) -> None:
    """A queue that is stopped and goes on elsewhere has lost nothing."""
    card.rx.offer([], [1526])
    card.wire.send(HEADER + FRAME)
    card.receive()
    card.rx.collect()
    card.rx.offer([], [1526])
    assert card.receive() == NEED_SOURCE
    card.device.release(RX, card.receive_queue)
    card.device.release(TX, card.transmit_queue)
    assert card.receive_queue.next_avail == 1
    assert not card.receive_queue.in_flight
    again = card.rx.queue(next_avail=1)
    card.wire.send(HEADER + FRAME)
    assert card.device.process(RX, again) == DRAINED
    assert len(card.rx.collect()) == 1
    again.release()


def test_batches_are_bounded(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "BATCH", 2)
    for _ in range(3):
        card.rx.offer([], [1526])
        card.tx.offer([HEADER + FRAME], [])
        card.wire.send(HEADER + FRAME)
    assert card.receive() == MORE
    assert card.device.process(TX, card.transmit_queue) == MORE
    assert (len(card.rx.collect()), len(card.tx.collect())) == (2, 2)


@given(
    frames=st.lists(st.binary(min_size=14, max_size=200), min_size=1, max_size=8),
    cut=st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_any_layout(frames: list[bytes], cut: list[int]) -> None:
    card = Card()
    try:
        for frame in frames:
            message = HEADER + frame
            pieces, at = [], 0
            for size in cut:
                pieces.append(message[at : at + size])
                at += size
            pieces.append(message[at:])
            assert card.transmit(*(piece for piece in pieces if piece)) == [message]
            card.rx.offer([], [*cut, 212])
            card.wire.send(message)
        card.receive()
        for frame, (_, length, data) in zip(frames, card.rx.collect(), strict=True):
            assert data[:length] == RECEIVED + frame
    finally:
        card.close()


def test_drivers_without_version_1_have_a_shorter_header() -> None:
    card = Card(features=0)
    try:
        assert card.transmit(bytes(10) + FRAME) == [HEADER + FRAME]
        card.rx.offer([], [10, 100])
        card.wire.send(HEADER + FRAME)
        card.receive()
        ((_, length, data),) = card.rx.collect()
        assert data[:length] == bytes(10) + FRAME
    finally:
        card.close()


def test_config() -> None:
    card = Card(mtu=1400)
    try:
        features = net.VIRTIO_NET_F_MAC | net.VIRTIO_NET_F_STATUS | net.VIRTIO_NET_F_MTU
        assert card.device.features == features
        assert card.device.read_config(0, 12) == struct.pack("<6sHHH", MAC, 1, 1, 1400)
        assert card.device.read_config(10, 8) == struct.pack("<H6x", 1400)
        with pytest.raises(GuestError):
            card.device.write_config(0, MAC)
    finally:
        card.close()


def test_bad_arguments_open_nothing() -> None:
    with pytest.raises(ValueError, match="six bytes"):
        NetDevice(-1, b"short")
    with pytest.raises(ValueError, match="multicast"):
        NetDevice(-1, b"\1" + bytes(5))
    with pytest.raises(ValueError, match="68"):
        NetDevice(-1, MAC, 67)
