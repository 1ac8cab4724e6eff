"""SCSI status and sense data, fixed format (SPC-4, section 4.5). VMM process."""

from dataclasses import dataclass, replace

# Status codes, SAM-5 section 5.3.1.
GOOD = 0x00
CHECK_CONDITION = 0x02

# Sense keys, SPC-4 table 48.
_NO_SENSE = 0x0
_NOT_READY = 0x2
_MEDIUM_ERROR = 0x3
_ILLEGAL_REQUEST = 0x5
_UNIT_ATTENTION = 0x6

_CURRENT_ERROR = 0x70
_INFORMATION_VALID = 0x80
_FIXED_SIZE = 18


@dataclass(frozen=True, slots=True)
class Sense:
    """What went wrong: sense key, additional sense code and its qualifier; `information` is a block address
    that goes with it.
    """

    key: int
    code: int
    qualifier: int
    information: int | None = None

    def at(self, address: int) -> "Sense":
        """The same for block `address`, as far as fixed format can say it: 32 bits."""
        return replace(self, information=address) if address < 1 << 32 else self

    def fixed(self) -> bytes:
        data = bytearray(_FIXED_SIZE)
        data[0] = _CURRENT_ERROR
        data[2] = self.key
        if self.information is not None:
            data[0] |= _INFORMATION_VALID
            data[3:7] = self.information.to_bytes(4, "big")
        data[7] = _FIXED_SIZE - 8  # additional sense length: what follows this byte
        data[12] = self.code
        data[13] = self.qualifier
        return bytes(data)


NO_SENSE = Sense(_NO_SENSE, 0x00, 0x00)
NO_MEDIUM = Sense(_NOT_READY, 0x3A, 0x02)  # medium not present, tray open
UNRECOVERED_READ = Sense(_MEDIUM_ERROR, 0x11, 0x00)
INVALID_OPCODE = Sense(_ILLEGAL_REQUEST, 0x20, 0x00)
ADDRESS_OUT_OF_RANGE = Sense(_ILLEGAL_REQUEST, 0x21, 0x00)
INVALID_FIELD = Sense(_ILLEGAL_REQUEST, 0x24, 0x00)
NO_SUCH_UNIT = Sense(_ILLEGAL_REQUEST, 0x25, 0x00)
NO_SAVED_PARAMETERS = Sense(_ILLEGAL_REQUEST, 0x39, 0x00)
REMOVAL_PREVENTED = Sense(_ILLEGAL_REQUEST, 0x53, 0x02)
MEDIUM_CHANGED = Sense(_UNIT_ATTENTION, 0x28, 0x00)
RESET_OCCURRED = Sense(_UNIT_ATTENTION, 0x29, 0x00)  # power on, or any reset


class CheckCondition(Exception):
    """The command ends in CHECK CONDITION with `sense`."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(sense)
        self.sense = sense
