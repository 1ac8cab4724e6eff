"""The virtio devices of the VMM process are paused, saved, loaded: entropy, the CD-ROM drive, vmmci."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.block.transfer import slice_buffers
from devices.errors import GuestError
from devices.memory import GuestMemory, MemoryRegion
from devices.scsi.cdrom import CdRom
from devices.scsi.medium import BLOCK_SIZE, Medium
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, ActiveDriver
from devices.virtio.inprocess import InProcessDevice
from devices.virtio.rng import QUEUE_SIZE, VirtioRng
from devices.virtio.scsi import REQUEST_QUEUE, ScsiDevice
from devices.virtio.vmmci import VMMCI_SHUTDOWN, VMMCI_SYNCRTC, Vmmci
from tests.unit.state_mutations import mutated, through_json
from tests.unit.vhost_toy import ToyBoard, ToyEvents
from tests.unit.worker_driver import QUEUE_SPACE, Guest

BLOCKS = 4
LUN_0 = bytes((1, 0, 0x40, 0, 0, 0, 0, 0))
START_STOP, TEST_READY, PREVENT, EVENTS, READ_10 = 0x1B, 0x00, 0x1E, 0x4A, 0x28


@pytest.fixture
def medium(tmp_path: Path) -> Iterator[Medium]:
    path = tmp_path / "disc.iso"
    path.write_bytes(os.urandom(BLOCKS * BLOCK_SIZE))
    fd = os.open(path, os.O_RDONLY)
    yield Medium(fd)
    os.close(fd)


class Machine:
    """A device, active, with a queue for each it has, on a main loop that turns when it is told to."""

    def __init__(self, build: Any, guests: list[Guest] | None = None) -> None:
        self.board = ToyBoard()
        count = 3
        if guests is None:
            fd = os.memfd_create("test-ram")
            os.ftruncate(fd, count * QUEUE_SPACE)
            memory = GuestMemory([MemoryRegion(0, count * QUEUE_SPACE, fd, 0)])
            guests = [Guest(memory, number) for number in range(count)]
        self.guests = guests
        self.device: InProcessDevice = build(guests[0].memory, self.board)
        self.events = ToyEvents(count)

    @property
    def driver(self) -> ActiveDriver:
        queues = tuple(guest.config for guest in self.guests[: len(self.device.queue_sizes)])
        return ActiveDriver(VIRTIO_F_INDIRECT_DESC, queues, self.events)

    def activate(self) -> None:
        self.device.activate(VIRTIO_F_INDIRECT_DESC, list(self.driver.queues), self.events)

    def turn(self) -> None:
        while self.board.watched and self.board.turn(0):
            pass

    def request(self, queue: int, readable: list[bytes], writable: list[int]) -> bytes:
        """What is answered, by the main loop's next turns; nothing when the device holds still."""
        self.guests[queue].offer(readable, writable)
        os.eventfd_write(self.events.kicks[queue], 1)
        self.turn()
        answers = self.guests[queue].collect()
        return answers[-1][2] if answers else b""

    def scsi(self, *cdb: int, room: int = 0) -> bytes:
        request = LUN_0 + bytes(11) + bytes(cdb).ljust(32, b"\0")
        return self.request(REQUEST_QUEUE, [request], [12 + 96, *([room] if room else [])])

    def close(self, memory: bool = True) -> None:
        self.device.close()
        assert not self.board.watched
        self.events.close()
        if memory:
            self.guests[0].close()


def test_random_numbers_before_while_and_after() -> None:
    machine = Machine(VirtioRng)
    machine.activate()
    assert any(machine.request(0, [], [64]))
    machine.guests[0].offer([], [64])
    os.eventfd_write(machine.events.kicks[0], 1)
    machine.device.pause()
    assert not machine.board.watched  # or the main loop would spin
    assert machine.request(0, [], [64]) == b""
    state = through_json(machine.device.save())
    assert state["queues"] == {"0": {"next_avail": 1, "next_used": 1}}
    other = Machine(VirtioRng, machine.guests)
    other.device.load(state, other.driver)
    assert other.device.save() == state
    machine.close(memory=False)
    other.turn()
    assert other.guests[0].collect() == []
    other.device.unpause()
    other.turn()
    assert [length for _, length, _ in other.guests[0].collect()] == [64, 64]
    assert any(other.request(0, [], [64]))
    other.device.pause()
    other.device.unpause()
    other.device.unpause()
    assert any(other.request(0, [], [64]))
    other.close()


def test_without_a_driver() -> None:
    machine, other = Machine(VirtioRng), Machine(VirtioRng)
    machine.device.pause()
    state = through_json(machine.device.save())
    other.device.load(state, None)
    for each in (machine, other):
        each.device.unpause()
        each.activate()
        assert any(each.request(0, [], [QUEUE_SIZE]))
        each.close()


def test_a_broken_queue_rests() -> None:
    machine = Machine(VirtioRng)
    machine.activate()
    machine.request(0, [b"what"], [1])
    assert machine.events.resets
    machine.device.pause()
    state = through_json(machine.device.save())
    assert state["queues"] is None
    other = Machine(VirtioRng, machine.guests)
    other.device.load(state, other.driver)
    other.device.unpause()
    assert not other.board.watched
    machine.close(memory=False)
    other.device.reset()
    other.guests[0].restart()
    other.activate()
    assert any(other.request(0, [], [64]))
    other.close()


def test_the_drive_and_the_sizes_that_the_driver_chose(medium: Medium) -> None:
    machine = Machine(lambda memory, board: ScsiDevice(memory, board, medium))
    machine.activate()
    machine.device.write_config(20, (18).to_bytes(4, "little"))
    machine.device.write_config(20, (96).to_bytes(4, "little"))
    machine.scsi(TEST_READY)  # takes the unit attention of power-on
    machine.scsi(START_STOP, 0, 0, 0, 2)  # opens the tray
    machine.device.pause()
    state = through_json(machine.device.save())
    assert state["own"]["drive"] == {
        "blocks": BLOCKS, "tray_open": True, "locked": False, "event": 3, "attention": "",
    }  # fmt: skip
    other = Machine(lambda memory, board: ScsiDevice(memory, board, medium), machine.guests)
    other.device.load(state, other.driver)
    machine.close(memory=False)
    other.device.unpause()
    other.scsi(START_STOP, 0, 0, 0, 3)  # closes it
    assert other.scsi(TEST_READY)[12:][2] == 6  # the medium may have changed
    assert other.scsi(READ_10, 0, 0, 0, 0, 1, 0, 0, 1, room=BLOCK_SIZE)[12 + 96 :] == disc(medium, 1)
    other.close()


def disc(medium: Medium, block: int) -> bytes:
    buffer = memoryview(bytearray(BLOCK_SIZE))
    assert medium.read(block, 1, slice_buffers([buffer], 0, BLOCK_SIZE))
    return bytes(buffer)


CDBS = st.sampled_from([
    bytes((TEST_READY,)), bytes((PREVENT, 0, 0, 0, 1)), bytes((PREVENT,)), bytes((START_STOP, 0, 0, 0, 2)),
    bytes((START_STOP, 0, 0, 0, 3)), bytes((EVENTS, 1, 0, 0, 16, 0, 0, 0, 64)), b"reset",
]).map(lambda cdb: cdb if cdb == b"reset" else cdb.ljust(10, b"\0"))  # fmt: skip


def execute(drive: CdRom, cdb: bytes) -> Any:
    if cdb == b"reset":
        return drive.reset()
    return drive.execute(cdb, [], 1024)


@given(before=st.lists(CDBS, max_size=20), after=st.lists(CDBS, max_size=20), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_drive_goes_on_like_the_one_saved(
    before: list[bytes], after: list[bytes], data: st.DataObject
) -> None:
    fd = os.memfd_create("disc")
    os.ftruncate(fd, BLOCKS * BLOCK_SIZE)
    try:
        drive, other = CdRom(Medium(fd)), CdRom(Medium(fd))
        for cdb in before:
            execute(drive, cdb)
        other.load(through_json(drive.save()))
        for cdb in after:
            assert execute(other, cdb) == execute(drive, cdb)
        assert other.save() == drive.save()
        try:
            other.load(data.draw(mutated(drive.save())))
        except ValueError:
            assert other.save() == drive.save()
    finally:
        os.close(fd)


def test_states_that_cannot_be_are_refused_and_the_device_closes(medium: Medium) -> None:
    machine = Machine(lambda memory, board: ScsiDevice(memory, board, medium))
    machine.activate()
    machine.scsi(TEST_READY)
    machine.device.pause()
    state = through_json(machine.device.save())

    @given(state=mutated(state), active=st.booleans())
    @settings(max_examples=200, deadline=None, database=None)
    def load(state: dict[str, Any], active: bool) -> None:
        other = Machine(lambda memory, board: ScsiDevice(memory, board, medium), machine.guests)
        try:
            other.device.load(state, other.driver if active else None)
            other.device.unpause()
            other.turn()
        except (ValueError, GuestError):
            pass
        finally:
            other.close(memory=False)

    load()
    machine.close()


class Told:
    def __init__(self) -> None:
        self.events = ToyEvents(0)
        self.heard: list[Any] = []
        self.device = Vmmci(
            lambda: self.heard.append("driver"), self.heard.append, lambda: self.heard.append("off")
        )


@pytest.mark.parametrize("acknowledged", [False, True])
def test_a_command_that_waits_for_its_acknowledgement(acknowledged: bool) -> None:
    one, other = Told(), Told()
    one.device.activate(7, [], one.events)
    assert one.device.send(VMMCI_SHUTDOWN)
    if acknowledged:
        one.device.write_config(0, struct.pack("<I", VMMCI_SHUTDOWN))
    one.device.pause()
    state = through_json(one.device.save())
    other.device.load(state, ActiveDriver(7, (), other.events))
    assert other.device.save() == state
    other.device.unpause()
    assert other.heard == ["driver"]  # whoever sets clocks has to know
    assert other.device.acknowledges
    assert other.device.read_config(0, 4) == struct.pack("<I", VMMCI_SHUTDOWN)
    assert not other.device.send(VMMCI_SYNCRTC)
    other.device.write_config(0, struct.pack("<I", VMMCI_SHUTDOWN))
    assert other.heard == (["driver"] if acknowledged else ["driver", VMMCI_SHUTDOWN])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_vmmci_cannot_have_said_is_refused(data: st.DataObject) -> None:
    one, other = Told(), Told()
    one.device.activate(7, [], one.events)
    one.device.send(data.draw(st.integers(1, 3)))
    state = data.draw(mutated(one.device.save()))
    driver = ActiveDriver(7, (), other.events) if data.draw(st.booleans()) else None
    try:
        other.device.load(state, driver)
    except ValueError:
        assert not other.device.ready
