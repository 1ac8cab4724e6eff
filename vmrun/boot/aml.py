"""A small encoder for ACPI Machine Language: as much of it as our DSDT needs. VMM process.

Follows ACPI 6.4, chapters 20 (AML grammar) and 6.4 (resource descriptors). Each function returns the bytes
of one term; terms are joined by nesting the calls.
"""

import struct

Aml = bytes

_EXT = b"\x5b"
_TYPE_MEMORY, _TYPE_IO, _TYPE_BUS = range(3)
_FIXED = 0x0C  # _MIF and _MAF: neither end of the window moves; it is produced, not consumed


def _name_segment(segment: str) -> bytes:
    if not 1 <= len(segment) <= 4 or not segment.isascii() or not segment.replace("_", "A").isalnum():
        raise ValueError(f"{segment!r} is no ACPI name")
    if segment[0].isdigit() or segment != segment.upper():
        raise ValueError(f"{segment!r} is no ACPI name")
    return segment.ljust(4, "_").encode("ascii")


def name_string(path: str) -> Aml:
    r"""A name such as "_HID", "\_SB" or "_SB.PCI0"."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [_name_segment(segment) for segment in path.removeprefix("\\").split(".")]
    prefix = {1: b"", 2: b"\x2e"}.get(len(segments), bytes((0x2F, len(segments))))
    return root + prefix + b"".join(segments)


def _with_length(body: bytes) -> bytes:
    """PkgLength and `body`. The length counts its own bytes (20.2.4)."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,)) + body
    for extra, limit in ((1, 1 << 12), (2, 1 << 20), (3, 1 << 28)):
        length = len(body) + 1 + extra
        if length < limit:
            return bytes((extra << 6 | length & 0xF,)) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"an AML package of {len(body)} bytes")


def integer(value: int) -> Aml:
    """The shortest encoding of an unsigned number of up to 64 bits."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is no AML integer")


def eisa_id(identifier: str) -> Aml:
    """A compressed EISA identifier such as "PNP0A08" (19.3.4)."""
    vendor = [ord(letter) - 0x40 for letter in identifier[:3]]
    if len(identifier) != 7 or not all(1 <= letter <= 26 for letter in vendor):
        raise ValueError(f"{identifier!r} is no EISA identifier")
    number = (vendor[0] << 10 | vendor[1] << 5 | vendor[2]) << 16 | int(identifier[3:], 16)
    return b"\x0c" + number.to_bytes(4, "big")


def name(path: str, value: Aml) -> Aml:
    return b"\x08" + name_string(path) + value


def package(*elements: Aml) -> Aml:
    if len(elements) > 255:
        raise ValueError(f"an AML package of {len(elements)} elements")
    return b"\x12" + _with_length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> Aml:
    return b"\x11" + _with_length(integer(len(data)) + data)


def scope(path: str, *terms: Aml) -> Aml:
    return b"\x10" + _with_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: Aml) -> Aml:
    return _EXT + b"\x82" + _with_length(name_string(path) + b"".join(terms))


def resources(*descriptors: bytes) -> Aml:
    """A resource template: descriptors and an end tag whose checksum of 0 means "not checked"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io_ports(start: int, count: int) -> bytes:
    """Fixed ports, decoded in 16 bits (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, start, start, 1, count)


def isa_irq(irq: int) -> bytes:
    """An edge-triggered, active-high, exclusive ISA interrupt (6.4.2.1, the short form)."""
    return struct.pack("<BH", 0x22, 1 << irq)


def fixed_memory(start: int, size: int) -> bytes:
    """Read-write memory below 4 GiB (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, start, size)


def _address_space(tag: int, form: str, kind: int, type_flags: int, first: int, last: int) -> bytes:
    """A window that the bridge passes on to its children (6.4.3.5): granularity, first, last, translation,
    length.
    """
    body = struct.pack("<BBB" + form * 5, kind, _FIXED, type_flags, 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", tag, len(body)) + body


def bus_numbers(first: int, last: int) -> bytes:
    return _address_space(0x88, "H", _TYPE_BUS, 0, first, last)


def io_window(first: int, last: int) -> bytes:
    entire_range = 3  # ISA and non-ISA ports
    return _address_space(0x88, "H", _TYPE_IO, entire_range, first, last)


def memory_window(first: int, last: int) -> bytes:
    """Non-cacheable, read-write, below 4 GiB."""
    return _address_space(0x87, "I", _TYPE_MEMORY, 1, first, last)
