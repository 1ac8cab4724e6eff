"""Linux's 64-bit boot protocol: boot_params, identity-mapping page tables, and the CPU at startup_64. VMM
process.

Follows "64-bit Boot Protocol" in Documentation/x86/boot.rst, zero-page.rst, and struct boot_params of
arch/x86/include/uapi/asm/bootparam.h.
"""

import os
import struct

from devices.memory import GuestMemory
from vmrun.boot.bzimage import SETUP_HEADER_OFFSET, SetupHeader
from vmrun.boot.cpustate import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_RESERVED,
    CpuState,
    flat_code,
    flat_data,
    task_state,
)
from vmrun.boot.e820 import e820_map
from vmrun.boot.gdt import BOOT_CS, BOOT_DS, BOOT_TSS, GDT_LIMIT, write_gdt
from vmrun.machine.layout import (
    BOOT_GDT_START,
    BOOT_PAGE_TABLES_START,
    BOOT_STACK_END,
    CMDLINE_START,
    SETUP_DATA_START,
    ZERO_PAGE_END,
    ZERO_PAGE_START,
)

# What a vmlinux, which has no setup header, is taken to say. The values are those of its bzImage.
DEFAULT_INITRD_ADDR_MAX = 0x7FFFFFFF
DEFAULT_CMDLINE_SIZE = 2047

# Offsets in struct boot_params.
_ACPI_RSDP_ADDR = 0x070
_E820_ENTRIES = 0x1E8
_VID_MODE = 0x1FA
_BOOT_FLAG = 0x1FE
_HEADER = 0x202
_VERSION = 0x206
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_RAMDISK_IMAGE = 0x218
_RAMDISK_SIZE = 0x21C
_CMD_LINE_PTR = 0x228
_HARDWARE_SUBARCH = 0x23C
_SETUP_DATA = 0x250
_E820_TABLE = 0x2D0

# struct setup_data: next, type, length.
_SETUP_RNG_SEED = 9
_RANDOM_SEED_SIZE = 32

_LOADED_HIGH = 1
_VIDEO_NORMAL = 0xFFFF
_LOADER_UNDEFINED = 0xFF

_PAGE_SIZE = 4096
_LARGE_PAGE_SHIFT = 21
# Accessed and dirty are set at once: whoever walks these tables has nothing to write back.
_TABLE_FLAGS = 0x23  # present, writable, accessed
_LARGE_PAGE_FLAGS = 0xE3  # and dirty, 2 MiB


def write_boot_params(
    memory: GuestMemory, header: SetupHeader | None, *, ramdisk: tuple[int, int] | None, rsdp: int
) -> None:
    """The zero page. `header` is the bzImage's own or None for a vmlinux; `ramdisk` is (address, size)."""
    page = bytearray(ZERO_PAGE_END - ZERO_PAGE_START)
    if header is None:
        struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
        page[_HEADER : _HEADER + 4] = b"HdrS"
        struct.pack_into("<H", page, _VERSION, 0x20C)
    else:
        page[SETUP_HEADER_OFFSET : SETUP_HEADER_OFFSET + len(header.raw)] = header.raw
        # The file is not trusted with pointers and platform types that the kernel would follow.
        struct.pack_into("<I", page, _HARDWARE_SUBARCH, 0)
    struct.pack_into("<H", page, _VID_MODE, _VIDEO_NORMAL)
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    page[_LOADFLAGS] = _LOADED_HIGH  # without KASLR_FLAG: the kernel runs where it was linked
    struct.pack_into("<I", page, _CMD_LINE_PTR, CMDLINE_START)
    struct.pack_into("<Q", page, _SETUP_DATA, _write_random_seed(memory))
    address, size = ramdisk if ramdisk is not None else (0, 0)
    struct.pack_into("<I", page, _RAMDISK_IMAGE, address)
    struct.pack_into("<I", page, _RAMDISK_SIZE, size)
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDR, rsdp)
    ranges = e820_map(memory)
    page[_E820_ENTRIES] = len(ranges)
    for index, entry in enumerate(ranges):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * index, *entry)
    memory.write(ZERO_PAGE_START, page)


def _write_random_seed(memory: GuestMemory) -> int:
    """Give the kernel entropy to start with, so that it need not gather its own; the address of its
    setup_data.

    Kernels before 6.1 do not know the type and leave it alone.
    """
    seed = os.urandom(_RANDOM_SEED_SIZE)
    memory.write(SETUP_DATA_START, struct.pack("<QII", 0, _SETUP_RNG_SEED, len(seed)) + seed)
    return SETUP_DATA_START


def write_page_tables(memory: GuestMemory) -> None:
    """Map the first 4 GiB to itself with 2 MiB pages, which every x86-64 CPU and emulated MMU has (1 GiB
    ones are optional).
    """
    pdpt = BOOT_PAGE_TABLES_START + _PAGE_SIZE
    directories = pdpt + _PAGE_SIZE
    memory.write(BOOT_PAGE_TABLES_START, struct.pack("<Q", pdpt | _TABLE_FLAGS))
    memory.write(pdpt, struct.pack("<4Q", *(directories + _PAGE_SIZE * i | _TABLE_FLAGS for i in range(4))))
    pages = ((number << _LARGE_PAGE_SHIFT) | _LARGE_PAGE_FLAGS for number in range(4 * 512))
    memory.write(directories, struct.pack("<2048Q", *pages))


def enter_linux64(memory: GuestMemory, entry: int) -> CpuState:
    """Write GDT and page tables; the state at `entry`, the guest-physical address of startup_64."""
    code, data, task = flat_code(BOOT_CS, long_mode=True), flat_data(BOOT_DS), task_state(BOOT_TSS)
    write_gdt(memory, code, data, task)
    write_page_tables(memory)
    return CpuState(
        rip=entry,
        rsp=BOOT_STACK_END,
        rsi=ZERO_PAGE_START,
        rbx=0,
        rflags=RFLAGS_RESERVED,
        long_mode=True,
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=BOOT_PAGE_TABLES_START,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
        gdt_address=BOOT_GDT_START,
        gdt_limit=GDT_LIMIT,
        code=code,
        data=data,
        task=task,
    )
