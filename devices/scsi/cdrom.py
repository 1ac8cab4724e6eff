"""A CD-ROM drive: a tray with a disc, and the commands that MMC-6, SBC-3 and SPC-4 give it. VMM process.

It serves what drivers use (Linux's sr, the BSDs' cd, firmware); all else is an invalid operation code. The
disc is always the same one: a guest that ejects it can only load it again.

Data are read while the caller waits, so one command reads at most MAX_TRANSFER bytes.
"""

from collections.abc import Callable
from typing import Any

from devices.scsi import mmc
from devices.scsi.inquiry import CD_ROM, inquiry
from devices.scsi.medium import BLOCK_SIZE, Medium
from devices.scsi.sense import (
    ADDRESS_OUT_OF_RANGE,
    GOOD,
    INVALID_FIELD,
    MEDIUM_CHANGED,
    NO_MEDIUM,
    NO_SAVED_PARAMETERS,
    NO_SENSE,
    REMOVAL_PREVENTED,
    RESET_OCCURRED,
    UNRECOVERED_READ,
    CheckCondition,
    Sense,
)
from devices.scsi.unit import (
    GET_CONFIGURATION,
    GET_EVENT_STATUS_NOTIFICATION,
    INQUIRY,
    MECHANISM_STATUS,
    MODE_SENSE_6,
    MODE_SENSE_10,
    PREVENT_ALLOW_MEDIUM_REMOVAL,
    READ_6,
    READ_10,
    READ_12,
    READ_16,
    READ_CAPACITY_10,
    READ_DISC_INFORMATION,
    READ_TOC,
    REQUEST_SENSE,
    SEEK_10,
    SERVICE_ACTION_IN_16,
    SET_CD_SPEED,
    START_STOP_UNIT,
    SYNCHRONIZE_CACHE_10,
    TEST_UNIT_READY,
    Command,
    LogicalUnit,
    Reply,
    action,
    field,
    fixed_size,
    parameters,
)
from devices.state import SavedState

MAX_TRANSFER = 512 << 10

PRODUCT = b"CD-ROM"
SERIAL = b"cdrom0"

_Field = Callable[[bytes], int]

# Commands that leave a unit attention for the next (SPC-4 section 5.14, MMC-6 section 4.1.6).
_QUIET = {INQUIRY, REQUEST_SENSE, GET_CONFIGURATION, GET_EVENT_STATUS_NOTIFICATION}

_READ_CAPACITY_16 = 0x10  # a service action
_MSF = 0x02
_DESCRIPTOR_SENSE = 0x01
_POLLED = 0x01
_LOAD_EJECT = 0x02
_START = 0x01
_CHANGEABLE_VALUES = 1
_SAVED_VALUES = 3
_EVENTS = (mmc.NO_CHANGE, mmc.NEW_MEDIA, mmc.MEDIA_REMOVAL)
# What a unit attention can tell, by the names that are saved.
_ATTENTIONS: dict[str, Sense | None] = {"": None, "reset": RESET_OCCURRED, "medium": MEDIUM_CHANGED}


class CdRom(LogicalUnit):
    """The drive with `medium` in it. Not thread-safe."""

    def __init__(self, medium: Medium) -> None:
        self._medium = medium
        self._tray_open = False
        self._locked = False
        self._event = mmc.NO_CHANGE
        self._attention: Sense | None = RESET_OCCURRED
        super().__init__(
            {
                TEST_UNIT_READY: action(self._test_ready),
                REQUEST_SENSE: parameters(self._request_sense, field(4, 1)),
                INQUIRY: parameters(_inquiry, field(3, 2)),
                MODE_SENSE_6: parameters(self._mode_sense_6, field(4, 1)),
                MODE_SENSE_10: parameters(self._mode_sense_10, field(7, 2)),
                START_STOP_UNIT: action(self._start_stop),
                PREVENT_ALLOW_MEDIUM_REMOVAL: action(self._prevent_removal),
                READ_CAPACITY_10: parameters(self._capacity_10, fixed_size(8)),
                SERVICE_ACTION_IN_16: parameters(self._capacity_16, field(10, 4)),
                READ_6: self._reads(_address_6, _count_6),
                READ_10: self._reads(field(2, 4), field(7, 2)),
                READ_12: self._reads(field(2, 4), field(6, 4)),
                READ_16: self._reads(field(2, 8), field(10, 4)),
                SEEK_10: action(self._seek),
                SYNCHRONIZE_CACHE_10: action(lambda cdb: None),
                SET_CD_SPEED: action(lambda cdb: None),
                READ_TOC: parameters(self._toc, field(7, 2)),
                READ_DISC_INFORMATION: parameters(self._disc_information, field(7, 2)),
                GET_CONFIGURATION: parameters(self._configuration, field(7, 2)),
                GET_EVENT_STATUS_NOTIFICATION: parameters(self._event_status, field(7, 2)),
                MECHANISM_STATUS: parameters(
                    lambda cdb: mmc.mechanism_status(tray_open=self._tray_open), field(8, 2)
                ),
            }
        )

    def reset(self) -> None:
        """A logical unit reset: the lock is gone, the tray stays as it is, and the initiator is told."""
        self._locked = False
        self._attention = RESET_OCCURRED

    def save(self) -> dict[str, Any]:
        return {
            "blocks": self._medium.blocks,
            "tray_open": self._tray_open,
            "locked": self._locked,
            "event": self._event,
            "attention": next(name for name, sense in _ATTENTIONS.items() if sense is self._attention),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `save` cannot have said, and for a disc of another size."""
        saved = SavedState("CD-ROM drive", state)
        saved.same("blocks", self._medium.blocks, "disc, by its number of blocks,")
        tray_open, locked = saved.flag("tray_open"), saved.flag("locked")
        event = saved.choice("event", _EVENTS)
        attention = _ATTENTIONS[saved.choice("attention", tuple(_ATTENTIONS))]
        self._tray_open, self._locked, self._event, self._attention = tray_open, locked, event, attention

    def attention(self, opcode: int) -> None:
        if self._attention is not None and opcode not in _QUIET:
            sense, self._attention = self._attention, None
            raise CheckCondition(sense)

    def _ready_medium(self) -> Medium:
        if self._tray_open:
            raise CheckCondition(NO_MEDIUM)
        return self._medium

    def _test_ready(self, cdb: bytes) -> None:
        self._ready_medium()

    def _request_sense(self, cdb: bytes) -> bytes:
        """Sense came with the status of each command, so what is left is a unit attention, or the state."""
        if cdb[1] & _DESCRIPTOR_SENSE:
            raise CheckCondition(INVALID_FIELD)
        sense, self._attention = self._attention, None
        if sense is None:
            sense = NO_MEDIUM if self._tray_open else NO_SENSE
        return sense.fixed()

    def _mode_sense_6(self, cdb: bytes) -> bytes:
        pages = self._mode_pages(cdb)
        return bytes((3 + len(pages), 0, 0, 0)) + pages

    def _mode_sense_10(self, cdb: bytes) -> bytes:
        pages = self._mode_pages(cdb)
        return (6 + len(pages)).to_bytes(2, "big") + bytes(6) + pages

    def _mode_pages(self, cdb: bytes) -> bytes:
        control = cdb[2] >> 6
        if control == _SAVED_VALUES:
            raise CheckCondition(NO_SAVED_PARAMETERS)
        return mmc.mode_pages(
            cdb[2] & 0x3F, cdb[3], changeable=control == _CHANGEABLE_VALUES, locked=self._locked
        )

    def _start_stop(self, cdb: bytes) -> None:
        """Moves the tray. Spinning up or down, and power conditions, mean nothing to a file."""
        if cdb[4] >> 4 or not cdb[4] & _LOAD_EJECT:
            return
        eject = not cdb[4] & _START
        if eject == self._tray_open:
            return
        if eject and self._locked:
            raise CheckCondition(REMOVAL_PREVENTED)
        self._tray_open = eject
        self._event = mmc.MEDIA_REMOVAL if eject else mmc.NEW_MEDIA
        if not eject:
            self._attention = MEDIUM_CHANGED

    def _prevent_removal(self, cdb: bytes) -> None:
        self._locked = bool(cdb[4] & 0x01)

    def _capacity_10(self, cdb: bytes) -> bytes:
        if cdb[8] & 0x01 or any(cdb[2:6]):
            raise CheckCondition(INVALID_FIELD)  # obsolete: the capacity up to some block
        last = min(self._ready_medium().blocks - 1, 0xFFFFFFFF)
        return last.to_bytes(4, "big") + BLOCK_SIZE.to_bytes(4, "big")

    def _capacity_16(self, cdb: bytes) -> bytes:
        if cdb[1] & 0x1F != _READ_CAPACITY_16 or cdb[14] & 0x01 or any(cdb[2:10]):
            raise CheckCondition(INVALID_FIELD)
        last = self._ready_medium().blocks - 1
        return last.to_bytes(8, "big") + BLOCK_SIZE.to_bytes(4, "big") + bytes(20)

    def _reads(self, address: _Field, count: _Field) -> Command:
        def run(cdb: bytes, buffers: list[memoryview]) -> Reply:
            return self._read(address(cdb), count(cdb), buffers)

        return Command(run, lambda cdb: count(cdb) * BLOCK_SIZE)

    def _read(self, address: int, count: int, buffers: list[memoryview]) -> Reply:
        medium = self._ready_medium()
        if address + count > medium.blocks:
            raise CheckCondition(ADDRESS_OUT_OF_RANGE)
        size = count * BLOCK_SIZE
        if size > MAX_TRANSFER:
            raise CheckCondition(INVALID_FIELD)
        if count and not medium.read(address, count, buffers):
            raise CheckCondition(UNRECOVERED_READ.at(address))
        return Reply(GOOD, transferred=size)

    def _seek(self, cdb: bytes) -> None:
        if int.from_bytes(cdb[2:6], "big") >= self._ready_medium().blocks:
            raise CheckCondition(ADDRESS_OUT_OF_RANGE)

    def _toc(self, cdb: bytes) -> bytes:
        medium = self._ready_medium()
        msf = bool(cdb[1] & _MSF)
        # Where the format is 0, ATAPI drivers of old have it in the control byte (SFF-8020i).
        kind = cdb[2] & 0x0F or cdb[9] >> 6
        if kind == mmc.TOC_FORMAT:
            return mmc.table_of_contents(medium.blocks, cdb[6], msf)
        if kind == mmc.TOC_SESSIONS:
            return mmc.sessions(msf)
        raise CheckCondition(INVALID_FIELD)

    def _disc_information(self, cdb: bytes) -> bytes:
        if cdb[1] & 0x07:
            raise CheckCondition(INVALID_FIELD)  # track or power resources, of drives that write
        self._ready_medium()
        return mmc.disc_information()

    def _configuration(self, cdb: bytes) -> bytes:
        profile = mmc.PROFILE_DVD_ROM if self._medium.is_dvd else mmc.PROFILE_CD_ROM
        return mmc.configuration(
            cdb[1] & 0x03, int.from_bytes(cdb[2:4], "big"), 0 if self._tray_open else profile
        )

    def _event_status(self, cdb: bytes) -> bytes:
        if not cdb[1] & _POLLED:
            raise CheckCondition(INVALID_FIELD)  # asynchronous notification
        answer = mmc.event_status(
            cdb[4], self._event, has_medium=not self._tray_open, tray_open=self._tray_open
        )
        if len(answer) <= int.from_bytes(cdb[7:9], "big") and cdb[4] & 1 << mmc.MEDIA_CLASS:
            self._event = mmc.NO_CHANGE  # the initiator gets to see the event: it is told once
        return answer


def _inquiry(cdb: bytes) -> bytes:
    return inquiry(cdb, CD_ROM, PRODUCT, removable=True, serial=SERIAL)


def _address_6(cdb: bytes) -> int:
    return int.from_bytes(cdb[1:4], "big") & 0x1FFFFF


def _count_6(cdb: bytes) -> int:
    return cdb[4] or 256
