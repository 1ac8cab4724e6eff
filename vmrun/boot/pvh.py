"""The PVH entry: hvm_start_info and the CPU in 32-bit protected mode without paging. VMM process.

Follows Xen's docs/misc/pvh.pandoc and include/xen/interface/hvm/start_info.h.
"""

import struct

from devices.memory import GuestMemory
from vmrun.boot.cpustate import (
    CR0_ET,
    CR0_PE,
    RFLAGS_RESERVED,
    CpuState,
    flat_code,
    flat_data,
    task_state,
)
from vmrun.boot.e820 import e820_map
from vmrun.boot.gdt import BOOT_CS, BOOT_DS, BOOT_TSS, GDT_LIMIT, write_gdt
from vmrun.machine.layout import BOOT_GDT_START, BOOT_STACK_END, CMDLINE_START, PVH_START_INFO_START

XEN_HVM_START_MAGIC_VALUE = 0x336EC578
_VERSION = 1  # with a memory map

_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMORY_RANGE = struct.Struct("<QQII")


def write_start_info(memory: GuestMemory, *, ramdisk: tuple[int, int] | None, rsdp: int) -> None:
    """hvm_start_info with a module for `ramdisk` (address, size) and the memory map behind it."""
    modules = [] if ramdisk is None else [ramdisk]
    ranges = e820_map(memory)
    module_list = PVH_START_INFO_START + _START_INFO.size
    memory_map = module_list + _MODULE.size * len(modules)
    blob = _START_INFO.pack(
        XEN_HVM_START_MAGIC_VALUE,
        _VERSION,
        0,
        len(modules),
        module_list if modules else 0,
        CMDLINE_START,
        rsdp,
        memory_map,
        len(ranges),
        0,
    )
    blob += b"".join(_MODULE.pack(address, size, 0, 0) for address, size in modules)
    blob += b"".join(_MEMORY_RANGE.pack(address, size, kind, 0) for address, size, kind in ranges)
    memory.write(PVH_START_INFO_START, blob)


def enter_pvh(memory: GuestMemory, entry: int) -> CpuState:
    """Write the GDT; the state at `entry`, the guest-physical address of the note's 32-bit entry."""
    code, data, task = flat_code(BOOT_CS, long_mode=False), flat_data(BOOT_DS), task_state(BOOT_TSS)
    write_gdt(memory, code, data, task)
    return CpuState(
        rip=entry,
        rsp=BOOT_STACK_END,  # the protocol promises no stack; this one costs nothing
        rsi=0,
        rbx=PVH_START_INFO_START,
        rflags=RFLAGS_RESERVED,
        long_mode=False,
        cr0=CR0_PE | CR0_ET,
        cr3=0,
        cr4=0,
        efer=0,
        gdt_address=BOOT_GDT_START,
        gdt_limit=GDT_LIMIT,
        code=code,
        data=data,
        task=task,
    )
