"""From a firmware image to a guest that starts as a PC does, at the reset vector in real mode. VMM process.

Made for SeaBIOS (src/fw/paravirt.c, src/fw/romfile_loader.c, docs/Runtime_config.md), which takes a machine
without a chipset it knows for QEMU's oldest one: it expects its image below 1 MiB, in memory that can be
written, and learns of RAM and of the rest from fw_cfg files. It then places all PCI BARs itself, just below
the IOAPIC.

The ACPI tables are ours, as for kernels. They lie at the end of low RAM, which the firmware is told only that
it is reserved; the RSDP alone goes through the firmware, which puts it where an operating system scans for
it. The MP table is the firmware's own.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from devices.memory import GuestMemory
from devices.platform import fw_cfg
from vmrun.boot import acpi
from vmrun.boot.e820 import E820_RAM, E820_RESERVED, e820_map
from vmrun.boot.image import FileImage
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.layout import FIRMWARE_MAX_SIZE, FOUR_GIB, HIGH_RAM_START, SERIAL_PORT

_KIB = 1 << 10
_BLOCK = 64 * _KIB  # firmware images are made of these, and the CMOS counts RAM in them
_ROM_SIGNATURE = b"\x55\xaa"
_ROM_MAX_SIZE = 128 * _KIB  # there is room for no more below the firmware
_ROM_BLOCK = 512

# A command of the table loader (QEMU's hw/acpi/bios-linker-loader.c): load a file into the F segment.
_ALLOCATE = struct.Struct("<I56sIB63x")
_COMMAND_ALLOCATE = 1
_ZONE_FSEG = 2  # 0xF0000 to 1 MiB
_RSDP_FILE = "etc/acpi/rsdp"


@dataclass(frozen=True, slots=True)
class Firmware:
    """`image` ends at 4 GiB. `ram_end` is where the low RAM ends that the firmware may use."""

    image: bytes
    ram_end: int
    config: fw_cfg.FwCfg


def load(memory: GuestMemory, path: Path, *, cpus: int, roms: Iterable[tuple[int, int, Path]]) -> Firmware:
    """Put the firmware at `path` and the ACPI tables into `memory`, which must be fresh.

    `roms` are option ROMs with the PCI vendor and device they are for. UserError (EXIT_IMAGE) for files that
    cannot be what they should be.
    """
    image = _read_firmware(path)
    memory.write(HIGH_RAM_START - len(image), image)
    low = memory.regions[0].size
    ram_end = low - _BLOCK & -_BLOCK
    rsdp, *tables = acpi.build(cpus, ram_end)
    for address, table in tables:
        memory.write(address, table)
    files = {
        "etc/e820": _e820(memory, ram_end, low),
        # Its screen and its keyboard are the serial port: there is no VGA.
        "etc/sercon-port": struct.pack("<Q", SERIAL_PORT),
        "etc/table-loader": _ALLOCATE.pack(_COMMAND_ALLOCATE, _RSDP_FILE.encode(), 16, _ZONE_FSEG),
        _RSDP_FILE: rsdp[1],
    }
    for vendor, device, rom in roms:
        files[f"pci{vendor:04x},{device:04x}.rom"] = _read_rom(rom)
    items = dict.fromkeys((fw_cfg.NB_CPUS, fw_cfg.MAX_CPUS), struct.pack("<H", cpus))
    return Firmware(image, ram_end, fw_cfg.FwCfg(files, items))


def _read_firmware(path: Path) -> bytes:
    with FileImage(path, "firmware") as file:
        if file.size == 0 or file.size % _BLOCK or file.size > FIRMWARE_MAX_SIZE:
            raise UserError(
                f"{file.name}: {file.size} bytes: give an image of 64 KiB to {FIRMWARE_MAX_SIZE // _KIB} KiB "
                "in steps of 64 KiB, such as SeaBIOS (UEFI firmware is larger, and is not supported)",
                EXIT_IMAGE,
            )
        return file.read(0, file.size)


def _read_rom(path: Path) -> bytes:
    """An option ROM: signature, and its size in blocks (PCI Firmware Specification 3.3, table 5-1)."""
    with FileImage(path, "option ROM") as file:
        data = file.read(0, min(file.size, _ROM_MAX_SIZE + 1))
        if data[:2] != _ROM_SIGNATURE or not 0 < data[2] * _ROM_BLOCK <= len(data):
            raise UserError(f"{file.name}: not an option ROM", EXIT_IMAGE)
        if len(data) > _ROM_MAX_SIZE:
            raise UserError(f"{file.name}: longer than {_ROM_MAX_SIZE // _KIB} KiB", EXIT_IMAGE)
        return data


def _e820(memory: GuestMemory, ram_end: int, low: int) -> bytes:
    """What is RAM and what is reserved; the firmware has its own mind about the first MiB."""
    entries = [(0, ram_end, E820_RAM), (ram_end, low - ram_end, E820_RESERVED)]
    for entry in e820_map(memory):
        address, _, kind = entry
        if address >= FOUR_GIB or (kind == E820_RESERVED and address >= HIGH_RAM_START):
            entries.append(entry)
    return b"".join(struct.pack("<QQI", *entry) for entry in entries)
