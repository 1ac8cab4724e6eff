"""Hand-made kernels and archives for the boot tests."""

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

import lz4.block
import zstandard

LZ4_BLOCK = 8 << 20

PT_LOAD, PT_NOTE = 1, 4


def lz4_legacy(data: bytes) -> bytes:
    """What `lz4 -l` writes."""
    frame = bytearray(b"\x02\x21\x4c\x18")
    for start in range(0, len(data), LZ4_BLOCK):
        block = lz4.block.compress(data[start : start + LZ4_BLOCK], store_size=False)
        frame += struct.pack("<I", len(block)) + block
    return bytes(frame)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "zstd": zstandard.ZstdCompressor().compress,
}


def cpio(files: dict[str, bytes]) -> bytes:
    """A newc archive, padded to four bytes as the format demands."""
    archive = bytearray()
    for name, data in [*files.items(), ("TRAILER!!!", b"")]:
        fields = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += b"\0" * (-len(archive) % 4) + data
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def note(name: bytes, note_type: int, description: bytes) -> bytes:
    padded_name, padded_description = (part + b"\0" * (-len(part) % 4) for part in (name, description))
    return struct.pack("<III", len(name), len(description), note_type) + padded_name + padded_description


def pvh_note(entry: int) -> bytes:
    return note(b"Xen\0", 18, struct.pack("<Q", entry))


LINUX_NOTE = note(b"Linux\0", 0x100, b"salt\0")


def elf(
    segments: list[tuple[int, bytes, int]] | None = None,
    *,
    entry: int = 0x1000000,
    notes: bytes = b"",
    machine: int = 62,
    kind: int = 2,
    elf_class: int = 2,
) -> bytes:
    """`segments` are (physical address, contents, memory size), linked 0xffffffff80000000 above that."""
    if segments is None:
        segments = [(0x1000000, b"\xf4" * 300, 0x3000)]
    programs = [(PT_LOAD, address, data, size) for address, data, size in segments]
    if notes:
        programs.append((PT_NOTE, 0, notes, len(notes)))
    table, body = bytearray(), bytearray()
    start = 64 + 56 * len(programs)
    for kind_of_program, address, data, size in programs:
        virtual = address + 0xFFFFFFFF80000000 & (1 << 64) - 1
        table += struct.pack(
            "<IIQQQQQQ", kind_of_program, 7, start + len(body), virtual, address, len(data), size, 0x1000
        )
        body += data
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH",
        *(b"\x7fELF", elf_class, 1, 1, 0, kind, machine, 1, entry, 64, 0, 0, 64, 56, len(programs), 64, 0, 0),
    )
    return bytes(header + table + body)


def bzimage(
    payload: bytes,
    *,
    version: int = 0x20F,
    loadflags: int = 1,
    setup_sectors: int = 2,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFFFFFF,
    payload_length: int | None = None,
) -> bytes:
    """A setup header of 0x26c bytes, then 0x40 bytes of protected-mode code, then `payload`."""
    setup = bytearray(512 * (setup_sectors + 1))
    setup[0x1F1] = setup_sectors
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x200:0x202] = bytes((0xEB, 0x26C - 0x202))
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = loadflags
    struct.pack_into("<I", setup, 0x22C, initrd_addr_max)
    struct.pack_into("<I", setup, 0x230, 0x200000)
    struct.pack_into("<I", setup, 0x238, cmdline_size)
    struct.pack_into("<I", setup, 0x23C, 2)  # hardware_subarch: nothing a file may choose
    length = len(payload) if payload_length is None else payload_length
    struct.pack_into("<II", setup, 0x248, 0x40, length)
    struct.pack_into("<Q", setup, 0x250, 0x12345)  # setup_data: likewise
    return bytes(setup) + bytes(0x40) + payload
