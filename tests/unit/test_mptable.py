"""The MP table, read back the way a kernel reads it."""

import os
import struct
from collections import Counter

import pytest

from devices.memory import GuestMemory, MemoryRegion
from devices.pci.intx import INTX_GSIS, intx_gsi
from vmrun.boot import mptable
from vmrun.machine import layout

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries(table: bytes) -> list[bytes]:
    found = []
    position = 44
    while position < len(table):
        size = SIZES[table[position]]
        found.append(table[position : position + size])
        position += size
    assert position == len(table)
    return found


@pytest.mark.parametrize("cpus", [1, 2, 64])
def test_header_and_processors(cpus: int) -> None:
    table = mptable.build(cpus)
    assert table[:4] == b"PCMP"
    assert sum(table) % 256 == 0
    length, specification = struct.unpack_from("<HB", table, 4)
    count, lapic = struct.unpack_from("<HI", table, 34)
    assert (length, specification, lapic) == (len(table), 4, 0xFEE00000)
    found = entries(table)
    assert len(found) == count
    processors = [entry for entry in found if entry[0] == 0]
    assert [entry[1:4] for entry in processors] == [
        bytes((cpu, 0x14, 3 if cpu == 0 else 1)) for cpu in range(cpus)
    ]
    ioapics = [entry for entry in found if entry[0] == 2]
    assert ioapics == [struct.pack("<BBBBI", 2, cpus, 0x11, 1, 0xFEC00000)]
    assert [entry for entry in found if entry[0] == 1] == [b"\x01\x00PCI   ", b"\x01\x01ISA   "]
    assert [entry[0] for entry in found] == sorted(entry[0] for entry in found)


def test_interrupts() -> None:
    found = [struct.unpack("<BBHBBBB", entry) for entry in entries(mptable.build(2)) if entry[0] in (3, 4)]
    isa = {source: pin for kind, _, _, bus, source, _, pin in found if kind == 3 and bus == 1}
    assert isa == {0: 2} | {irq: irq for irq in range(1, 16) if irq != 2 and irq not in INTX_GSIS}
    pci = {
        (source >> 2, (source & 3) + 1): pin
        for kind, _, _, bus, source, _, pin in found
        if kind == 3 and bus == 0
    }
    assert pci == {(slot, pin): intx_gsi(slot, pin) for slot in range(1, 32) for pin in range(1, 5)}
    assert all(entry[2] == 0xF for entry in found if entry[0] == 3 and entry[3] == 0)
    assert Counter(entry[1:] for entry in found if entry[0] == 4) == Counter(
        [(3, 0, 1, 0, 0xFF, 0), (1, 0, 1, 0, 0xFF, 1)]
    )


def test_floating_pointer_is_where_kernels_look_first() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    memory = GuestMemory([MemoryRegion(0, 1 << 20, fd, 0)])
    mptable.write(memory, 64)
    ebda = int.from_bytes(memory.read(0x40E, 2), "little") << 4
    assert ebda == int.from_bytes(memory.read(0x413, 2), "little") << 10 == 639 << 10
    assert memory.read(ebda, 1) == b"\x01"
    area = memory.read(ebda, 1024)
    offset = next(position for position in range(0, 1024, 16) if area[position : position + 4] == b"_MP_")
    pointer = area[offset : offset + 16]
    assert sum(pointer) % 256 == 0
    address, length, specification = struct.unpack_from("<IBB", pointer, 4)
    assert (length, specification, pointer[11]) == (1, 4, 0)
    assert memory.read(address, len(mptable.build(64))) == mptable.build(64)
    memory.close()
    os.close(fd)


def test_largest_table_fits() -> None:
    assert layout.MP_TABLE_START + len(mptable.build(254)) <= layout.MP_TABLE_END
