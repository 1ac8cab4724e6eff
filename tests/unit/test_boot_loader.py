"""What a kernel finds in its memory and registers, for both ways in."""

import gzip
import os
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from devices.memory import GuestMemory, MemoryRegion
from tests.unit.boot_images import LINUX_NOTE, bzimage, cpio, elf, pvh_note
from vmrun.boot.cpustate import CpuState, flat_code, flat_data, task_state
from vmrun.boot.e820 import e820_map
from vmrun.boot.loader import load
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, UserError
from vmrun.machine import layout

MIB = 1 << 20
ROOT = cpio({"init": b"#!/bin/sh\n" * 1000})
Load = Callable[..., CpuState]

# Everything the loader may write below 1 MiB.
PLACES = {
    "BDA": (layout.BDA_START, layout.BDA_END),
    "GDT": (layout.BOOT_GDT_START, layout.BOOT_GDT_END),
    "PVH start info": (layout.PVH_START_INFO_START, layout.PVH_START_INFO_END),
    "stack": (layout.BOOT_STACK_START, layout.BOOT_STACK_END),
    "zero page": (layout.ZERO_PAGE_START, layout.ZERO_PAGE_END),
    "page tables": (layout.BOOT_PAGE_TABLES_START, layout.BOOT_PAGE_TABLES_END),
    "setup data": (layout.SETUP_DATA_START, layout.SETUP_DATA_END),
    "command line": (layout.CMDLINE_START, layout.CMDLINE_END),
    "EBDA size": (layout.EBDA_START, layout.EBDA_START + 1),
    "MP floating pointer": (layout.MP_FLOATING_POINTER_START, layout.MP_FLOATING_POINTER_END),
    "ACPI": (layout.ACPI_START, layout.ACPI_END),
    "MP table": (layout.MP_TABLE_START, layout.MP_TABLE_END),
}


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 MiB and, behind the hole, another 2."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 66 * MIB)
    memory = GuestMemory(
        [MemoryRegion(0, 64 * MIB, fd, 0), MemoryRegion(layout.FOUR_GIB, 2 * MIB, fd, 64 * MIB)]
    )
    yield memory
    memory.close()
    os.close(fd)


@pytest.fixture
def load_kernel(memory: GuestMemory, tmp_path: Path) -> Load:
    def call(
        kernel: bytes, *, initrd: bytes | None = None, cmdline: str = "quiet", **options: str
    ) -> CpuState:
        (tmp_path / "kernel").write_bytes(kernel)
        path = None
        if initrd is not None:
            path = tmp_path / "initrd"
            path.write_bytes(initrd)
        return load(memory, tmp_path / "kernel", initrd=path, cmdline=cmdline, cpus=64, **options)

    return call


def u32(memory: GuestMemory, address: int) -> int:
    return int.from_bytes(memory.read(address, 4), "little")


def test_places_do_not_overlap() -> None:
    ranges = sorted(PLACES.values())
    assert all(start < end for start, end in ranges)
    for (_, end), (start, _) in pairwise(ranges):
        assert end <= start
    for name, (start, end) in PLACES.items():
        in_ram = end <= layout.LOW_RAM_END
        assert in_ram or layout.EBDA_START <= start < end <= layout.HIGH_RAM_START, name


@pytest.mark.parametrize("entry", ["linux64", "pvh"])
def test_nothing_is_written_elsewhere(memory: GuestMemory, load_kernel: Load, entry: str) -> None:
    load_kernel(elf(notes=pvh_note(0x1000000)), initrd=ROOT, cmdline="x" * 2047, entry=entry)
    low = bytearray(memory.read(0, layout.HIGH_RAM_START))
    for start, end in PLACES.values():
        low[start:end] = bytes(end - start)
    assert not any(low)


def test_linux64_registers_and_descriptors(memory: GuestMemory, load_kernel: Load) -> None:
    state = load_kernel(bzimage(gzip.compress(elf(entry=0x1000040))))
    assert (state.rip, state.rsi, state.rsp) == (0x1000040, layout.ZERO_PAGE_START, layout.BOOT_STACK_END)
    assert state.long_mode
    assert state.cr0 & 0x80000001 == 0x80000001
    assert state.cr4 & 0x20
    assert state.efer & 0x500 == 0x500
    assert not state.rflags & 0x200
    assert (state.code.selector, state.data.selector) == (0x10, 0x18)
    gdt = struct.unpack("<6Q", memory.read(state.gdt_address, state.gdt_limit + 1))
    assert gdt == (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067, 0)


def test_page_tables_map_four_gib_to_themselves(memory: GuestMemory, load_kernel: Load) -> None:
    cr3 = load_kernel(elf()).cr3

    def translate(address: int) -> int:
        table = cr3
        for shift in (39, 30, 21):
            entry = int.from_bytes(memory.read(table + (address >> shift & 511) * 8, 8), "little")
            assert entry & 3 == 3
            if entry & 0x80:
                return entry & 0xFFFFFFFE00000 | address & 0x1FFFFF
            table = entry & 0xFFFFFFFFFF000
        raise AssertionError("no large page")

    for address in (0, 0x1000040, 0x1FFFFF, 0x200000, 0x3FFFFFFF, 0x40000000, 0xFEE00030, 0xFFFFFFFF):
        assert translate(address) == address
    assert not any(memory.read(cr3 + 8, 4088))


def test_boot_params_of_a_bzimage(memory: GuestMemory, load_kernel: Load) -> None:
    kernel = bzimage(gzip.compress(elf()), version=0x20D)
    load_kernel(kernel, initrd=gzip.compress(ROOT), cmdline="root=/dev/vda é")
    page = layout.ZERO_PAGE_START
    assert memory.read(page + 0x1F1, 1) == kernel[0x1F1:0x1F2]
    assert memory.read(page + 0x202, 6) == b"HdrS\x0d\x02"
    assert memory.read(page + 0x210, 2) == b"\xff\x01"  # unknown loader, LOADED_HIGH only
    assert u32(memory, page + 0x23C) == 0  # hardware_subarch
    # The file's own setup_data pointer is gone; ours leads to one item: 32 random bytes for the kernel.
    assert struct.unpack("<Q", memory.read(page + 0x250, 8)) == (layout.SETUP_DATA_START,)
    assert struct.unpack("<QII", memory.read(layout.SETUP_DATA_START, 16)) == (0, 9, 32)
    assert any(memory.read(layout.SETUP_DATA_START + 16, 32))
    assert memory.read(page + 0x1EF, 1) == b"\0"  # the sentinel
    assert memory.read(u32(memory, page + 0x228), 17) == "root=/dev/vda é\0".encode()
    assert u32(memory, page + 0x070) == layout.ACPI_START
    assert memory.read(layout.ACPI_START, 8) == b"RSD PTR "
    address, size = u32(memory, page + 0x218), u32(memory, page + 0x21C)
    assert memory.read(address, size) == ROOT
    assert address % 4096 == 0
    assert 64 * MIB - 4096 < address + size <= 64 * MIB


def test_boot_params_of_a_vmlinux(memory: GuestMemory, load_kernel: Load) -> None:
    load_kernel(elf())
    page = layout.ZERO_PAGE_START
    assert memory.read(page + 0x1FE, 2) == b"\x55\xaa"
    assert memory.read(page + 0x202, 6) == b"HdrS\x0c\x02"
    assert u32(memory, page + 0x228) == layout.CMDLINE_START
    assert memory.read(page + 0x218, 8) == bytes(8)


def test_memory_map(memory: GuestMemory, load_kernel: Load) -> None:
    ranges = e820_map(memory)
    assert [entry for entry in ranges if entry[2] == 1] == [
        (0, 0x9FC00, 1),
        (MIB, 63 * MIB, 1),
        (layout.FOUR_GIB, 2 * MIB, 1),
    ]
    assert (layout.PCI_ECAM_START, MIB, 2) in ranges
    for (address, size, _), (following, _, _) in pairwise(ranges):
        assert address + size <= following
    load_kernel(elf())
    count = memory.read(layout.ZERO_PAGE_START + 0x1E8, 1)[0]
    table = memory.read(layout.ZERO_PAGE_START + 0x2D0, 20 * count)
    assert list(struct.iter_unpack("<QQI", table)) == ranges


def test_initramfs_stays_below_what_the_kernel_allows(memory: GuestMemory, load_kernel: Load) -> None:
    load_kernel(bzimage(gzip.compress(elf()), initrd_addr_max=0x2FFFFFF), initrd=ROOT)
    address, size = struct.unpack("<II", memory.read(layout.ZERO_PAGE_START + 0x218, 8))
    assert 0x3000000 - 4096 < address + size <= 0x3000000
    assert memory.read(address, size) == ROOT


def test_pvh_registers_and_start_info(memory: GuestMemory, load_kernel: Load) -> None:
    state = load_kernel(elf(notes=pvh_note(0x1000080)), initrd=ROOT, cmdline="hello")
    assert (state.rip, state.rbx, state.long_mode) == (0x1000080, layout.PVH_START_INFO_START, False)
    assert (state.cr0 & 0x80000001, state.cr4, state.efer) == (1, 0, 0)
    gdt = struct.unpack("<6Q", memory.read(state.gdt_address, state.gdt_limit + 1))
    assert gdt[2:5] == (0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067)
    magic, version, flags, modules, module_list, cmdline, rsdp, memory_map, count, reserved = struct.unpack(
        "<IIIIQQQQII", memory.read(state.rbx, 56)
    )
    assert (magic, version, flags, modules, reserved) == (0x336EC578, 1, 0, 1, 0)
    assert (memory.read(cmdline, 6), rsdp) == (b"hello\0", layout.ACPI_START)
    address, size, module_cmdline, _ = struct.unpack("<QQQQ", memory.read(module_list, 32))
    assert (memory.read(address, size), module_cmdline) == (ROOT, 0)
    entries = list(struct.iter_unpack("<QQII", memory.read(memory_map, 24 * count)))
    assert entries == [(*entry, 0) for entry in e820_map(memory)]


@pytest.mark.parametrize(
    ("kernel", "entry", "long_mode"),
    [
        (bzimage(gzip.compress(elf(notes=pvh_note(0x1000000)))), "auto", True),
        (elf(notes=LINUX_NOTE + pvh_note(0x1000000)), "auto", True),
        (elf(notes=pvh_note(0x1000000)), "auto", False),
        (elf(), "auto", True),
        (elf(notes=pvh_note(0x1000000)), "linux64", True),
        (bzimage(gzip.compress(elf(notes=pvh_note(0x1000000)))), "pvh", False),
    ],
)
def test_way_in(load_kernel: Load, kernel: bytes, entry: str, long_mode: bool) -> None:
    assert load_kernel(kernel, entry=entry).long_mode is long_mode


def test_refusals(load_kernel: Load) -> None:
    for kernel, options, message, code in (
        (b"", {}, "not a kernel", EXIT_IMAGE),
        (b"MZ" + bytes(5000), {}, "not a kernel", EXIT_IMAGE),
        (elf(), {"entry": "pvh"}, "has no PVH entry", EXIT_IMAGE),
        (elf(), {"entry": "bios"}, "give one of", EXIT_USAGE),
        (elf(), {"cmdline": "x" * 2048}, "at most 2047", EXIT_USAGE),
        (elf(), {"cmdline": "a\0b"}, "zero byte", EXIT_USAGE),
        (bzimage(gzip.compress(elf()), cmdline_size=100), {"cmdline": "x" * 101}, "at most 100", EXIT_USAGE),
        (elf([(0x1000000, b"", 49 * MIB)]), {}, "needs at least 65 MiB", EXIT_IMAGE),
        (elf([(0x1000000, b"", 48 * MIB)]), {"initrd": ROOT}, "does not fit", EXIT_IMAGE),
        (elf([(0x1000000, b"", 48 * MIB - 4096)]), {"initrd": ROOT}, "does not fit", EXIT_IMAGE),
        (elf(), {"initrd": b"no archive"}, "not an initramfs", EXIT_IMAGE),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_kernel(kernel, **options)
        assert caught.value.code == code


def test_descriptors() -> None:
    assert flat_code(8, long_mode=False).descriptor() == 0x00CF9B000000FFFF
    assert flat_data(8).descriptor() == 0x00CF93000000FFFF
    assert task_state(8).descriptor() == 0x00008B0000000067
