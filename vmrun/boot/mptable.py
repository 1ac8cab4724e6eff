"""The MP table: CPUs, buses and interrupt wiring for kernels without ACPI. VMM process.

Follows the Intel MultiProcessor Specification 1.4, chapter 4. The floating pointer lies in the first KiB of
the EBDA, the second place where Linux looks and the first for others; scanning the BIOS area costs an
emulated CPU seconds.
"""

import struct

from devices.memory import GuestMemory
from devices.pci.intx import INTX_GSIS, intx_gsi
from vmrun.machine.layout import (
    BDA_START,
    EBDA_START,
    IOAPIC_ADDRESS,
    LAPIC_ADDRESS,
    MP_FLOATING_POINTER_START,
    MP_TABLE_START,
)

_BDA_EBDA_SEGMENT = BDA_START + 0x0E
_BDA_BASE_MEMORY = BDA_START + 0x13  # in KiB

_SPECIFICATION = 4  # version 1.4
_LAPIC_VERSION = 0x14  # integrated APIC, what KVM's version register says
_IOAPIC_VERSION = 0x11
_CPU_ENABLED, _CPU_BOOTSTRAP = 1, 2
_CPU_SIGNATURE = 0x600  # family 6
_CPU_FEATURES = 0x201  # FPU, APIC

_PROCESSOR, _BUS, _IOAPIC, _IO_INTERRUPT, _LOCAL_INTERRUPT = range(5)
_INT, _NMI, _SMI, _EXTINT = range(4)
_CONFORMS = 0
_LEVEL_ACTIVE_LOW = 0xF
_ALL_LAPICS = 0xFF

# Linux takes the number of a PCI bus here for its PCI bus number.
_PCI_BUS = 0
_ISA_BUS = 1

_ISA_IRQS = 16
_CASCADE_IRQ = 2
_TIMER_IRQ = 0
_TIMER_PIN = 2
_PCI_SLOTS = range(1, 32)  # slot 0 is the host bridge, which interrupts nobody
_PCI_PINS = range(1, 5)

_HEADER = struct.Struct("<4sHBB8s12sIHHIHBB")


def write(memory: GuestMemory, cpus: int) -> None:
    """Write floating pointer and table for `cpus` CPUs (1 to 254) with APIC identifiers from 0."""
    memory.write(MP_TABLE_START, build(cpus))
    pointer = struct.pack("<4sIBBB5x", b"_MP_", MP_TABLE_START, 1, _SPECIFICATION, 0)
    memory.write(MP_FLOATING_POINTER_START, _with_checksum(pointer, 10))
    memory.write(EBDA_START, b"\x01")  # its size in KiB
    memory.write(_BDA_EBDA_SEGMENT, struct.pack("<H", EBDA_START >> 4))
    memory.write(_BDA_BASE_MEMORY, struct.pack("<H", EBDA_START >> 10))


def build(cpus: int) -> bytes:
    """The configuration table."""
    ioapic = cpus  # the first APIC identifier that no CPU has
    entries = [
        struct.pack(
            "<BBBBII8x",
            _PROCESSOR,
            cpu,
            _LAPIC_VERSION,
            _CPU_ENABLED | (_CPU_BOOTSTRAP if cpu == 0 else 0),
            _CPU_SIGNATURE,
            _CPU_FEATURES,
        )
        for cpu in range(cpus)
    ]
    entries.append(struct.pack("<BB6s", _BUS, _PCI_BUS, b"PCI   "))
    entries.append(struct.pack("<BB6s", _BUS, _ISA_BUS, b"ISA   "))
    entries.append(struct.pack("<BBBBI", _IOAPIC, ioapic, _IOAPIC_VERSION, 1, IOAPIC_ADDRESS))

    def interrupt(entry: int, kind: int, flags: int, bus: int, source: int, apic: int, pin: int) -> bytes:
        return struct.pack("<BBHBBBB", entry, kind, flags, bus, source, apic, pin)

    for irq in range(_ISA_IRQS):
        # The inputs that PCI shares are level-triggered and no ISA device's; IRQ 2 is where the slave 8259
        # is attached.
        if irq != _CASCADE_IRQ and irq not in INTX_GSIS:
            # On a PC the 8259s occupy pin 0, so the timer is wired to pin 2. Linux looks for it there first.
            pin = _TIMER_PIN if irq == _TIMER_IRQ else irq
            entries.append(interrupt(_IO_INTERRUPT, _INT, _CONFORMS, _ISA_BUS, irq, ioapic, pin))
    for slot in _PCI_SLOTS:
        for pin in _PCI_PINS:
            source = slot << 2 | pin - 1
            gsi = intx_gsi(slot, pin)
            entries.append(interrupt(_IO_INTERRUPT, _INT, _LEVEL_ACTIVE_LOW, _PCI_BUS, source, ioapic, gsi))
    entries.append(interrupt(_LOCAL_INTERRUPT, _EXTINT, _CONFORMS, _ISA_BUS, 0, _ALL_LAPICS, 0))
    entries.append(interrupt(_LOCAL_INTERRUPT, _NMI, _CONFORMS, _ISA_BUS, 0, _ALL_LAPICS, 1))

    body = b"".join(entries)
    header = _HEADER.pack(
        b"PCMP",
        _HEADER.size + len(body),
        _SPECIFICATION,
        0,
        b"VMRUN   ",
        b"MICROVM     ",
        0,
        0,
        len(entries),
        LAPIC_ADDRESS,
        0,
        0,
        0,
    )
    return _with_checksum(header + body, 7)


def _with_checksum(table: bytes, offset: int) -> bytes:
    """`table`, whose byte at `offset` is 0, with that byte set so that all bytes sum up to 0."""
    data = bytearray(table)
    data[offset] = -sum(data) & 0xFF
    return bytes(data)
