"""INQUIRY: who a logical unit is (SPC-4, sections 6.6 and 7.8). VMM process."""

from devices.scsi.sense import INVALID_FIELD, CheckCondition

VENDOR = b"VMRUN   "

# Peripheral qualifier and device type, the first byte.
CD_ROM = 0x05
WELL_KNOWN_UNIT = 0x1E
NO_UNIT = 0x7F  # not there, and the target has no place for it

_REMOVABLE = 0x80
_VERSION = 5  # SPC-3
_HIERARCHICAL_FORMAT = 0x12  # HISUP, response data format 2
_COMMAND_QUEUING = 0x02
_EVPD = 0x01

_PAGE_SUPPORTED = 0x00
_PAGE_SERIAL = 0x80
_PAGE_IDENTIFICATION = 0x83


def inquiry(cdb: bytes, device: int, product: bytes, *, removable: bool, serial: bytes) -> bytes:
    """The answer to INQUIRY `cdb`, not yet cut to its allocation length.

    `product` is at most 16 bytes; an empty `serial` means that there are no vital product data.
    """
    if cdb[1] & ~_EVPD:
        raise CheckCondition(INVALID_FIELD)  # CMDDT, obsolete, or reserved
    if cdb[1] & _EVPD:
        return _vital_product_data(cdb[2], device, product, serial)
    if cdb[2]:
        raise CheckCondition(INVALID_FIELD)
    data = bytes(
        (device, _REMOVABLE if removable else 0, _VERSION, _HIERARCHICAL_FORMAT, 31, 0, 0, _COMMAND_QUEUING)
    )
    return data + VENDOR + product.ljust(16) + b"1.0 "


def _vital_product_data(page: int, device: int, product: bytes, serial: bytes) -> bytes:
    if not serial:
        raise CheckCondition(INVALID_FIELD)
    if page == _PAGE_SUPPORTED:
        data = bytes((_PAGE_SUPPORTED, _PAGE_SERIAL, _PAGE_IDENTIFICATION))
    elif page == _PAGE_SERIAL:
        data = serial
    elif page == _PAGE_IDENTIFICATION:
        name = VENDOR + product.ljust(16) + serial
        # ASCII; of the logical unit, by T10 vendor identification.
        data = bytes((0x02, 0x01, 0, len(name))) + name
    else:
        raise CheckCondition(INVALID_FIELD)
    return bytes((device, page)) + len(data).to_bytes(2, "big") + data
