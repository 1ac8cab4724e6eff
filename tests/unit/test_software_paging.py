"""Page walks over tables made here: where they lead, what they mark, and how they fault."""

import struct

import pytest

from vmrun.kvm.software.paging import (
    ACCESSED,
    CR0_WP,
    CR4_LA57,
    DIRTY,
    FAULT_PRESENT,
    FAULT_WRITE,
    LARGE,
    PRESENT,
    USER,
    WRITABLE,
    LinearMemory,
    NotCanonical,
    PageFault,
    translate,
)

RAM_SIZE = 1 << 20
ROOT = 0x1000
FULL = PRESENT | WRITABLE | USER
NO_EXECUTE = 1 << 63


class Tables:
    """RAM with page tables that grow as pages are mapped. Tables come from 0x1000 on, pages from 0x80000."""

    def __init__(self, levels: int = 4) -> None:
        self.ram = bytearray(RAM_SIZE)
        self.levels = levels
        self.next = ROOT + 0x1000
        self.cr4 = CR4_LA57 if levels == 5 else 0

    def view(self, gpa: int, size: int) -> memoryview | None:
        return memoryview(self.ram)[gpa : gpa + size] if gpa >= 0 and gpa + size <= RAM_SIZE else None

    def entry_at(self, linear: int, level: int) -> int:
        """Where the entry of `level` (1 is the last) for `linear` is; makes the tables above it."""
        table = ROOT
        for above in range(self.levels, level, -1):
            at = table + (linear >> 12 + 9 * (above - 1) & 0x1FF) * 8
            (entry,) = struct.unpack_from("<Q", self.ram, at)
            if not entry:
                entry = self.next | FULL
                self.next += 0x1000
                struct.pack_into("<Q", self.ram, at, entry)
            table = entry & 0xF_FFFF_FFFF_F000
        return table + (linear >> 12 + 9 * (level - 1) & 0x1FF) * 8

    def map(self, linear: int, gpa: int, flags: int = FULL, level: int = 1) -> int:
        at = self.entry_at(linear, level)
        struct.pack_into("<Q", self.ram, at, gpa | flags | (LARGE if level > 1 else 0))
        return at

    def entry(self, at: int) -> int:
        return int(struct.unpack_from("<Q", self.ram, at)[0])

    def walk(self, linear: int, *, write: bool = False, cr0: int = CR0_WP) -> int:
        return translate(self.view, cr0, ROOT, self.cr4, linear, write=write)

    def memory(self, cr0: int = CR0_WP) -> LinearMemory:
        return LinearMemory(self.view, cr0, ROOT, self.cr4)


@pytest.mark.parametrize(
    ("levels", "linear"),
    [
        (4, 0x0000_0000_0000_0000),
        (4, 0x0000_7FFF_FFFF_F000),
        (4, 0xFFFF_8880_1234_5000),
        (4, 0xFFFF_FFFF_8140_0000),
        (5, 0x0000_7FFF_FFFF_F000),
        (5, 0x00AB_CDEF_1234_5000),
        (5, 0xFF11_0000_0000_0000),
    ],
)
def test_small_pages(levels: int, linear: int) -> None:
    tables = Tables(levels)
    tables.map(linear, 0x80000, FULL | NO_EXECUTE)
    assert tables.walk(linear + 0x123) == 0x80123


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("level", "size"), [(2, 2 << 20), (3, 1 << 30)])
def test_large_pages(levels: int, level: int, size: int) -> None:
    tables = Tables(levels)
    linear = 0xFFFF_8880_0000_0000 + 5 * size
    pat = 1 << 12  # in a large page's entry this bit is not an address bit
    tables.map(linear, 7 * size, FULL | pat, level)
    assert tables.walk(linear + size - 1) == 7 * size + size - 1


def test_accessed_and_dirty() -> None:
    tables = Tables()
    linear = 0x12345000
    at = tables.map(linear, 0x80000)
    above = [tables.entry_at(linear, level) for level in (2, 3, 4)]
    tables.walk(linear)
    assert tables.entry(at) & (ACCESSED | DIRTY) == ACCESSED
    tables.walk(linear, write=True)
    assert tables.entry(at) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert all(tables.entry(entry) & (ACCESSED | DIRTY) == ACCESSED for entry in above)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("write", [False, True])
def test_missing(level: int, write: bool) -> None:
    tables = Tables()
    tables.map(0x12345000, 0x80000)
    at = tables.entry_at(0x12345000, level)
    struct.pack_into("<Q", tables.ram, at, tables.entry(at) & ~PRESENT)
    with pytest.raises(PageFault) as caught:
        tables.walk(0x12345678, write=write)
    assert (caught.value.address, caught.value.error_code) == (0x12345678, FAULT_WRITE if write else 0)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_write_protection_counts_at_every_level(level: int) -> None:
    tables = Tables()
    leaf = tables.map(0x12345000, 0x80000)
    at = tables.entry_at(0x12345000, level)
    struct.pack_into("<Q", tables.ram, at, tables.entry(at) & ~WRITABLE)
    with pytest.raises(PageFault) as caught:
        tables.walk(0x12345678, write=True)
    assert caught.value.error_code == FAULT_PRESENT | FAULT_WRITE
    assert not tables.entry(leaf) & DIRTY
    assert tables.walk(0x12345678) == 0x80678
    assert tables.walk(0x12345678, write=True, cr0=0) == 0x80678


def test_tables_outside_ram() -> None:
    tables = Tables()
    at = tables.entry_at(0x12345000, 3)
    struct.pack_into("<Q", tables.ram, at, 0xF_FFFF_FFFF_F000 | FULL)
    with pytest.raises(PageFault):
        tables.walk(0x12345000)
    with pytest.raises(PageFault):
        translate(tables.view, CR0_WP, 0xF_FFFF_FFFF_F000, 0, 0, write=False)


def test_tables_that_point_at_themselves() -> None:
    tables = Tables()
    struct.pack_into("<Q", tables.ram, ROOT, ROOT | FULL)
    assert tables.walk(0x123) == ROOT + 0x123


def test_access_across_pages() -> None:
    tables = Tables()
    tables.map(0x5000, 0x81000)
    tables.map(0x6000, 0x80000)
    tables.memory().write(0x5FFD, b"abcdef")
    assert tables.ram[0x81FFD:0x82000] == b"abc"
    assert tables.ram[0x80000:0x80003] == b"def"
    assert tables.memory().read(0x5FFD, 6) == b"abcdef"


def test_a_write_is_all_or_nothing() -> None:
    tables = Tables()
    tables.map(0x5000, 0x81000)
    tables.map(0x6000, 0x80000, PRESENT)
    with pytest.raises(PageFault) as caught:
        tables.memory().write(0x5FFD, b"abcdef")
    assert caught.value.address == 0x6000
    assert not any(tables.ram[0x80000:])


def test_a_page_that_is_no_ram() -> None:
    tables = Tables()
    tables.map(0x5000, 0xFEE00000)
    with pytest.raises(PageFault):
        tables.memory().read(0x5000, 8)


@pytest.mark.parametrize(
    ("levels", "address"),
    [
        (4, 0x0000_8000_0000_0000),
        (4, 0x8000_0000_0000_0000),
        (4, 0xFFFF_7FFF_FFFF_FFF8),
        (5, 0x0100_0000_0000_0000),
    ],
)
def test_not_canonical(levels: int, address: int) -> None:
    with pytest.raises(NotCanonical):
        Tables(levels).memory().read(address, 8)


@pytest.mark.parametrize("page", [0x0000_7FFF_FFFF_F000, 0xFFFF_FFFF_FFFF_F000])
def test_runs_off_the_end_of_the_addresses(page: int) -> None:
    tables = Tables()
    tables.map(page, 0x80000)
    tables.map(0, 0x81000)
    assert tables.memory().read(page + 0xFF8, 8) == bytes(8)
    with pytest.raises(NotCanonical):
        tables.memory().read(page + 0xFFC, 8)
