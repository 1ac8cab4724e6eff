"""Real workers that are paused under load, go on, and hand their rings to another process: no request is
lost, and none is carried out twice (devices/vhost/frontend.py, devices/virtio/queue.py).
"""

import os
import random
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.vhost.frontend import VhostUserDevice
from devices.vhost.messages import ProtocolError
from devices.virtio.device import VIRTIO_ID_BLOCK, VIRTIO_ID_NET, ActiveDriver
from devices.worker.launcher import Worker, launch
from tests.unit.state_mutations import mutated, through_json
from tests.unit.vhost_toy import ToyBoard, ToyEvents
from tests.unit.worker_driver import SIZE, USED
from tests.unit.worker_session import Session

MIB = 1 << 20
IN, OUT = 0, 1
FEATURES = 1 << 32 | 1 << 28 | 0xFFFFFF
MAC = "52:54:00:12:34:56"


@contextmanager
def disk(tmp_path: Path) -> Iterator[tuple[Session, int]]:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with Session("blk", VIRTIO_ID_BLOCK, 1, {"format": "raw"}, {"image": fd}) as session:
            yield session, fd
    finally:
        os.close(fd)


class Successor:
    """Another front end with another worker, as a restore makes them, over the memory of `session`."""

    def __init__(
        self, session: Session, kind: str, device_id: int, words: dict[str, str], fds: dict[str, int]
    ) -> None:
        self.failures: list[str] = []
        self.board = ToyBoard()
        self.guests = session.guests
        self.events = ToyEvents(len(self.guests))
        self.worker: Worker = launch(kind, f"{kind}0", words, fds)
        self.device = VhostUserDevice(
            self.worker.channel,
            name=f"{kind}0",
            device_id=device_id,
            queue_sizes=(SIZE,) * len(self.guests),
            memory=self.guests[0].memory,
            board=self.board,
            on_failure=self.failures.append,
        )

    @property
    def driver(self) -> ActiveDriver:
        queues = tuple(guest.config for guest in self.guests)
        return ActiveDriver(self.device.features & FEATURES, queues, self.events)

    def take_over(self, session: Session) -> None:
        """In the place of the session's own device and worker, which end."""
        session.device.close()
        session.worker.stop()
        session.events.close()
        session.device, session.worker = self.device, self.worker
        session.board, session.events = self.board, self.events
        session.failures = self.failures

    def close(self) -> None:
        self.device.close()
        self.worker.stop()
        self.events.close()


def used_index(session: Session, queue: int = 0) -> int:
    guest = session.guests[queue]
    return int(struct.unpack("<H", guest.memory.read(guest.base + USED + 2, 2))[0])


def write(session: Session, sector: int, data: bytes) -> None:
    session.offer(0, [struct.pack("<IIQ", OUT, 0, sector), data], [1])


def read(session: Session, sector: int) -> bytes:
    session.offer(0, [struct.pack("<IIQ", IN, 0, sector)], [512, 1])
    ((_, _, data),) = session.collect(0)
    assert data[-1] == 0
    return data[:-1]


def rings(session: Session) -> Any:
    return session.device.save()["rings"]


def test_pause_with_requests_in_flight(tmp_path: Path) -> None:
    with disk(tmp_path) as (session, _):
        for sector in range(40):
            write(session, sector, bytes((sector,)) * 512)
        session.device.pause()
        done = used_index(session)
        assert rings(session) == {"0": done}  # all that was taken is answered
        for sector in range(40, 60):
            write(session, sector, bytes((sector,)) * 512)
        session.device.pause()
        assert used_index(session) == done
        session.device.unpause()
        session.device.unpause()
        assert len(session.collect(0, 60)) == 60
        for sector in range(60):
            assert read(session, sector) == bytes((sector,)) * 512
        assert session.failures == []


def test_inactive(tmp_path: Path) -> None:
    with disk(tmp_path) as (session, _):
        session.device.reset()
        session.device.pause()
        assert rings(session) is None
        session.device.unpause()
        session.guests[0].restart()
        session.activate()
        assert read(session, 0) == bytes(512)


def test_a_device_activated_while_paused_waits(tmp_path: Path) -> None:
    with disk(tmp_path) as (session, _):
        session.device.reset()
        session.guests[0].restart()
        session.device.pause()
        session.activate()
        assert rings(session) == {"0": 0}
        session.device.unpause()
        assert read(session, 0) == bytes(512)


def test_a_thousand_pauses_under_load_lose_nothing(tmp_path: Path) -> None:
    chance = random.Random(4)
    expected = bytearray(4 * MIB)
    with disk(tmp_path) as (session, _):
        offered = answered = 0
        for cycle in range(1000):
            while offered - answered < chance.randint(1, SIZE):
                sector = chance.randrange(4 * MIB // 512)
                data = struct.pack("<II", cycle, offered) * 64
                expected[512 * sector : 512 * (sector + 1)] = data
                write(session, sector, data)
                offered += 1
            session.device.pause()
            assert rings(session) == {"0": used_index(session)}
            answers = session.guests[0].collect()
            assert all(data == b"\0" for _, _, data in answers)
            answered += len(answers)
            session.device.unpause()
        if offered > answered:
            assert len(session.collect(0, offered - answered)) == offered - answered
        assert offered > 1000
        assert session.failures == []
    assert (tmp_path / "disk.raw").read_bytes() == expected


def test_another_process_goes_on(tmp_path: Path) -> None:
    """Ten times in a row, each with requests that the one before left in the ring."""
    with disk(tmp_path) as (session, fd):
        sector = 0
        for _ in range(10):
            for _ in range(20):
                write(session, sector, bytes((sector % 251,)) * 512)
                sector += 1
            session.device.pause()
            state = through_json(session.device.save())
            successor = Successor(session, "blk", VIRTIO_ID_BLOCK, {"format": "raw"}, {"image": fd})
            successor.device.load(state, successor.driver)
            assert successor.device.save() == state
            successor.take_over(session)
            session.device.unpause()
            # The first interrupt may come for what was used before the pause.
            answers = session.guests[0].collect()
            answers += session.collect(0, 20 - len(answers)) if len(answers) < 20 else []
            assert [data for _, _, data in answers] == [b"\0"] * 20
        for number in range(sector):
            assert read(session, number) == bytes((number % 251,)) * 512
        assert session.failures == []


def restarted(session: Session, fd: int) -> None:
    session.worker.stop()
    session.worker = launch("blk", "blk0", {"format": "raw"}, {"image": fd})
    session.device.restart(session.worker.channel)


def killed(session: Session) -> None:
    os.kill(session.worker.pid, signal.SIGKILL)
    while not session.failures:
        assert session.board.turn(30)


def test_a_worker_killed_while_paused_starts_its_rings_when_the_machine_goes_on(tmp_path: Path) -> None:
    with disk(tmp_path) as (session, fd):
        for sector in range(30):
            write(session, sector, b"k" * 512)
        session.device.pause()
        state, done = session.device.save(), used_index(session)
        killed(session)
        assert session.device.save() == state
        restarted(session, fd)
        assert (session.device.save(), used_index(session)) == (state, done)
        session.device.unpause()
        assert len(session.collect(0, 30)) == 30
        assert read(session, 29) == b"k" * 512


def test_a_worker_killed_while_paused_and_unpaused_without_one(tmp_path: Path) -> None:
    with disk(tmp_path) as (session, fd):
        for sector in range(30):
            write(session, sector, b"u" * 512)
        session.device.pause()
        killed(session)
        session.device.unpause()
        restarted(session, fd)
        assert len(session.collect(0, 30)) == 30
        assert read(session, 29) == b"u" * 512


def test_a_worker_that_dies_instead_of_pausing(tmp_path: Path) -> None:
    """Nobody can say where the ring stands before the next one has finished what was in flight."""
    with disk(tmp_path) as (session, fd):
        for sector in range(30):
            write(session, sector, b"d" * 512)
        os.kill(session.worker.pid, signal.SIGKILL)
        session.worker.wait(30)
        session.device.pause()
        assert session.failures
        with pytest.raises(ProtocolError, match="blk0: the back end has not said where its rings stand"):
            session.device.save()
        restarted(session, fd)
        done = used_index(session)
        assert rings(session) == {"0": done}
        session.device.unpause()
        assert len(session.collect(0, 30)) == 30
        assert read(session, 29) == b"d" * 512


def test_a_ring_that_the_guest_broke_rests_until_the_driver_resets_it(tmp_path: Path) -> None:
    with disk(tmp_path) as (session, fd):
        session.offer(0, [b"short"], [1])
        poll = select.poll()
        (err,) = session.device._err_fds.values()
        poll.register(err, select.POLLIN)
        assert poll.poll(30_000)
        session.device.pause()  # before the main loop saw it
        assert len(session.events.resets) == 1
        state = through_json(session.device.save())
        assert state["rings"] == {}
        successor = Successor(session, "blk", VIRTIO_ID_BLOCK, {"format": "raw"}, {"image": fd})
        successor.device.load(state, successor.driver)
        successor.take_over(session)
        session.device.unpause()
        session.device.reset()
        session.guests[0].restart()
        session.activate()
        assert read(session, 0) == bytes(512)
        assert session.failures == []


def test_receive_buffers_that_wait_for_a_frame_are_taken_again() -> None:
    """The card's worker holds one, and marks it as in flight: it must be in the ring for the next one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    header = bytes(12)
    fds = {"tap": theirs.fileno()}
    with ours, theirs, Session("net", VIRTIO_ID_NET, 2, {"mac": MAC}, fds) as session:
        frames = [bytes((number,)) * 60 for number in range(8)]
        for _ in frames:
            session.offer(0, [], [12 + 1500])
        ours.send(header + frames[0])
        assert session.collect(0)[0][2][12:72] == frames[0]
        for number in range(1, 8):
            session.device.pause()
            assert session.device.save()["rings"] == {"0": number, "1": 0}
            if number % 2:
                state = through_json(session.device.save())
                successor = Successor(session, "net", VIRTIO_ID_NET, {"mac": MAC}, fds)
                successor.device.load(state, successor.driver)
                successor.take_over(session)
            ours.send(header + frames[number])
            assert used_index(session) == number
            session.device.unpause()
            ((head, length, data),) = session.collect(0)
            assert (head, length, data[12:72]) == (number, 72, frames[number])
        assert session.failures == []


def test_another_mac_is_told_when_the_machine_goes_on() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    fds = {"tap": theirs.fileno()}
    with ours, theirs, Session("net", VIRTIO_ID_NET, 2, {"mac": MAC}, fds) as session:
        session.device.pause()
        state = through_json(session.device.save())
        successor = Successor(session, "net", VIRTIO_ID_NET, {"mac": "52:54:00:12:34:57"}, fds)
        successor.device.load(state, successor.driver)
        assert successor.events.config_changes == 0
        successor.device.unpause()
        assert successor.events.config_changes == 1
        assert successor.device.read_config(0, 6)[-1] == 0x57
        successor.close()


def test_states_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with disk(tmp_path) as (session, fd):
        write(session, 0, b"x" * 512)
        session.collect(0)
        session.device.pause()
        state = through_json(session.device.save())
        successor = Successor(session, "blk", VIRTIO_ID_BLOCK, {"format": "raw"}, {"image": fd})

        @given(state=mutated(state), active=st.booleans())
        @settings(max_examples=200, deadline=None, database=None)
        def load(state: dict[str, Any], active: bool) -> None:
            try:
                successor.device.load(state, successor.driver if active else None)
            except (ValueError, GuestError):
                return
            successor.device.save()

        load()
        assert successor.failures == []
        successor.close()
