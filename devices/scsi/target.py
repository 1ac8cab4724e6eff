"""The target: which logical unit a command is for, and the list of them (SAM-5 section 4.7, SPC-4 sections
6.33 and 8.2). VMM process.

There is one unit, LUN 0. Commands for others are answered as SPC-4 has it for units that are not there, so
that a driver which looks for them finds out and goes on.
"""

from devices.scsi.inquiry import NO_UNIT, WELL_KNOWN_UNIT, inquiry
from devices.scsi.sense import INVALID_FIELD, NO_SENSE, NO_SUCH_UNIT, CheckCondition, Sense
from devices.scsi.unit import (
    INQUIRY,
    REPORT_LUNS,
    REQUEST_SENSE,
    TEST_UNIT_READY,
    Command,
    LogicalUnit,
    Reply,
    action,
    field,
    parameters,
)

REPORT_LUNS_UNIT = 0xC101  # the well-known logical unit, as the first two bytes of a LUN

# SELECT REPORT: which units REPORT LUNS lists.
_ALL_BUT_WELL_KNOWN = 0
_WELL_KNOWN = 1
_ALL = 2
_LEAST_ALLOCATION = 16


class Target:
    """A target whose LUN 0 is `unit`."""

    def __init__(self, unit: LogicalUnit) -> None:
        self._unit = unit
        self._well_known = LogicalUnit(
            {
                TEST_UNIT_READY: action(lambda cdb: None),
                REQUEST_SENSE: _sense_data(NO_SENSE),
                INQUIRY: _identity(WELL_KNOWN_UNIT, b"REPORT LUNS"),
                REPORT_LUNS: parameters(_report_luns, field(6, 4)),
            }
        )
        self._absent = LogicalUnit(
            {REQUEST_SENSE: _sense_data(NO_SUCH_UNIT), INQUIRY: _identity(NO_UNIT, b"")}, NO_SUCH_UNIT
        )

    def execute(self, lun: int, cdb: bytes, buffers: list[memoryview], room: int) -> Reply:
        """Carry out `cdb` in unit `lun`, any number. As `LogicalUnit.execute`."""
        if lun == REPORT_LUNS_UNIT or cdb[:1] == bytes((REPORT_LUNS,)):
            unit = self._well_known
        else:
            unit = self._unit if lun == 0 else self._absent
        return unit.execute(cdb, buffers, room)


def _identity(device: int, product: bytes) -> Command:
    return parameters(lambda cdb: inquiry(cdb, device, product, removable=False, serial=b""), field(3, 2))


def _sense_data(sense: Sense) -> Command:
    return parameters(lambda cdb: sense.fixed(), field(4, 1))


def _report_luns(cdb: bytes) -> bytes:
    if int.from_bytes(cdb[6:10], "big") < _LEAST_ALLOCATION or cdb[2] > _ALL:
        raise CheckCondition(INVALID_FIELD)
    luns = b""
    if cdb[2] in (_ALL_BUT_WELL_KNOWN, _ALL):
        luns += bytes(8)
    if cdb[2] in (_WELL_KNOWN, _ALL):
        luns += REPORT_LUNS_UNIT.to_bytes(2, "big") + bytes(6)
    return len(luns).to_bytes(4, "big") + bytes(4) + luns
