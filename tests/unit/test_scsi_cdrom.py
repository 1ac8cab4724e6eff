"""The SCSI target and its CD-ROM drive, command by command, without virtio."""

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import ImageError
from devices.scsi.cdrom import MAX_TRANSFER, CdRom
from devices.scsi.medium import BLOCK_SIZE, Medium
from devices.scsi.sense import (
    ADDRESS_OUT_OF_RANGE,
    CHECK_CONDITION,
    GOOD,
    INVALID_FIELD,
    INVALID_OPCODE,
    MEDIUM_CHANGED,
    NO_MEDIUM,
    NO_SAVED_PARAMETERS,
    NO_SENSE,
    NO_SUCH_UNIT,
    REMOVAL_PREVENTED,
    RESET_OCCURRED,
    UNRECOVERED_READ,
    Sense,
)
from devices.scsi.target import REPORT_LUNS_UNIT, Target
from devices.scsi.unit import Overrun, Reply

BLOCKS = 300
TAIL = 700  # bytes in the last block
CONTENT = os.urandom(BLOCK_SIZE) + bytes(
    (index * 7 + index // BLOCK_SIZE) & 0xFF for index in range((BLOCKS - 2) * BLOCK_SIZE + TAIL)
)

TEST_UNIT_READY = bytes(6)
EJECT = bytes((0x1B, 0, 0, 0, 2, 0))
LOAD = bytes((0x1B, 0, 0, 0, 3, 0))
LOCK = bytes((0x1E, 0, 0, 0, 1, 0))
UNLOCK = bytes((0x1E, 0, 0, 0, 0, 0))


def read_10(address: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, address, 0, count, 0)


def inquiry(size: int, page: int | None = None) -> bytes:
    return struct.pack(">BBBHB", 0x12, page is not None, page or 0, size, 0)


def mode_sense_10(page: int, size: int, control: int = 0, subpage: int = 0) -> bytes:
    return struct.pack(">BBBBBBBHB", 0x5A, 0, control << 6 | page, subpage, 0, 0, 0, size, 0)


def toc(kind: int, msf: bool, start: int, size: int) -> bytes:
    return struct.pack(">BBBBBBBHB", 0x43, msf << 1, kind, 0, 0, 0, start, size, 0)


def configuration(request: int, start: int, size: int) -> bytes:
    return struct.pack(">BBHBBBHB", 0x46, request, start, 0, 0, 0, size, 0)


def event_status(classes: int, size: int, polled: bool = True) -> bytes:
    return struct.pack(">BBBBBBBHB", 0x4A, polled, 0, 0, classes, 0, 0, size, 0)


def report_luns(size: int, select: int = 0) -> bytes:
    return struct.pack(">BBBBBBIBB", 0xA0, 0, select, 0, 0, 0, size, 0, 0)


class Drive:
    """A target over a file, whose unit attention of power-on was taken."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.fd = os.memfd_create("test-iso")
        os.write(self.fd, content)
        self.unit = CdRom(Medium(self.fd))
        self.target = Target(self.unit)
        self.fails(TEST_UNIT_READY, RESET_OCCURRED)

    def reply(self, cdb: bytes, sizes: list[int], lun: int = 0) -> tuple[Reply, bytes]:
        """The reply and what is in the buffers, of these sizes."""
        memory = bytearray(b"\xee" * sum(sizes))
        buffers, start = [], 0
        for size in sizes:
            buffers.append(memoryview(memory)[start : start + size])
            start += size
        reply = self.target.execute(lun, cdb, buffers, start)
        assert len(reply.data) in (0, reply.transferred)
        memory[: len(reply.data)] = reply.data
        return reply, bytes(memory)

    def data(self, cdb: bytes, room: int, lun: int = 0) -> bytes:
        reply, memory = self.reply(cdb, [room], lun)
        assert (reply.status, reply.sense) == (GOOD, b"")
        assert memory[reply.transferred :] == b"\xee" * (room - reply.transferred)
        return memory[: reply.transferred]

    def fails(self, cdb: bytes, sense: Sense, room: int = 65536, lun: int = 0) -> None:
        reply, memory = self.reply(cdb, [room], lun)
        assert (reply.status, reply.sense, reply.transferred) == (CHECK_CONDITION, sense.fixed(), 0)
        if sense.key != UNRECOVERED_READ.key:
            assert memory == b"\xee" * room

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def drive() -> Iterator[Drive]:
    drive = Drive()
    yield drive
    drive.close()


def test_fixed_sense() -> None:
    assert ADDRESS_OUT_OF_RANGE.fixed() == bytes.fromhex("70 00 05 00000000 0a 00000000 21 00 00000000")
    assert UNRECOVERED_READ.at(0x1234).fixed()[:7] == bytes.fromhex("f0 00 03 00001234")
    assert UNRECOVERED_READ.at(1 << 32).fixed()[0] == 0x70


def test_inquiry(drive: Drive) -> None:
    data = drive.data(inquiry(255), 255)
    assert data[:5] == bytes((5, 0x80, 5, 0x12, 31))
    assert data[8:] == b"VMRUN   CD-ROM          1.0 "
    assert drive.data(inquiry(5), 255) == data[:5]
    assert drive.data(inquiry(0), 0) == b""
    drive.fails(b"\x12\0\x80\0\xff\0", INVALID_FIELD)  # a page code without EVPD
    drive.fails(b"\x12\2\0\0\xff\0", INVALID_FIELD)


def test_vital_product_data(drive: Drive) -> None:
    assert drive.data(inquiry(255, 0), 255) == bytes((5, 0, 0, 3, 0, 0x80, 0x83))
    assert drive.data(inquiry(255, 0x80), 255) == b"\x05\x80\x00\x06cdrom0"
    data = drive.data(inquiry(255, 0x83), 255)
    assert data[:8] == bytes((5, 0x83, 0, 34, 2, 1, 0, 30))
    assert data[8:] == b"VMRUN   CD-ROM          cdrom0"
    drive.fails(inquiry(255, 0xB0), INVALID_FIELD)


@pytest.mark.parametrize("count", [0, 1, 2, MAX_TRANSFER // BLOCK_SIZE])
def test_reads(drive: Drive, count: int) -> None:
    expected = CONTENT[2 * BLOCK_SIZE :][: count * BLOCK_SIZE]
    room = count * BLOCK_SIZE + 100
    assert drive.data(read_10(2, count), room) == expected
    assert drive.data(struct.pack(">BBIIBB", 0xA8, 0, 2, count, 0, 0), room) == expected
    assert drive.data(struct.pack(">BBQIBB", 0x88, 0, 2, count, 0, 0), room) == expected
    if count:
        assert drive.data(bytes((0x08, 0, 0, 2, count & 0xFF, 0)), room) == expected


def test_read_6_of_count_0_is_256_blocks(drive: Drive) -> None:
    assert (
        drive.data(bytes((0x08, 0xE0, 0, 1, 0, 0)), MAX_TRANSFER) == (CONTENT[BLOCK_SIZE : 257 * BLOCK_SIZE])
    )


def test_read_into_many_buffers(drive: Drive) -> None:
    reply, memory = drive.reply(read_10(0, 2), [1, 3000, 5, 2000])
    assert (reply.status, reply.transferred, reply.data) == (GOOD, 4096, b"")
    assert memory == CONTENT[:4096] + b"\xee" * 910


def test_the_last_block_ends_in_zeroes(drive: Drive) -> None:
    assert drive.data(b"\x25" + bytes(9), 8) == struct.pack(">II", BLOCKS - 1, BLOCK_SIZE)
    tail = CONTENT[-TAIL:] + bytes(BLOCK_SIZE - TAIL)
    assert drive.data(read_10(BLOCKS - 1, 1), BLOCK_SIZE) == tail


@pytest.mark.parametrize(
    ("address", "count"), [(BLOCKS, 1), (BLOCKS - 1, 2), (0xFFFFFFFF, 1), (BLOCKS + 1, 0)]
)
def test_addresses_past_the_end(drive: Drive, address: int, count: int) -> None:
    drive.fails(read_10(address, count), ADDRESS_OUT_OF_RANGE)
    drive.fails(struct.pack(">BBQIBB", 0x88, 0, address << 31, count, 0, 0), ADDRESS_OUT_OF_RANGE)


def test_seek(drive: Drive) -> None:
    drive.data(struct.pack(">BBI4x", 0x2B, 0, BLOCKS - 1), 0)
    drive.fails(struct.pack(">BBI4x", 0x2B, 0, BLOCKS), ADDRESS_OUT_OF_RANGE)


def test_transfers_are_bounded(drive: Drive) -> None:
    count = MAX_TRANSFER // BLOCK_SIZE + 1
    drive.fails(read_10(0, count), INVALID_FIELD, count * BLOCK_SIZE)


@pytest.mark.parametrize(
    "cdb", [read_10(0, 1), inquiry(2048), struct.pack(">BBIIBB", 0xA8, 0, 0, 0xFFFFFFFF, 0, 0)]
)
def test_more_asked_than_there_is_room(drive: Drive, cdb: bytes) -> None:
    with pytest.raises(Overrun):
        drive.reply(cdb, [2047])


def test_a_file_made_shorter_is_a_medium_error(drive: Drive) -> None:
    os.ftruncate(drive.fd, 1000)
    drive.fails(read_10(0, 1), UNRECOVERED_READ.at(0))


def test_a_file_that_cannot_be_read_is_a_medium_error() -> None:
    drive = Drive()
    read_end, write_end = os.pipe()
    os.dup2(read_end, drive.fd)
    drive.fails(read_10(0, 1), UNRECOVERED_READ.at(0))
    for fd in (read_end, write_end):
        os.close(fd)
    drive.close()


def test_an_empty_file_is_refused() -> None:
    fd = os.memfd_create("empty")
    with pytest.raises(ImageError, match="empty"):
        Medium(fd)
    os.close(fd)


def test_capacity_16(drive: Drive) -> None:
    cdb = struct.pack(">BBQIBB", 0x9E, 0x10, 0, 32, 0, 0)
    assert drive.data(cdb, 32) == struct.pack(">QI20x", BLOCKS - 1, BLOCK_SIZE)
    assert len(drive.data(struct.pack(">BBQIBB", 0x9E, 0x10, 0, 12, 0, 0), 32)) == 12
    drive.fails(struct.pack(">BBQIBB", 0x9E, 0x11, 0, 32, 0, 0), INVALID_FIELD)


def test_capacity_of_a_part_is_obsolete(drive: Drive) -> None:
    drive.fails(struct.pack(">BBI4x", 0x25, 0, 1), INVALID_FIELD)
    drive.fails(b"\x25" + bytes(7) + b"\1\0", INVALID_FIELD)


def test_mode_sense(drive: Drive) -> None:
    capabilities = drive.data(mode_sense_10(0x2A, 128), 128)
    assert capabilities[:10] == bytes((0, 28, 0, 0, 0, 0, 0, 0, 0x2A, 20))
    assert capabilities[14] == 0x29  # tray, eject, lock
    every = drive.data(mode_sense_10(0x3F, 128), 128)
    assert int.from_bytes(every[:2], "big") == len(every) - 2
    pages, at = [], 8
    while at < len(every):
        pages.append(every[at])
        at += 2 + every[at + 1]
    assert (pages, at) == ([0x01, 0x0E, 0x2A], len(every))
    short = drive.data(bytes((0x1A, 0, 0x3F, 0, 128, 0)), 128)
    assert short == bytes((len(short) - 1, 0, 0, 0)) + every[8:]
    unchangeable = drive.data(mode_sense_10(0x2A, 128, control=1), 128)
    assert unchangeable == capabilities[:10] + bytes(20)
    assert drive.data(mode_sense_10(0x2A, 4), 128) == capabilities[:4]


def test_mode_sense_refusals(drive: Drive) -> None:
    drive.fails(mode_sense_10(0x2A, 128, control=3), NO_SAVED_PARAMETERS)
    drive.fails(mode_sense_10(0x05, 128), INVALID_FIELD)
    drive.fails(mode_sense_10(0x2A, 128, subpage=1), INVALID_FIELD)


def test_table_of_contents(drive: Drive) -> None:
    track, lead_out = bytes((0, 0x14, 1, 0)), bytes((0, 0x14, 0xAA, 0))
    everything = b"\x00\x12\x01\x01" + track + bytes(4) + lead_out + BLOCKS.to_bytes(4, "big")
    assert drive.data(toc(0, False, 0, 100), 100) == everything
    assert drive.data(toc(0, False, 1, 100), 100) == everything
    assert drive.data(toc(0, False, 0, 4), 100) == everything[:4]
    # 300 blocks are four seconds, after two of lead-in.
    assert drive.data(toc(0, True, 0xAA, 100), 100) == b"\x00\x0a\x01\x01" + lead_out + bytes((0, 0, 6, 0))
    assert drive.data(toc(1, False, 0, 100), 100) == b"\x00\x0a\x01\x01" + track + bytes(4)
    assert drive.data(toc(1, True, 0, 100), 100)[-4:] == bytes((0, 0, 2, 0))
    by_control_byte = bytearray(toc(0, False, 0, 100))
    by_control_byte[9] = 0x40
    assert drive.data(bytes(by_control_byte), 100) == drive.data(toc(1, False, 0, 100), 100)


@pytest.mark.parametrize(("kind", "start"), [(0, 2), (0, 0xA9), (2, 0), (5, 0), (15, 0)])
def test_table_of_contents_refusals(drive: Drive, kind: int, start: int) -> None:
    drive.fails(toc(kind, False, start, 100), INVALID_FIELD)


def feature_numbers(data: bytes) -> list[int]:
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    found, at = [], 8
    while at < len(data):
        found.append(int.from_bytes(data[at : at + 2], "big"))
        at += 4 + data[at + 3]
    assert at == len(data)
    return found


def test_configuration(drive: Drive) -> None:
    everything = drive.data(configuration(0, 0, 200), 200)
    assert feature_numbers(everything) == [0, 1, 3, 0x10]
    assert everything[6:8] == b"\x00\x08"
    assert everything[8:20] == bytes.fromhex("0000 03 08 0010 00 00 0008 01 00")
    assert feature_numbers(drive.data(configuration(0, 2, 200), 200)) == [3, 0x10]
    assert feature_numbers(drive.data(configuration(2, 1, 200), 200)) == [1]
    assert feature_numbers(drive.data(configuration(2, 2, 200), 200)) == []
    assert drive.data(configuration(0, 0, 8), 200) == everything[:8]
    drive.fails(configuration(3, 0, 200), INVALID_FIELD)
    drive.data(EJECT, 0)
    assert feature_numbers(drive.data(configuration(1, 0, 200), 200)) == [0, 1, 3]
    assert drive.data(configuration(1, 0, 200), 200)[6:8] == bytes(2)


def test_a_large_disc_is_a_dvd() -> None:
    fd = os.memfd_create("large")
    os.ftruncate(fd, 360_000 * BLOCK_SIZE)
    assert not Medium(fd).is_dvd
    os.ftruncate(fd, 360_000 * BLOCK_SIZE + 1)
    medium = Medium(fd)
    assert medium.is_dvd
    target = Target(CdRom(medium))
    assert target.execute(0, configuration(0, 0, 8), [], 8).data[6:8] == b"\x00\x10"
    os.close(fd)


def test_eject_and_load(drive: Drive) -> None:
    assert drive.data(event_status(0x10, 8), 8) == bytes((0, 6, 4, 0x10, 0, 2, 0, 0))
    assert drive.data(EJECT, 0) == b""
    for cdb in (TEST_UNIT_READY, read_10(0, 1), toc(0, False, 0, 12), b"\x25" + bytes(9), b"\x51" + bytes(9)):
        drive.fails(cdb, NO_MEDIUM)
    assert drive.data(b"\x03\0\0\0\x12\0", 18) == NO_MEDIUM.fixed()
    assert drive.data(event_status(0x10, 4), 8) == bytes((0, 6, 4, 0x10))  # no room to tell of the event
    assert drive.data(event_status(0x10, 8), 8) == bytes((0, 6, 4, 0x10, 3, 1, 0, 0))
    assert drive.data(event_status(0x10, 8), 8) == bytes((0, 6, 4, 0x10, 0, 1, 0, 0))
    assert drive.data(b"\xbd" + bytes(8) + b"\x08\0\0", 8) == b"\0\x10" + bytes(6)
    drive.data(LOAD, 0)
    assert drive.data(event_status(0x10, 8), 8) == bytes((0, 6, 4, 0x10, 2, 2, 0, 0))
    drive.fails(TEST_UNIT_READY, MEDIUM_CHANGED)
    assert drive.data(TEST_UNIT_READY, 0) == b""
    assert drive.data(read_10(0, 1), 2048) == CONTENT[:2048]


def test_a_locked_tray(drive: Drive) -> None:
    drive.data(LOCK, 0)
    drive.fails(EJECT, REMOVAL_PREVENTED)
    drive.data(TEST_UNIT_READY, 0)
    assert drive.data(mode_sense_10(0x2A, 128), 128)[14] == 0x2B
    drive.data(UNLOCK, 0)
    drive.data(EJECT, 0)
    drive.fails(TEST_UNIT_READY, NO_MEDIUM)


def test_stop_without_eject_does_nothing(drive: Drive) -> None:
    drive.data(bytes((0x1B, 0, 0, 0, 0, 0)), 0)
    drive.data(bytes((0x1B, 0, 0, 0, 0x32, 0)), 0)  # a power condition: the other bits do not count
    drive.data(TEST_UNIT_READY, 0)


def test_reset(drive: Drive) -> None:
    drive.data(LOCK, 0)
    drive.unit.reset()
    drive.data(inquiry(36), 36)
    drive.fails(EJECT, RESET_OCCURRED)
    drive.data(EJECT, 0)


def test_request_sense(drive: Drive) -> None:
    assert drive.data(b"\x03\0\0\0\x12\0", 18) == NO_SENSE.fixed()
    drive.unit.reset()
    assert drive.data(b"\x03\0\0\0\x12\0", 18) == RESET_OCCURRED.fixed()
    assert drive.data(b"\x03\0\0\0\x04\0", 18) == NO_SENSE.fixed()[:4]
    drive.fails(b"\x03\1\0\0\x12\0", INVALID_FIELD)


def test_events_that_are_not_there(drive: Drive) -> None:
    assert drive.data(event_status(0x6E, 100), 100) == bytes((0, 2, 0x80, 0x10))
    drive.fails(event_status(0x10, 8, polled=False), INVALID_FIELD)


def test_disc_information(drive: Drive) -> None:
    data = drive.data(b"\x51" + bytes(6) + b"\x00\xff\0", 255)
    assert len(data) == 34
    assert data[:8] == bytes((0, 32, 0x0E, 1, 1, 1, 1, 0x20))
    drive.fails(b"\x51\1" + bytes(5) + b"\x00\xff\0", INVALID_FIELD)


def test_logical_units(drive: Drive) -> None:
    assert drive.data(report_luns(16), 16) == b"\0\0\0\x08" + bytes(12)
    assert drive.data(report_luns(64, 1), 64) == b"\0\0\0\x08" + bytes(4) + b"\xc1\1" + bytes(6)
    assert drive.data(report_luns(64, 2), 64)[:4] == b"\0\0\0\x10"
    assert drive.data(report_luns(16), 16, lun=3) == drive.data(report_luns(16), 16)
    drive.fails(report_luns(15), INVALID_FIELD)
    drive.fails(report_luns(16, 3), INVALID_FIELD)
    assert drive.data(inquiry(36), 36, lun=1)[0] == 0x7F
    assert drive.data(b"\x03\0\0\0\x12\0", 18, lun=1) == NO_SUCH_UNIT.fixed()
    for cdb in (TEST_UNIT_READY, read_10(0, 1), b"\xff"):
        drive.fails(cdb, NO_SUCH_UNIT, lun=1)
    assert drive.data(inquiry(36), 36, lun=REPORT_LUNS_UNIT)[0] == 0x1E
    drive.data(TEST_UNIT_READY, 0, lun=REPORT_LUNS_UNIT)
    drive.fails(read_10(0, 1), INVALID_OPCODE, lun=REPORT_LUNS_UNIT)


def test_short_cdbs(drive: Drive) -> None:
    drive.fails(b"", INVALID_OPCODE)
    drive.fails(read_10(0, 1)[:9], INVALID_FIELD)
    drive.fails(b"\x00", INVALID_FIELD)
    drive.fails(bytes((0, 0, 0, 0, 0, 4)), INVALID_FIELD)  # NACA


@pytest.mark.parametrize(
    "opcode", [0x04, 0x0A, 0x15, 0x2A, 0x55, 0x60, 0x7F, 0x8A, 0xA1, 0xAA, 0xBE, 0xC0, 0xFF]
)
def test_other_opcodes(drive: Drive, opcode: int) -> None:
    drive.fails(bytes((opcode,)) + bytes(31), INVALID_OPCODE)


KNOWN = [
    *(0x00, 0x03, 0x08, 0x12, 0x1A, 0x1B, 0x1E, 0x25, 0x28, 0x2B, 0x35, 0x43, 0x46, 0x4A, 0x51, 0x5A),
    *(0x88, 0x9E, 0xA0, 0xA8, 0xBB, 0xBD),
]


def test_known_opcodes_are_all(drive: Drive) -> None:
    answers = {
        opcode: drive.reply(bytes((opcode,)) + bytes(15), [65536, MAX_TRANSFER])[0].sense
        for opcode in range(256)
    }
    assert [opcode for opcode in answers if answers[opcode] != INVALID_OPCODE.fixed()] == KNOWN


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=32),
        st.builds(
            lambda opcode, rest: bytes((opcode,)) + rest, st.sampled_from(KNOWN), st.binary(max_size=31)
        ),
        st.builds(
            lambda opcode, rest: bytes((opcode,)) + bytes(rest).ljust(15, b"\0"),
            st.sampled_from(KNOWN),
            st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 0x10, 0xFF]), max_size=15),
        ),
    ),
    st.lists(st.integers(1, 70_000), max_size=4),
    st.sampled_from([0, 0, 0, 1, REPORT_LUNS_UNIT]),
    st.booleans(),
)
def test_any_cdb_ends_in_a_reply(cdb: bytes, sizes: list[int], lun: int, ejected: bool) -> None:
    drive = Drive()
    try:
        if ejected:
            drive.data(EJECT, 0)
        reply, memory = drive.reply(cdb, sizes, lun)
    except Overrun:
        pass
    else:
        assert reply.transferred <= sum(sizes)
        assert memory[reply.transferred :] == b"\xee" * (sum(sizes) - reply.transferred)
        if reply.status == CHECK_CONDITION:
            assert (len(reply.sense), reply.transferred) == (18, 0)
        else:
            assert (reply.status, reply.sense) == (GOOD, b"")
    finally:
        drive.close()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 255))
def test_every_allocation_length_cuts(size: int) -> None:
    drive = Drive()
    try:
        for make in (inquiry, lambda size: toc(0, False, 0, size), lambda size: mode_sense_10(0x3F, size)):
            whole = drive.data(make(255), 255)
            assert drive.data(make(size), 255) == whole[:size]
    finally:
        drive.close()
