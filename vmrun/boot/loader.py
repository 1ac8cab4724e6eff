"""From a kernel file to a guest that can run: the one function that fills fresh guest memory for a boot.
VMM process.

Where everything goes is in vmrun/machine/layout.py.
"""

import os
from pathlib import Path

from devices.memory import PAGE_SIZE, GuestMemory
from vmrun.boot import acpi, linux, mptable, pvh
from vmrun.boot.bzimage import SetupHeader, extract_kernel, is_bzimage, read_setup_header
from vmrun.boot.cpustate import CpuState
from vmrun.boot.elf import ElfKernel, ram_end, read_elf
from vmrun.boot.image import FileImage
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.layout import CMDLINE_END, CMDLINE_START, HIGH_RAM_START, PCI_HOLE_START

ENTRIES = ("auto", "linux64", "pvh")


def load(
    memory: GuestMemory,
    kernel: Path,
    *,
    initrd: Path | None,
    cmdline: str,
    cpus: int,
    entry: str = "auto",
) -> CpuState:
    """Put kernel, initramfs, command line and all tables into `memory`, which must be fresh (all zero).

    `entry` is the way in: "linux64" (Linux's 64-bit boot protocol), "pvh" (the 32-bit entry of a Xen note),
    or "auto". Auto takes linux64 for a bzImage, for an ELF with Linux's own notes and for an ELF without a
    PVH note: it spares the guest the way from 32-bit to 64-bit mode. Another ELF with a PVH note is no
    Linux, and has only that way in.

    Raises UserError: EXIT_IMAGE for a file that cannot be booted or does not fit, EXIT_USAGE for a bad
    command line.
    """
    if entry not in ENTRIES:
        raise UserError(f"kernel entry {entry!r}: give one of {', '.join(ENTRIES)}")
    with FileImage(kernel, "kernel") as image:
        header: SetupHeader | None = None
        if is_bzimage(image.read(0, 0x206)):
            header = read_setup_header(image)
            elf = read_elf(extract_kernel(image, header), ram_limit=PCI_HOLE_START)
        elif image.read(0, 4) == b"\x7fELF":
            elf = read_elf(image, ram_limit=PCI_HOLE_START)
        else:
            raise UserError(f"{image.name}: not a kernel (neither a bzImage nor an ELF file)", EXIT_IMAGE)
        if entry == "auto":
            is_linux = header is not None or elf.is_linux or elf.pvh_entry is None
            entry = "linux64" if is_linux else "pvh"
        if entry == "pvh" and elf.pvh_entry is None:
            raise UserError(f"{image.name}: has no PVH entry (build Linux with CONFIG_PVH=y)", EXIT_IMAGE)
        _write_cmdline(memory, cmdline, header)
        elf.load(memory)
    ramdisk = None if initrd is None else _load_initramfs(memory, initrd, elf, header)
    mptable.write(memory, cpus)
    rsdp = acpi.write(memory, cpus)
    if entry == "pvh" and elf.pvh_entry is not None:
        pvh.write_start_info(memory, ramdisk=ramdisk, rsdp=rsdp)
        return pvh.enter_pvh(memory, elf.pvh_entry)
    linux.write_boot_params(memory, header, ramdisk=ramdisk, rsdp=rsdp)
    return linux.enter_linux64(memory, elf.entry)


def _write_cmdline(memory: GuestMemory, cmdline: str, header: SetupHeader | None) -> None:
    data = os.fsencode(cmdline)
    limit = linux.DEFAULT_CMDLINE_SIZE if header is None else header.cmdline_size
    limit = min(limit, CMDLINE_END - CMDLINE_START - 1)
    if len(data) > limit:
        raise UserError(f"kernel command line: {len(data)} bytes; this kernel takes at most {limit}")
    if b"\0" in data:
        raise UserError("kernel command line: it must not contain a zero byte")
    memory.write(CMDLINE_START, data + b"\0")


def _load_initramfs(
    memory: GuestMemory, path: Path, elf: ElfKernel, header: SetupHeader | None
) -> tuple[int, int]:
    """Load as high as the kernel allows, where nothing it does early is in the way. Returns address and
    size.
    """
    from vmrun.boot.initramfs import unpack

    highest = linux.DEFAULT_INITRD_ADDR_MAX if header is None else header.initrd_addr_max
    top = min(ram_end(memory, HIGH_RAM_START), highest + 1) & -PAGE_SIZE
    bottom = elf.end + PAGE_SIZE - 1 & -PAGE_SIZE
    with FileImage(path, "initramfs") as image:
        initramfs = unpack(image, top - bottom)
        address = top - initramfs.size & -PAGE_SIZE
        initramfs.write_into(memory.view(address, initramfs.size))
    return address, initramfs.size
