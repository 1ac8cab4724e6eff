"""ELF64 kernels (vmlinux, or what a bzImage holds): where their parts go in guest memory, and their
entries. VMM process.

A reader of our own: a kernel needs the ELF header, the program headers and one kind of note, every field of
which is checked here before it is believed. Segments go to their physical addresses (p_paddr); a
relocatable Linux runs there as linked, so nothing is relocated.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise

from devices.memory import GuestMemory
from vmrun.boot.image import Image
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.layout import HIGH_RAM_START

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_NOTE_HEADER = struct.Struct("<III")
_ELFCLASS64, _ELFDATA2LSB = 2, 1
_ET_EXEC, _ET_DYN = 2, 3
_EM_X86_64 = 62
_PT_LOAD, _PT_NOTE = 1, 4
_MOST_PROGRAM_HEADERS = 128
_MOST_NOTE_BYTES = 1 << 16
_ADDRESS_LIMIT = 1 << 52
_MIB = 1 << 20

XEN_ELFNOTE_PHYS32_ENTRY = 18  # include/xen/interface/elfnote.h


@dataclass(frozen=True, slots=True)
class Segment:
    """`file_size` bytes at `offset` of the image go to guest-physical `address`; zeroes follow up to
    `memory_size`.
    """

    address: int
    virtual_address: int
    offset: int
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class ElfKernel:
    """An ELF file that was found fit to be loaded."""

    image: Image
    segments: tuple[Segment, ...]  # by physical address, not overlapping, none of them empty
    entry: int  # guest-physical address of the 64-bit entry
    pvh_entry: int | None  # guest-physical address of the 32-bit PVH entry
    is_linux: bool  # it carries a note of Linux's own, as every vmlinux since 4.18 does

    @property
    def end(self) -> int:
        """The first guest-physical address behind the kernel and its bss."""
        return self.segments[-1].address + self.segments[-1].memory_size

    def load(self, memory: GuestMemory) -> None:
        """Put all segments into `memory`, which must be fresh: what the file does not hold stays zero.

        Raises UserError when they do not fit, with the MiB that would.
        """
        for segment in self.segments:
            if ram_end(memory, segment.address) < segment.address + segment.memory_size:
                raise UserError(
                    f"{self.image.name}: needs at least {-(-self.end // _MIB)} MiB of memory; "
                    "give --mem more",
                    EXIT_IMAGE,
                )
            view = memory.view(segment.address, segment.file_size)
            self.image.read_into(segment.offset, view)


def ram_end(memory: GuestMemory, address: int) -> int:
    """Where the RAM that holds `address` ends; 0 when there is none."""
    for region in memory.regions:
        if region.gpa <= address < region.gpa + region.size:
            return region.gpa + region.size
    return 0


def read_elf(image: Image, *, ram_limit: int) -> ElfKernel:
    """Parse and check. `ram_limit` is where RAM must end at the latest (the PCI hole). UserError
    (EXIT_IMAGE).
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{image.name}: {reason}", EXIT_IMAGE)

    header = image.read(0, _ELF_HEADER.size)
    if len(header) < _ELF_HEADER.size or header[:4] != b"\x7fELF":
        raise refuse("not an ELF kernel")
    (ident, kind, machine, _, entry, table, _, _, _, entry_size, count, _, _, _) = _ELF_HEADER.unpack(header)
    if ident[4] != _ELFCLASS64 or ident[5] != _ELFDATA2LSB or machine != _EM_X86_64:
        raise refuse("not an x86-64 kernel")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise refuse("an ELF file, but not an executable one")
    if entry_size != _PROGRAM_HEADER.size or not 1 <= count <= _MOST_PROGRAM_HEADERS:
        raise refuse(f"damaged ELF header ({count} program headers of {entry_size} bytes)")
    if table + count * entry_size > image.size:
        raise refuse("truncated ELF file (its program headers lie behind its end)")
    segments: list[Segment] = []
    pvh_entry: int | None = None
    is_linux = False
    for fields in _PROGRAM_HEADER.iter_unpack(image.read(table, count * entry_size)):
        (p_type, _, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, _) = fields
        if p_type not in (_PT_LOAD, _PT_NOTE):
            continue
        if p_offset + p_filesz > image.size:
            raise refuse(f"truncated ELF file (a segment ends at {p_offset + p_filesz:#x})")
        if p_type == _PT_LOAD and p_memsz:
            if p_filesz > p_memsz or p_paddr + p_memsz > _ADDRESS_LIMIT:
                raise refuse(f"damaged ELF segment at {p_paddr:#x}")
            if p_paddr < HIGH_RAM_START or p_paddr + p_memsz > ram_limit:
                raise refuse(
                    f"wants to be loaded at {p_paddr:#x}-{p_paddr + p_memsz - 1:#x}; "
                    f"RAM for kernels is {HIGH_RAM_START:#x}-{ram_limit - 1:#x}"
                )
            segments.append(Segment(p_paddr, p_vaddr, p_offset, p_filesz, p_memsz))
        elif p_type == _PT_NOTE and p_filesz <= _MOST_NOTE_BYTES:
            for name, note_type, description in _notes(image.read(p_offset, p_filesz)):
                if name == b"Linux\0":
                    is_linux = True
                elif (
                    name == b"Xen\0" and note_type == XEN_ELFNOTE_PHYS32_ENTRY and len(description) in (4, 8)
                ):
                    pvh_entry = int.from_bytes(description, "little")
    segments.sort(key=lambda segment: segment.address)
    if not segments:
        raise refuse("an ELF file without a segment to load")
    for lower, upper in pairwise(segments):
        if lower.address + lower.memory_size > upper.address:
            raise refuse(f"ELF segments overlap at {upper.address:#x}")
    physical_entry = _physical(segments, entry)
    if physical_entry is None:
        raise refuse(f"ELF entry {entry:#x} is in none of its segments")
    if pvh_entry is not None and not _holds(segments, pvh_entry):
        raise refuse(f"PVH entry {pvh_entry:#x} is in none of its segments")
    return ElfKernel(image, tuple(segments), physical_entry, pvh_entry, is_linux)


def _notes(data: bytes) -> list[tuple[bytes, int, bytes]]:
    """Name, type and description of every note; names and descriptions are padded to 4 bytes. Stops at
    nonsense.
    """
    notes = []
    position = 0
    while position + _NOTE_HEADER.size <= len(data):
        name_size, description_size, note_type = _NOTE_HEADER.unpack_from(data, position)
        name_start = position + _NOTE_HEADER.size
        description_start = name_start + (name_size + 3 & ~3)
        position = description_start + (description_size + 3 & ~3)
        if description_start + description_size > len(data):
            break
        name = data[name_start : name_start + name_size]
        notes.append((name, note_type, data[description_start : description_start + description_size]))
    return notes


def _holds(segments: list[Segment], address: int) -> bool:
    return any(segment.address <= address < segment.address + segment.memory_size for segment in segments)


def _physical(segments: list[Segment], entry: int) -> int | None:
    """Linux states its entry as a physical address, other kernels as a virtual one."""
    if _holds(segments, entry):
        return entry
    for segment in segments:
        if segment.virtual_address <= entry < segment.virtual_address + segment.memory_size:
            return segment.address + entry - segment.virtual_address
    return None
