"""What a CD-ROM drive tells of itself and of its disc: contents, features, mode pages, events (MMC-6). VMM
process.

Pure functions from fields of a CDB to bytes; none of them is cut to an allocation length. Numbers are
big-endian.
"""

import struct

from devices.scsi.sense import INVALID_FIELD, CheckCondition

# READ TOC/PMA/ATIP, section 6.25.
TOC_FORMAT = 0
TOC_SESSIONS = 1
LEAD_OUT = 0xAA
_DATA_TRACK = 0x14  # ADR 1: Q sub-channel has the position; control 4: data, no copy
_LEAD_IN_FRAMES = 150  # two seconds before block 0
_FRAMES_PER_SECOND = 75

# GET CONFIGURATION, section 6.5.
PROFILE_CD_ROM = 0x0008
PROFILE_DVD_ROM = 0x0010
_RT_ALL = 0
_RT_CURRENT = 1
_RT_ONE = 2

# GET EVENT STATUS NOTIFICATION, section 6.6.
MEDIA_CLASS = 4
NO_CHANGE = 0
NEW_MEDIA = 2
MEDIA_REMOVAL = 3
_NO_EVENT_AVAILABLE = 0x80

# Mode pages, section 7 and, for 0x01, SPC-4.
ALL_PAGES = 0x3F


def _address(block: int, msf: bool) -> bytes:
    if not msf:
        return min(block, 0xFFFFFFFF).to_bytes(4, "big")
    seconds, frame = divmod(block + _LEAD_IN_FRAMES, _FRAMES_PER_SECOND)
    minutes, second = divmod(seconds, 60)
    # A DVD is longer than minutes can say.
    return bytes((0, minutes, second, frame)) if minutes <= 0xFF else bytes((0, 0xFF, 59, 74))


def table_of_contents(blocks: int, start: int, msf: bool) -> bytes:
    """One data track and the lead-out after it, from track `start` on."""
    if start > 1 and start != LEAD_OUT:
        raise CheckCondition(INVALID_FIELD)
    tracks = b""
    if start <= 1:
        tracks = bytes((0, _DATA_TRACK, 1, 0)) + _address(0, msf)
    tracks += bytes((0, _DATA_TRACK, LEAD_OUT, 0)) + _address(blocks, msf)
    return struct.pack(">HBB", 2 + len(tracks), 1, 1) + tracks


def sessions(msf: bool) -> bytes:
    """One complete session, which begins with track 1 at block 0."""
    return struct.pack(">HBB", 10, 1, 1) + bytes((0, _DATA_TRACK, 1, 0)) + _address(0, msf)


def disc_information() -> bytes:
    """READ DISC INFORMATION, standard: a complete disc, one complete session, one track (section 6.21)."""
    data = bytearray(34)
    data[1] = 32
    data[2] = 0x0E  # last session complete, disc complete
    data[3:7] = b"\x01\x01\x01\x01"  # first track, sessions, first and last track of the last session
    data[7] = 0x20  # unrestricted use
    data[16:24] = b"\xff" * 8  # no lead-in and lead-out to write: the disc is complete
    return bytes(data)


def configuration(request: int, start: int, profile: int) -> bytes:
    """Features from number `start` on: all, those current, or that one, as `request` (RT) says.

    `profile` is the current one; 0 when there is no disc.
    """
    if request not in (_RT_ALL, _RT_CURRENT, _RT_ONE):
        raise CheckCondition(INVALID_FIELD)
    descriptors = b""
    for code, version, current, data in _features(profile):
        if code < start or (request == _RT_ONE and code != start) or (request == _RT_CURRENT and not current):
            continue
        persistent = code in (0x0000, 0x0001, 0x0003)
        descriptors += struct.pack(">HBB", code, version << 2 | persistent << 1 | current, len(data)) + data
    # The length counts what follows it.
    return struct.pack(">IHH", 4 + len(descriptors), 0, profile) + descriptors


def _features(profile: int) -> list[tuple[int, int, bool, bytes]]:
    """Number, version, whether current, and data of each feature (section 5.3).

    CD Read and DVD Read are not among them: they would promise READ CD and READ DISC STRUCTURE.
    """
    profiles = b"".join(
        struct.pack(">HBx", number, number == profile) for number in (PROFILE_DVD_ROM, PROFILE_CD_ROM)
    )
    return [
        (0x0000, 0, True, profiles),  # profile list
        (0x0001, 2, True, bytes((0, 0, 0, 1, 0, 0, 0, 0))),  # core: SCSI family
        (0x0003, 1, True, bytes((0x29, 0, 0, 0))),  # removable medium: tray, ejects, locks
        (0x0010, 0, profile != 0, bytes((0, 0, 8, 0, 0, 1, 0, 0))),  # random readable: 2048-byte blocks
    ]


def event_status(classes: int, event: int, *, has_medium: bool, tray_open: bool) -> bytes:
    """The header, and the media event when `classes`, a bit for each class, asks for it."""
    if not classes & 1 << MEDIA_CLASS:
        return struct.pack(">HBB", 2, _NO_EVENT_AVAILABLE, 1 << MEDIA_CLASS)
    status = has_medium << 1 | tray_open
    return struct.pack(">HBBBBBB", 6, MEDIA_CLASS, 1 << MEDIA_CLASS, event, status, 0, 0)


def mechanism_status(*, tray_open: bool) -> bytes:
    """No changer, no fault, nothing going on (section 6.10)."""
    return bytes((0, tray_open << 4, 0, 0, 0, 0, 0, 0))


def mode_pages(page: int, subpage: int, *, changeable: bool, locked: bool) -> bytes:
    """Mode page `page`, or all of them: their values, or, as none of their bits can be changed, zeroes."""
    pages = {
        0x01: bytes((0, 3, 0, 0, 0, 0, 0, 0, 0, 0)),  # error recovery: three retries
        0x0E: bytes((0x04, 0, 0, 0, 0, 0, 1, 0xFF, 2, 0xFF, 0, 0, 0, 0)),  # audio: two channels
        0x2A: _capabilities(locked),
    }
    if subpage not in (0x00, 0xFF):
        raise CheckCondition(INVALID_FIELD)
    if page != ALL_PAGES and page not in pages:
        raise CheckCondition(INVALID_FIELD)
    data = b""
    for code, values in pages.items():
        if page in (ALL_PAGES, code):
            data += bytes((code, len(values))) + (bytes(len(values)) if changeable else values)
    return data


def _capabilities(locked: bool) -> bytes:
    """CD/DVD capabilities and mechanical status, as MMC-3 has it: Linux still asks for it."""
    data = bytearray(20)
    data[0] = 0x0B  # reads CD-R, CD-RW and DVD-ROM; data[1]: writes nothing
    data[2] = 0x70  # reads mode 2 forms 1 and 2, and several sessions; no audio
    data[4] = 0x29 | locked << 1  # tray; ejects; locks
    struct.pack_into(">H", data, 6, 50 * 176)  # fastest, in kB/s: 50 times a CD player
    struct.pack_into(">H", data, 10, 512)  # buffer, in KiB
    struct.pack_into(">H", data, 12, 50 * 176)  # now
    return bytes(data)
