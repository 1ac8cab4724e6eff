"""A net worker on a real tap: raw frames from a packet socket on one side, a driver's rings on the other."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devices.virtio.device import VIRTIO_ID_NET
from tests.unit.test_net_dhcp import HOST_MAC, Answer, ask, kind, message
from tests.unit.worker_session import Session
from vmrun.host.tap import Tap

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("network_namespace")]

RX, TX = 0, 1
MAC = "52:54:00:12:34:56"
# A protocol number for experiments: nothing else on this host answers or sends it.
ETHERTYPE = 0x88B5
HEADER = bytes(12)
RECEIVED = bytes(10) + b"\1\0"
BROADCAST = b"\xff" * 6


def frame(number: int, size: int = 60) -> bytes:
    head = (
        BROADCAST
        + bytes.fromhex(MAC.replace(":", ""))
        + ETHERTYPE.to_bytes(2, "big")
        + number.to_bytes(4, "big")
    )
    return head + bytes((number + index) & 0xFF for index in range(size - len(head)))


@contextmanager
def card(**words: str) -> Iterator[tuple[Session, socket.socket, Tap]]:
    # No router solicitations among our frames.
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    with (
        Tap("wtap0") as tap,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)) as wire,
    ):
        wire.bind(("wtap0", ETHERTYPE))
        wire.settimeout(30)
        with Session("net", VIRTIO_ID_NET, 2, {"mac": MAC, **words}, {"tap": tap.fd}) as session:
            yield session, wire, tap


def receive(session: Session, count: int) -> list[bytes]:
    return [data[:length] for _, length, data in session.collect(RX, count)]


def test_frames_both_ways() -> None:
    with card() as (session, wire, _):
        assert session.device.read_config(0, 8) == bytes.fromhex(MAC.replace(":", "")) + b"\1\0"
        for number, size in enumerate((60, 61, 1000, 1514)):
            session.offer(RX, [], [12 + 1514])
            wire.send(frame(number, size))
            assert receive(session, 1) == [RECEIVED + frame(number, size)]
            session.offer(TX, [HEADER, frame(number, size)], [])
            session.collect(TX)
            assert wire.recv(2000) == frame(number, size)
    assert session.failures == []
    assert session.worker.exit_code == 0


def test_frames_wait_for_buffers() -> None:
    with card() as (session, wire, _):
        for number in range(5):
            wire.send(frame(number))
        for _ in range(5):
            session.offer(RX, [], [12 + 1514])
        assert receive(session, 5) == [RECEIVED + frame(number) for number in range(5)]


def test_both_directions_at_once() -> None:
    rounds, burst = 40, 16
    with card() as (session, wire, _):
        for turn in range(rounds):
            numbers = range(turn * burst, (turn + 1) * burst)
            for number in numbers:
                session.offer(RX, [], [12 + 1514])
                session.offer(TX, [HEADER + frame(number)], [])
            for number in numbers:
                wire.send(frame(number))
            assert receive(session, burst) == [RECEIVED + frame(number) for number in numbers]
            session.collect(TX, burst)
            assert [wire.recv(2000) for _ in numbers] == [frame(number) for number in numbers]


@pytest.mark.parametrize("size", [0, 1, 11, 12, 13, 25, 26, 27, 1526, 1527, 4096, 65535, 65536])
def test_nothing_a_guest_sends_hurts(size: int) -> None:
    with card() as (session, wire, _):
        session.offer(TX, [os.urandom(size)] if size else [], [] if size else [1])
        session.collect(TX)
        session.offer(TX, [HEADER + frame(7)], [])
        session.collect(TX)
        while wire.recv(70000) != frame(7):
            pass
        assert not session.worker.poll()


def test_an_interface_that_is_down_loses_frames_only() -> None:
    with card() as (session, wire, tap):
        tap._set_link(up=False)
        session.offer(TX, [HEADER + frame(1)], [])
        session.collect(TX)
        tap._set_link(up=True)
        session.offer(TX, [HEADER + frame(2)], [])
        session.collect(TX)
        session.offer(RX, [], [12 + 1514])
        wire.settimeout(30)
        while True:
            try:
                assert wire.recv(2000) == frame(2)
                break
            except OSError as error:
                assert error.strerror == "Network is down"
        wire.send(frame(3))
        assert receive(session, 1) == [RECEIVED + frame(3)]


def test_a_reset_gives_the_posted_buffers_back() -> None:
    with card() as (session, wire, _):
        for _ in range(3):
            session.offer(RX, [], [12 + 1514])
        session.device.reset()
        for guest in session.guests:
            guest.restart()
        session.activate()
        session.offer(RX, [], [12 + 1514])
        wire.send(frame(9))
        assert receive(session, 1) == [RECEIVED + frame(9)]


def test_a_tap_deleted_under_the_guest_ends_the_worker_with_its_reason() -> None:
    with card() as (session, _, tap):
        session.offer(RX, [], [12 + 1514])
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("del", index=socket.if_nametoindex(tap.name))
        assert session.worker.wait(30)
        assert session.worker.describe_exit() == (
            "worker net0 exited with status 1: queue 0: File descriptor in bad state"
        )
        assert session.worker.exit_code != -signal.SIGSYS


def named(to: bytes, sender: bytes, number: int, size: int = 60) -> bytes:
    return (to + sender + ETHERTYPE.to_bytes(2, "big") + number.to_bytes(4, "big")).ljust(size, b"\x5a")


def test_locked() -> None:
    own, other = bytes.fromhex(MAC.replace(":", "")), bytes.fromhex("525400aaaaaa")
    with card(locked="1") as (session, wire, _):
        for number, sender in enumerate((other, own, BROADCAST, own)):
            one = HEADER + named(other, sender, number)
            session.offer(TX, [one[:15], one[15:19], one[19:]], [])
            session.collect(TX)
        assert [wire.recv(2000) for _ in range(2)] == [named(other, own, number) for number in (1, 3)]
        for _ in range(3):
            session.offer(RX, [], [12 + 1514])
        for number, to in enumerate((other, own, other, BROADCAST, b"\x33" * 6, other)):
            wire.send(named(to, other, number, 1514))
        assert receive(session, 3) == [
            RECEIVED + named(to, other, number, 1514)
            for number, to in ((1, own), (3, BROADCAST), (4, b"\x33" * 6))
        ]
    assert session.worker.exit_code == 0


def test_local_answers_from_inside_the_sandbox() -> None:
    own = bytes.fromhex(MAC.replace(":", ""))
    words = {"local": "100.64.1.2", "hostmac": HOST_MAC.hex(":"), "boot": "pxelinux.0", "hostname": "vm7"}
    with card(**words) as (session, wire, _), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as tapped:
        # The request is seen nowhere on the tap; what follows it is.
        tapped.bind(("wtap0", 3))  # ETH_P_ALL
        tapped.settimeout(30)
        session.offer(RX, [], [12 + 1514])
        session.offer(TX, [HEADER, ask(message(kind(1)))], [])
        session.offer(TX, [HEADER, frame(1)], [])
        (got,) = receive(session, 1)
        answer = Answer(got[12:])
        assert (answer.to, answer.given) == (own, bytes((100, 64, 1, 3)))
        assert (answer.file, answer.options[12]) == (b"pxelinux.0", b"vm7")
        assert wire.recv(2000) == frame(1)
        assert tapped.recv(2000) == frame(1)
        # And frames still come in, with the same buffers.
        for number in range(3):
            session.offer(RX, [], [12 + 1514])
            wire.send(frame(number))
            assert receive(session, 1) == [RECEIVED + frame(number)]
    assert session.worker.exit_code == 0


def test_a_deleted_tap_is_noticed_by_a_local_card_too() -> None:
    with card(local="100.64.1.2", hostmac=HOST_MAC.hex(":")) as (session, _, tap):
        session.offer(RX, [], [12 + 1514])
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("del", index=socket.if_nametoindex(tap.name))
        assert session.worker.wait(30)
        assert "File descriptor in bad state" in session.worker.describe_exit()


def test_requests_and_frames_at_once() -> None:
    """Both threads at the receive queue's door: each request has its answer, each frame arrives, in order."""
    rounds, burst = 20, 8
    with card(local="100.64.1.2", hostmac=HOST_MAC.hex(":")) as (session, wire, _):
        for turn in range(rounds):
            numbers = range(turn * burst, (turn + 1) * burst)
            for number in numbers:
                session.offer(RX, [], [12 + 1514])
                session.offer(RX, [], [12 + 1514])
                session.offer(TX, [HEADER, ask(message(kind(1)))], [])
                wire.send(frame(number))
            got = receive(session, 2 * burst)
            frames = [one[12:] for one in got if one[24:26] == ETHERTYPE.to_bytes(2, "big")]
            assert frames == [frame(number) for number in numbers]
            for one in got:
                if one[12:] not in frames:
                    Answer(one[12:])
            session.collect(TX, burst)
    assert session.worker.exit_code == 0
