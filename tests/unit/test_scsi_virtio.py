"""The virtio SCSI host device through real rings: request layout, addressing, task management, hostile
requests.
"""

import os
import select
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.memory import GuestMemory, MemoryRegion
from devices.scsi.cdrom import MAX_TRANSFER
from devices.scsi.medium import BLOCK_SIZE, Medium
from devices.scsi.sense import INVALID_OPCODE, RESET_OCCURRED
from devices.virtio import scsi
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC
from devices.virtio.scsi import CONTROL_QUEUE, EVENT_QUEUE, REQUEST_QUEUE, ScsiDevice
from tests.unit.worker_driver import QUEUE_SPACE, Guest

BLOCKS = 600
CONTENT = os.urandom(BLOCKS * BLOCK_SIZE)
LUN_0 = bytes((1, 0, 0x40, 0, 0, 0, 0, 0))
REPORT_LUNS_LUN = bytes((0xC1, 1, 0, 0, 0, 0, 0, 0))
OK, OVERRUN, BAD_TARGET, FAILURE, REJECTED, INCORRECT_LUN = 0, 1, 3, 9, 11, 12
TEST_UNIT_READY = bytes(6)
RESPONSE_SIZE = 12 + 96


class Events:
    """The transport, with the eventfds of three queues."""

    def __init__(self) -> None:
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.reasons: list[str] = []

    def kick_fd(self, queue: int) -> int:
        return self.kicks[queue]

    def call_fd(self, queue: int) -> int:
        return self.calls[queue]

    def config_changed(self) -> None: ...

    def needs_reset(self, reason: str) -> None:
        self.reasons.append(reason)

    def close(self) -> None:
        for fd in (*self.kicks, *self.calls):
            os.close(fd)


class Loop:
    """The watching part of a board; `turn` is one turn of the main loop."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        del self.watched[fd]

    def turn(self) -> None:
        for callback in list(self.watched.values()):
            callback()


class Machine:
    """A guest with a CD-ROM, and a driver's view of it. The unit attention of power-on was taken."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("test-iso")
        os.write(self.fd, CONTENT)
        ram = os.memfd_create("test-ram")
        os.ftruncate(ram, 3 * QUEUE_SPACE)
        memory = GuestMemory([MemoryRegion(0, 3 * QUEUE_SPACE, ram, 0)])
        self.queues = [Guest(memory, number) for number in range(3)]
        self.loop = Loop()
        self.device = ScsiDevice(memory, self.loop, Medium(self.fd))  # type: ignore[arg-type]
        self.events = Events()
        self.start()
        assert self.command(TEST_UNIT_READY)[2:] == (2, OK, RESET_OCCURRED.fixed().ljust(96, b"\0"), b"")

    def start(self) -> None:
        for queue in self.queues:
            queue.restart()
        self.device.activate(VIRTIO_F_INDIRECT_DESC, [queue.config for queue in self.queues], self.events)

    def kick(self, queue: int) -> None:
        """Notify, and let the main loop run until nothing is left to do."""
        os.eventfd_write(self.events.kicks[queue], 1)
        while any(readable(fd) for fd in self.loop.watched):
            self.loop.turn()

    def raw(self, queue: int, readable: list[bytes], writable: list[int]) -> tuple[int, bytes]:
        """One request, which is used exactly once: the used length, and what is in its writable part."""
        head = self.queues[queue].offer(readable, writable)
        self.kick(queue)
        assert self.events.reasons == []
        ((used, length, data),) = self.queues[queue].collect()
        assert used == head
        return length, data

    def command(
        self, cdb: bytes, sizes: tuple[int, ...] = (), lun: bytes = LUN_0, out: bytes = b""
    ) -> tuple[int, int, int, int, bytes, bytes]:
        """Used length, residual, status, response, the sense field, and data in as far as it is used."""
        header = lun + struct.pack("<QBBB", 7, 0, 0, 0) + cdb.ljust(32, b"\0")
        length, data = self.raw(REQUEST_QUEUE, [header, out] if out else [header], [RESPONSE_SIZE, *sizes])
        sense_size, residual, qualifier, status, response = struct.unpack_from("<IIHBB", data)
        assert (sense_size, qualifier) == (18 if status else 0, 0)
        assert data[length:] == b"\xee" * (len(data) - length)
        return length, residual, status, response, data[12:RESPONSE_SIZE], data[RESPONSE_SIZE:length]

    def manage(self, function: int, lun: bytes = LUN_0, kind: int = 0) -> int:
        length, data = self.raw(CONTROL_QUEUE, [struct.pack("<II8sQ", kind, function, lun, 7)], [1])
        assert length == 1
        return data[0]

    def broken_by(self, queue: int, readable: list[bytes], writable: list[int]) -> str:
        """Why the device needs a reset after this request, which stays unused."""
        self.queues[queue].offer(readable, writable)
        self.kick(queue)
        assert self.queues[queue].collect() == []
        assert self.loop.watched == {}
        (reason,) = self.events.reasons
        self.events.reasons.clear()
        self.device.reset()
        self.start()
        return reason

    def close(self) -> None:
        self.device.close()
        assert self.loop.watched == {}
        self.events.close()
        os.close(self.fd)
        self.queues[0].close()


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def read_10(address: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, address, 0, count, 0)


NO_SENSE = bytes(96)


def test_configuration(machine: Machine) -> None:
    config = struct.unpack("<7I2HI", machine.device.read_config(0, 36))
    assert config == (1, 126, MAX_TRANSFER // 512, 128, 16, 96, 32, 0, 0, 0)
    assert machine.device.read_config(34, 4) == bytes(4)
    assert machine.device.device_id == 8


def test_read(machine: Machine) -> None:
    answer = machine.command(read_10(3, 4), (1000, 7000, 192))
    assert answer == (RESPONSE_SIZE + 8192, 0, 0, OK, NO_SENSE, CONTENT[3 * BLOCK_SIZE : 7 * BLOCK_SIZE])


def test_residual(machine: Machine) -> None:
    assert machine.command(read_10(0, 1), (3000,))[:2] == (RESPONSE_SIZE + 2048, 952)
    assert machine.command(b"\x12\0\0\0\xff\0", (255,))[:2] == (RESPONSE_SIZE + 36, 219)
    assert machine.command(TEST_UNIT_READY, (100,))[:2] == (RESPONSE_SIZE, 100)


def test_check_condition(machine: Machine) -> None:
    sense = INVALID_OPCODE.fixed().ljust(96, b"\0")
    assert machine.command(b"\xff", (100,)) == (RESPONSE_SIZE, 100, 2, OK, sense, b"")
    # A write: what the device did not take is residual, too.
    assert machine.command(b"\x2a" + bytes(9), out=bytes(2048)) == (RESPONSE_SIZE, 2048, 2, OK, sense, b"")


def test_overrun(machine: Machine) -> None:
    assert machine.command(read_10(0, 2), (4095,)) == (RESPONSE_SIZE, 4095, 0, OVERRUN, NO_SENSE, b"")


def test_data_in_both_directions(machine: Machine) -> None:
    answer = machine.command(read_10(0, 1), (2048,), out=b"x")
    assert answer == (RESPONSE_SIZE, 2049, 0, FAILURE, NO_SENSE, b"")


@pytest.mark.parametrize(
    "lun",
    ["0001400000000000", "0101400000000000", "0100800000000000", "0100400000000001", "c102000000000000"],
)
def test_other_targets(machine: Machine, lun: str) -> None:
    answer = machine.command(b"\x12\0\0\0\x24\0", (36,), bytes.fromhex(lun))
    assert answer == (RESPONSE_SIZE, 36, 0, BAD_TARGET, NO_SENSE, b"")
    assert machine.manage(scsi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, bytes.fromhex(lun)) == BAD_TARGET


def test_logical_units(machine: Machine) -> None:
    inquiry = b"\x12\0\0\0\x24\0"
    for lun, device in (
        (LUN_0, 0x05),
        (bytes((1, 0, 0, 0, 0, 0, 0, 0)), 0x05),  # peripheral addressing
        (bytes((1, 0, 0x40, 1, 0, 0, 0, 0)), 0x7F),
        (bytes((1, 0, 0x41, 0, 0, 0, 0, 0)), 0x7F),
        (REPORT_LUNS_LUN, 0x1E),
    ):
        assert machine.command(inquiry, (36,), lun)[5][0] == device
    for lun in (LUN_0, REPORT_LUNS_LUN):
        data = machine.command(b"\xa0" + bytes(7) + b"\1\0\0\0", (256,), lun)[5]
        assert data == b"\0\0\0\x08" + bytes(12)


def test_task_management(machine: Machine) -> None:
    for function in (0, 1, 3, 4, 5, 6, 7):
        assert machine.manage(function) == OK
    for function in (2, 8, 0xFFFFFFFF):
        assert machine.manage(function) == REJECTED
    other_unit = bytes((1, 0, 0x40, 1, 0, 0, 0, 0))
    assert machine.manage(scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK, other_unit) == INCORRECT_LUN
    assert machine.manage(scsi.VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET, other_unit) == OK


def test_a_logical_unit_reset_is_told(machine: Machine) -> None:
    assert machine.command(TEST_UNIT_READY)[2] == 0
    assert machine.manage(scsi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET) == OK
    assert machine.command(TEST_UNIT_READY)[4] == RESET_OCCURRED.fixed().ljust(96, b"\0")


def test_an_abort_comes_after_the_requests_made_before(machine: Machine) -> None:
    header = LUN_0 + bytes(11) + read_10(0, 256).ljust(32, b"\0")
    reads = machine.queues[REQUEST_QUEUE]
    for _ in range(5):
        reads.offer([header], [RESPONSE_SIZE, 256 * BLOCK_SIZE])
    machine.queues[CONTROL_QUEUE].offer([struct.pack("<II8sQ", 0, 0, LUN_0, 7)], [1])
    os.eventfd_read(machine.events.calls[REQUEST_QUEUE])
    # Only the control queue is kicked.
    os.eventfd_write(machine.events.kicks[CONTROL_QUEUE], 1)
    used: list[tuple[int, int, bytes]] = []
    while not machine.queues[CONTROL_QUEUE].collect():
        assert len(used) < 5 or any(readable(fd) for fd in machine.loop.watched)
        machine.loop.turn()
        used += reads.collect()
    assert [length for _, length, _ in used] == [RESPONSE_SIZE + 256 * BLOCK_SIZE] * 5
    machine.kick(CONTROL_QUEUE)
    assert readable(machine.events.calls[REQUEST_QUEUE]), "no interrupt for the reads"


def test_one_turn_moves_a_bounded_number_of_bytes(machine: Machine) -> None:
    header = LUN_0 + bytes(11) + read_10(0, 256).ljust(32, b"\0")
    for _ in range(3):
        machine.queues[REQUEST_QUEUE].offer([header], [RESPONSE_SIZE, 256 * BLOCK_SIZE])
    os.eventfd_write(machine.events.kicks[REQUEST_QUEUE], 1)
    for _ in range(3):
        machine.loop.watched[machine.events.kicks[REQUEST_QUEUE]]()
        assert len(machine.queues[REQUEST_QUEUE].collect()) == 1


def test_notification_requests(machine: Machine) -> None:
    for kind in (scsi.VIRTIO_SCSI_T_AN_QUERY, scsi.VIRTIO_SCSI_T_AN_SUBSCRIBE):
        for lun, response in ((LUN_0, OK), (bytes((1, 9, 0x40, 0, 0, 0, 0, 0)), BAD_TARGET)):
            answer = machine.raw(CONTROL_QUEUE, [struct.pack("<I8sI", kind, lun, 0xFF)], [4, 1])
            assert answer == (5, struct.pack("<IB", 0, response))


def test_an_unknown_control_request_is_given_back(machine: Machine) -> None:
    assert machine.raw(CONTROL_QUEUE, [b"\3\0\0\0"], [8]) == (0, b"\xee" * 8)


def test_event_buffers_are_kept(machine: Machine) -> None:
    machine.queues[EVENT_QUEUE].offer([], [16])
    machine.kick(EVENT_QUEUE)
    assert machine.queues[EVENT_QUEUE].collect() == []
    assert machine.command(TEST_UNIT_READY)[2] == 0


def test_sizes_are_the_drivers(machine: Machine) -> None:
    machine.device.write_config(20, (8).to_bytes(4, "little"))
    machine.device.write_config(24, b"\x10")  # of any width
    machine.device.write_config(0, b"\xff" * 20)  # not writable
    assert struct.unpack("<7I", machine.device.read_config(0, 28)) == (1, 126, 1024, 128, 16, 8, 16)
    request = LUN_0 + bytes(11) + b"\xff".ljust(16, b"\0")
    length, data = machine.raw(REQUEST_QUEUE, [request], [12 + 8 + 5])
    assert (length, data[12:20], data[20:]) == (20, INVALID_OPCODE.fixed()[:8], b"\xee" * 5)
    assert struct.unpack_from("<II", data) == (8, 5)
    machine.device.reset()
    assert struct.unpack("<II", machine.device.read_config(20, 8)) == (96, 32)


@pytest.mark.parametrize(
    ("offset", "data"), [(20, bytes((0, 0, 1))), (24, bytes((0, 1))), (18, b"\xff" * 20)]
)
def test_sizes_out_of_range(machine: Machine, offset: int, data: bytes) -> None:
    with pytest.raises(GuestError, match="SCSI sense"):
        machine.device.write_config(offset, data)
    assert struct.unpack("<II", machine.device.read_config(20, 8)) == (96, 32)


@pytest.mark.parametrize(
    ("queue", "sizes", "room"),
    [
        (REQUEST_QUEUE, [19 + 31], [RESPONSE_SIZE]),
        (REQUEST_QUEUE, [], [RESPONSE_SIZE]),
        (REQUEST_QUEUE, [19, 32], [RESPONSE_SIZE - 1]),
        (REQUEST_QUEUE, [51], []),
        (CONTROL_QUEUE, [3], [16]),
        (CONTROL_QUEUE, [23], [16]),
        (CONTROL_QUEUE, [24], []),
    ],
)
def test_malformed_requests(machine: Machine, queue: int, sizes: list[int], room: list[int]) -> None:
    assert machine.broken_by(queue, [bytes(size) for size in sizes], room).startswith("SCSI ")
    assert machine.command(TEST_UNIT_READY)[2] == 2  # after the reset all is well: a unit attention
    assert machine.command(read_10(0, 1), (2048,))[5] == CONTENT[:2048]


def test_short_notification_requests(machine: Machine) -> None:
    assert machine.broken_by(CONTROL_QUEUE, [struct.pack("<I8s", 1, LUN_0)], [5]).startswith("SCSI ")
    assert machine.broken_by(CONTROL_QUEUE, [struct.pack("<I8sI", 1, LUN_0, 1)], [4]).startswith("SCSI ")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([CONTROL_QUEUE, REQUEST_QUEUE]),
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=80),
            st.binary(max_size=32).map(lambda cdb: LUN_0 + bytes(11) + cdb.ljust(32, b"\0")),
        ),
        max_size=3,
    ),
    st.lists(st.integers(1, 5000), max_size=4),
)
def test_any_request_is_used_once_or_breaks_the_device(queue: int, out: list[bytes], room: list[int]) -> None:
    if not out and not room:
        return
    machine = Machine()
    try:
        head = machine.queues[queue].offer(out, room)
        machine.kick(queue)
        used = machine.queues[queue].collect()
        if machine.events.reasons:
            assert used == []
        else:
            ((found, length, data),) = used
            assert found == head
            assert length <= sum(room)
            assert data[length:] == b"\xee" * (sum(room) - length)
    finally:
        machine.close()
