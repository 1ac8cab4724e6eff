"""What all logical units share: from a command descriptor block to the method that serves it, and to a reply
(SAM-5 chapter 5, SPC-4 section 4.3). VMM process.

A CDB comes from the guest: any opcode, any length, any field. Whatever it says, `LogicalUnit.execute` returns
a Reply or raises Overrun.
"""

from collections.abc import Callable
from dataclasses import dataclass

from devices.scsi.sense import CHECK_CONDITION, GOOD, INVALID_FIELD, INVALID_OPCODE, CheckCondition, Sense

# Operation codes, SPC-4 annex F.
TEST_UNIT_READY = 0x00
REQUEST_SENSE = 0x03
READ_6 = 0x08
INQUIRY = 0x12
MODE_SENSE_6 = 0x1A
START_STOP_UNIT = 0x1B
PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1E
READ_CAPACITY_10 = 0x25
READ_10 = 0x28
SEEK_10 = 0x2B
SYNCHRONIZE_CACHE_10 = 0x35
READ_TOC = 0x43
GET_CONFIGURATION = 0x46
GET_EVENT_STATUS_NOTIFICATION = 0x4A
READ_DISC_INFORMATION = 0x51
MODE_SENSE_10 = 0x5A
READ_16 = 0x88
SERVICE_ACTION_IN_16 = 0x9E
REPORT_LUNS = 0xA0
READ_12 = 0xA8
SET_CD_SPEED = 0xBB
MECHANISM_STATUS = 0xBD

# CDB size by the three upper bits of the opcode; groups 3, 6 and 7 have none that we know.
_GROUP_SIZES = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}
_NACA = 0x04  # of the control byte, the last of a CDB


class Overrun(Exception):
    """The CDB asks for more bytes than the initiator has room for. Nothing was done."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How a command ended. `data` is parameter data for the caller to copy to the start of the initiator's
    buffers; blocks of the medium are there already, and `data` is empty. `transferred` counts both, in bytes.
    """

    status: int
    sense: bytes = b""
    data: bytes = b""
    transferred: int = 0


def good(data: bytes = b"") -> Reply:
    return Reply(GOOD, data=data, transferred=len(data))


def check_condition(sense: Sense) -> Reply:
    return Reply(CHECK_CONDITION, sense.fixed())


@dataclass(frozen=True, slots=True)
class Command:
    """One operation: `run(cdb, buffers)` serves it, `requested(cdb)` is how many bytes it may return at most:
    its allocation or transfer length. `run` for parameter data may return more than that: the rest is cut.
    """

    run: Callable[[bytes, list[memoryview]], Reply]
    requested: Callable[[bytes], int]


def parameters(run: Callable[[bytes], bytes], requested: Callable[[bytes], int]) -> Command:
    """A command that answers with parameter data, cut to the allocation length."""
    return Command(lambda cdb, buffers: good(run(cdb)[: requested(cdb)]), requested)


def action(run: Callable[[bytes], None]) -> Command:
    """A command without data."""

    def run_it(cdb: bytes, buffers: list[memoryview]) -> Reply:
        run(cdb)
        return good()

    return Command(run_it, fixed_size(0))


def field(start: int, size: int) -> Callable[[bytes], int]:
    """The big-endian number in `size` bytes of a CDB from byte `start`."""
    return lambda cdb: int.from_bytes(cdb[start : start + size], "big")


def fixed_size(size: int) -> Callable[[bytes], int]:
    return lambda cdb: size


class LogicalUnit:
    """A logical unit that serves `commands`, by opcode. `unknown` is the answer to all others."""

    def __init__(self, commands: dict[int, Command], unknown: Sense = INVALID_OPCODE) -> None:
        self._commands = commands
        self._unknown = unknown

    def attention(self, opcode: int) -> None:
        """Called before each command: raises CheckCondition when something must be told instead."""

    def execute(self, cdb: bytes, buffers: list[memoryview], room: int) -> Reply:
        """Carry out the command in `cdb`, which may have padding. `buffers`, `room` bytes in all, take data.

        Raises Overrun when the command asks for more than `room`. Never fails because of the CDB.
        """
        command = self._commands.get(cdb[0]) if cdb else None
        try:
            if command is None:
                raise CheckCondition(self._unknown)
            size = _GROUP_SIZES[cdb[0] >> 5]
            if len(cdb) < size or cdb[size - 1] & _NACA:
                raise CheckCondition(INVALID_FIELD)
            if command.requested(cdb) > room:
                raise Overrun
            self.attention(cdb[0])
            return command.run(cdb, buffers)
        except CheckCondition as error:
            return check_condition(error.sense)
