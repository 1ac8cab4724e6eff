"""The ACPI tables: checksums, references, contents, and what ACPICA's disassembler makes of them."""

import os
import re
import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from devices.memory import GuestMemory, MemoryRegion
from devices.pci.intx import intx_gsi
from vmrun.boot import acpi
from vmrun.machine import layout

CPUS = (1, 2, 64, 254)


def tables(cpus: int) -> dict[str, bytes]:
    return {data[:4].decode(): data for _, data in acpi.build(cpus)}


@pytest.mark.parametrize("cpus", CPUS)
def test_placement_and_checksums(cpus: int) -> None:
    placed = acpi.build(cpus)
    for (address, data), (following, _) in pairwise(placed):
        assert address + len(data) <= following
    assert placed[0][0] == layout.ACPI_START
    assert placed[-1][0] + len(placed[-1][1]) <= layout.ACPI_END
    for address, data in placed:
        assert address % 16 == 0
        if data[:4] == b"FACS":
            assert address % 64 == 0
        elif data[:4] != b"RSD ":
            assert sum(data) % 256 == 0
            assert struct.unpack_from("<I", data, 4) == (len(data),)


def test_everything_is_found_from_the_rsdp() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    memory = GuestMemory([MemoryRegion(0, 1 << 20, fd, 0)])
    rsdp = memory.read(acpi.write(memory, 2), 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp) % 256 == sum(rsdp[:20]) % 256 == 0
    revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", rsdp, 15)
    assert (revision, length) == (2, 36)

    def table(address: int) -> bytes:
        return memory.read(address, int.from_bytes(memory.read(address + 4, 4), "little"))

    addresses = [entry for (entry,) in struct.iter_unpack("<Q", table(xsdt)[36:])]
    assert [entry for (entry,) in struct.iter_unpack("<I", table(rsdt)[36:])] == addresses
    assert [table(address)[:4] for address in addresses] == [b"FACP", b"APIC", b"MCFG"]
    fadt = table(addresses[0])
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert (memory.read(facs, 8), table(dsdt)[:4]) == (b"FACS\x40\0\0\0", b"DSDT")
    assert struct.unpack_from("<QQ", fadt, 132) == (0, dsdt)
    memory.close()
    os.close(fd)


def test_fadt() -> None:
    fadt = tables(1)["FACP"]
    assert struct.unpack_from("<HI", fadt, 46) == (layout.ACPI_SCI_IRQ, 0)  # SCI, no SMI command port
    assert struct.unpack_from("<I4xI8xI", fadt, 56) == (0x600, 0x604, 0x608)
    assert fadt[88:92] == bytes((4, 2, 0, 4))
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 10  # reset register
    assert not flags & 1 << 4  # the power button is a fixed feature
    assert not flags & 1 << 8  # the PM timer is promised 24 bits only
    assert fadt[116:129] == struct.pack("<BBBBQB", 1, 8, 0, 1, layout.ACPI_RESET_PORT, 1)
    assert struct.unpack_from("<H", fadt, 109) == (0b111,)


@pytest.mark.parametrize("cpus", CPUS)
def test_madt(cpus: int) -> None:
    madt = tables(cpus)["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    found: dict[int, list[bytes]] = {}
    position = 44
    while position < len(madt):
        found.setdefault(madt[position], []).append(madt[position + 2 : position + madt[position + 1]])
        position += madt[position + 1]
    assert position == len(madt)
    assert found[0] == [struct.pack("<BBI", cpu, cpu, 1) for cpu in range(cpus)]
    assert found[1] == [struct.pack("<BBII", cpus, 0, 0xFEC00000, 0)]
    overrides = {
        source: (gsi, flags) for _, source, gsi, flags in (struct.unpack("<BBIH", x) for x in found[2])
    }
    pci = {gsi: (gsi, 0xF) for gsi in (5, 10, 11, 15)}
    assert overrides == {0: (2, 0), 9: (9, 0xD)} | pci
    assert found[4] == [b"\xff\0\0\x01"]


def test_mcfg() -> None:
    entry = struct.pack("<QHBBI", layout.PCI_ECAM_START, 0, 0, 0, 0)
    assert tables(1)["MCFG"][36:] == bytes(8) + entry


def disassemble(tmp_path: Path, name: str, data: bytes) -> str:
    """iasl's view. Fails when it has anything to complain about."""
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not installed (Debian package acpica-tools)")
    source = tmp_path / f"{name}.dat"
    source.write_bytes(data)
    run = subprocess.run(["iasl", "-d", source.name], cwd=tmp_path, capture_output=True, text=True)
    text = (tmp_path / f"{name}.dsl").read_text()
    assert run.returncode == 0
    assert not re.search("error|warning|invalid|incorrect", run.stdout + run.stderr + text, re.IGNORECASE)
    return text


@pytest.mark.parametrize("name", ["DSDT", "FACP", "APIC", "MCFG", "RSDT", "XSDT", "FACS"])
def test_disassembly(tmp_path: Path, name: str) -> None:
    disassemble(tmp_path, name, tables(2)[name])


def test_dsdt_compiles_to_itself(tmp_path: Path) -> None:
    dsdt = tables(2)["DSDT"]
    disassemble(tmp_path, "dsdt", dsdt)
    command = ["iasl", "-oa", "-p", "again", "dsdt.dsl"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "0 Errors, 0 Warnings" in run.stdout, run.stdout
    again = (tmp_path / "again.aml").read_bytes()
    # iasl writes its own name into the header, and the checksum with it.
    assert again[36:] == dsdt[36:]


def test_dsdt_routes_every_pin(tmp_path: Path) -> None:
    text = disassemble(tmp_path, "DSDT", tables(1)["DSDT"])
    assert re.search(r"_S5, Package.*\s*\{\s*0x05,\s*0x05,\s*Zero,\s*Zero\s*\}", text)
    values = {"Zero": 0, "One": 1}
    routes = re.findall(r"Package \(0x04\)\s*\{\s*(\w+),\s*(\w+),\s*(\w+),\s*(\w+)\s*\}", text)
    numbers = [
        tuple(values.get(word) if word in values else int(word, 16) for word in route) for route in routes
    ]
    assert numbers == [
        (slot << 16 | 0xFFFF, pin - 1, 0, intx_gsi(slot, pin)) for slot in range(32) for pin in range(1, 5)
    ]
    assert "PNP0501" in text
    assert "Method" not in text
