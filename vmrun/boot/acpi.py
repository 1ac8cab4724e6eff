"""The ACPI tables: CPUs, interrupt controllers, power control and PCI for kernels that speak ACPI. VMM
process.

Follows ACPI 6.4 chapter 5 (tables) and the PCI Firmware Specification 3.3, section 4.1.2 (MCFG). All tables
lie one behind the other from layout.ACPI_START; a kernel finds them by boot_params, by hvm_start_info, or
by its own scan for the RSDP.
"""

import struct

from devices.memory import GuestMemory
from devices.pci.intx import INTX_GSIS
from vmrun.boot.dsdt import dsdt_body
from vmrun.machine.layout import (
    ACPI_PM_PORT,
    ACPI_RESET_PORT,
    ACPI_RESET_VALUE,
    ACPI_SCI_IRQ,
    ACPI_START,
    IOAPIC_ADDRESS,
    LAPIC_ADDRESS,
    PCI_ECAM_START,
)

_OEM_ID = b"VMRUN "
_OEM_TABLE_ID = b"MICROVM "
_CREATOR_ID = b"VMRN"

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_HEADER_CHECKSUM = 9

# FADT: fixed feature flags (5.2.9, table 5.10) and IA-PC boot architecture flags (5.2.9.3).
_FADT_REVISION, _FADT_SIZE = 4, 244
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_SLP_BUTTON = 1 << 5  # no fixed sleep button; the power button, bit 4 clear, is a fixed feature
_FIX_RTC = 1 << 6  # no RTC wake-up in the fixed registers
_RESET_REG_SUP = 1 << 10
_LEGACY_DEVICES = 1 << 0
_8042 = 1 << 1
_VGA_NOT_PRESENT = 1 << 2
_NO_LATENCY = 0xFFFF  # more than any C2 or C3 state may have: there are none
_CENTURY = 0x32  # CMOS register

# MADT (5.2.12).
_PCAT_COMPAT = 1  # there are two 8259s as well
_LOCAL_APIC, _IO_APIC, _INTERRUPT_OVERRIDE = 0, 1, 2
_LOCAL_APIC_NMI = 4
_ALL_PROCESSORS = 0xFF
_CONFORMS = 0
_ACTIVE_HIGH_LEVEL = 0xD
_ACTIVE_LOW_LEVEL = 0xF

_SYSTEM_IO = 1
_BYTE_ACCESS, _WORD_ACCESS, _DWORD_ACCESS = 1, 2, 3

_RSDP_SIZE = 36
_FACS_SIZE = 64


def write(memory: GuestMemory, cpus: int) -> int:
    """Write all tables for `cpus` CPUs (1 to 254). Returns the guest-physical address of the RSDP."""
    for address, table in build(cpus):
        memory.write(address, table)
    return ACPI_START


def build(cpus: int, start: int = ACPI_START) -> list[tuple[int, bytes]]:
    """All tables with the addresses they go to, ascending from `start`; the RSDP is the first."""
    facs_address = _aligned(start + _RSDP_SIZE, 64)
    placed = [(facs_address, struct.pack("<4sIIIIIQB31x", b"FACS", _FACS_SIZE, 0, 0, 0, 0, 0, 2))]
    cursor = facs_address + _FACS_SIZE

    def place(table: bytes) -> int:
        nonlocal cursor
        address = _aligned(cursor, 16)
        placed.append((address, table))
        cursor = address + len(table)
        return address

    dsdt = place(_table(b"DSDT", 2, dsdt_body()))
    listed = [place(_fadt(facs_address, dsdt)), place(_madt(cpus)), place(_mcfg())]
    rsdt = place(_table(b"RSDT", 1, struct.pack(f"<{len(listed)}I", *listed)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    return [(start, _rsdp(rsdt, xsdt)), *placed]


def _aligned(address: int, alignment: int) -> int:
    return address + alignment - 1 & -alignment


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """`body` behind the header all tables but RSDP and FACS share (5.2.6)."""
    size = _HEADER.size + len(body)
    header = _HEADER.pack(signature, size, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1)
    table = bytearray(header + body)
    table[_HEADER_CHECKSUM] = _checksum(table)
    return bytes(table)


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    """Version 2, with both the 32-bit table list of ACPI 1.0 and the 64-bit one; the first 20 bytes have
    their own sum.
    """
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, rsdt, _RSDP_SIZE, xsdt, 0))
    data[8] = _checksum(data[:20])
    data[32] = _checksum(data)
    return bytes(data)


def _register(port: int, size: int, access: int) -> bytes:
    """A Generic Address Structure (5.2.3.2) for `size` bytes of ports; all zero for port 0."""
    if not port:
        return bytes(12)
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * size, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """Fixed hardware. There is no SMI command port: the machine is in ACPI mode from the start, SCI_EN
    always set.
    """
    event, control, timer = ACPI_PM_PORT, ACPI_PM_PORT + 4, ACPI_PM_PORT + 8
    body = bytearray(_FADT_SIZE - _HEADER.size)

    def put(offset: int, form: str, *values: int) -> None:
        struct.pack_into(
            "<" + form, body, offset - _HEADER.size, *values
        )  # offsets as the specification counts

    def put_register(offset: int, port: int, size: int, access: int) -> None:
        body[offset - _HEADER.size : offset - _HEADER.size + 12] = _register(port, size, access)

    put(36, "II", facs, dsdt)
    put(46, "H", ACPI_SCI_IRQ)
    put(56, "IIIIII", event, 0, control, 0, 0, timer)
    put(88, "BBBB", 4, 2, 0, 4)  # lengths of PM1 event, PM1 control, PM2 control and PM timer
    put(96, "HH", _NO_LATENCY, _NO_LATENCY)
    put(108, "B", _CENTURY)
    put(109, "H", _LEGACY_DEVICES | _8042 | _VGA_NOT_PRESENT)
    put(112, "I", _WBINVD | _PROC_C1 | _SLP_BUTTON | _FIX_RTC | _RESET_REG_SUP)
    put_register(116, ACPI_RESET_PORT, 1, _BYTE_ACCESS)
    put(128, "B", ACPI_RESET_VALUE)
    put(140, "Q", dsdt)  # X_FIRMWARE_CTRL stays 0: the FACS has one address, not two
    put_register(148, event, 4, _WORD_ACCESS)
    put_register(172, control, 2, _WORD_ACCESS)
    put_register(208, timer, 4, _DWORD_ACCESS)
    return _table(b"FACP", _FADT_REVISION, bytes(body))


def _madt(cpus: int) -> bytes:
    entries = [struct.pack("<BBBBI", _LOCAL_APIC, 8, cpu, cpu, 1) for cpu in range(cpus)]
    # The IOAPIC's identifier is the first that no CPU has, as in the MP table.
    entries.append(struct.pack("<BBBBII", _IO_APIC, 12, cpus, 0, IOAPIC_ADDRESS, 0))
    overrides = [(0, 2, _CONFORMS), (ACPI_SCI_IRQ, ACPI_SCI_IRQ, _ACTIVE_HIGH_LEVEL)]
    overrides += [(gsi, gsi, _ACTIVE_LOW_LEVEL) for gsi in INTX_GSIS]
    # The timer is on pin 2, as on a PC; mptable.py tells why. PCI's inputs are not what ISA's would be.
    entries += [
        struct.pack("<BBBBIH", _INTERRUPT_OVERRIDE, 10, 0, irq, gsi, flags)
        for irq, gsi, flags in sorted(overrides)
    ]
    entries.append(struct.pack("<BBBHB", _LOCAL_APIC_NMI, 6, _ALL_PROCESSORS, _CONFORMS, 1))
    return _table(b"APIC", 3, struct.pack("<II", LAPIC_ADDRESS, _PCAT_COMPAT) + b"".join(entries))


def _mcfg() -> bytes:
    """The ECAM window: segment 0, bus 0 only."""
    return _table(b"MCFG", 1, bytes(8) + struct.pack("<QHBB4x", PCI_ECAM_START, 0, 0, 0))
