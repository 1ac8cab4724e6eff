"""Kernel files: ELF and bzImage, in every compression, damaged, hostile, too large."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.memory import GuestMemory, MemoryRegion
from tests.unit.boot_images import COMPRESSORS, LINUX_NOTE, bzimage, elf, note, pvh_note
from vmrun.boot.bzimage import extract_kernel, is_bzimage, read_setup_header
from vmrun.boot.elf import ElfKernel, read_elf
from vmrun.boot.image import FileImage, MemoryImage
from vmrun.errors import EXIT_IMAGE, UserError

MIB = 1 << 20
HOLE = 0xC0000000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 32 * MIB)
    memory = GuestMemory([MemoryRegion(0, 32 * MIB, fd, 0)])
    yield memory
    memory.close()
    os.close(fd)


def parse(data: bytes) -> ElfKernel:
    return read_elf(MemoryImage("kernel test", data), ram_limit=HOLE)


def test_elf_segments_entry_and_notes() -> None:
    segments = [(0x1200000, b"data", 0x2000), (0x1000000, b"text" * 10, 0x1000), (0x1300000, b"", 0)]
    kernel = parse(
        elf(segments, entry=0x1000010, notes=note(b"GNU\0", 3, b"id") + LINUX_NOTE + pvh_note(0x1000020))
    )
    assert [segment.address for segment in kernel.segments] == [0x1000000, 0x1200000]
    assert (kernel.entry, kernel.pvh_entry, kernel.is_linux, kernel.end) == (
        0x1000010,
        0x1000020,
        True,
        0x1202000,
    )


def test_elf_virtual_entry_is_made_physical() -> None:
    assert parse(elf(entry=0xFFFFFFFF81000123)).entry == 0x1000123


def test_elf_pvh_note_of_four_bytes() -> None:
    kernel = parse(elf(notes=note(b"Xen\0", 18, struct.pack("<I", 0x1000040))))
    assert (kernel.pvh_entry, kernel.is_linux) == (0x1000040, False)


def test_elf_load(memory: GuestMemory) -> None:
    parse(elf([(0x100000, b"low", 0x1000), (0x1FFF000, b"z" * 0x1000, 0x1000)], entry=0x100000)).load(memory)
    assert memory.read(0x100000, 5) == b"low\0\0"
    assert memory.read(0x1FFF000, 0x1000) == b"z" * 0x1000


@pytest.mark.parametrize("address", [0x1FFF000, 0x2000000, 0x6400000])
def test_elf_says_how_much_memory_it_needs(memory: GuestMemory, address: int) -> None:
    needed = (address + 0x2000 + MIB - 1) // MIB
    with pytest.raises(UserError, match=f"needs at least {needed} MiB") as caught:
        parse(elf([(address, b"z", 0x2000)], entry=address)).load(memory)
    assert caught.value.code == EXIT_IMAGE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x7fELF", "not an ELF"),
        (elf(elf_class=1), "not an x86-64 kernel"),
        (elf(machine=183), "not an x86-64 kernel"),
        (elf(kind=1), "not an executable"),
        (elf([]), "damaged ELF header"),
        (elf([(0x1000000, b"", 0)]), "without a segment"),
        (elf()[:-1], "truncated"),
        (elf()[:100], "truncated"),
        (elf([(0x1000, b"x", 1)], entry=0x1000), "wants to be loaded at 0x1000-"),
        (elf([(HOLE - 0x1000, b"x", 0x1001)], entry=HOLE - 0x1000), "wants to be loaded"),
        (elf([((1 << 64) - 1, b"x", 1 << 63)], entry=0), "damaged ELF segment"),
        (elf([(0x1000000, b"xxxx", 2)]), "damaged ELF segment"),
        (elf([(0x1000000, b"x", 0x2000), (0x1001000, b"x", 0x1000)]), "overlap at 0x1001000"),
        (elf(entry=0x5000000), "entry 0x5000000 is in none"),
        (elf(notes=pvh_note(0x10)), "PVH entry 0x10 is in none"),
    ],
)
def test_elf_refusals(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(data)
    assert caught.value.code == EXIT_IMAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", COMPRESSORS)
@pytest.mark.parametrize("appended_length", [True, False])
def test_bzimage_in_each_compression(method: str, appended_length: bool) -> None:
    kernel = elf(notes=LINUX_NOTE) + b"relocations" * 9
    payload = COMPRESSORS[method](kernel)
    if appended_length:
        payload += struct.pack("<I", len(kernel))
    image = MemoryImage("kernel test", bzimage(payload))
    assert is_bzimage(image.read(0, 0x206))
    inner = extract_kernel(image, read_setup_header(image))
    assert inner.read(0, inner.size) == kernel
    assert read_elf(inner, ram_limit=HOLE).is_linux


def test_bzimage_with_a_plain_payload() -> None:
    image = MemoryImage("kernel test", bzimage(elf()))
    assert extract_kernel(image, read_setup_header(image)).read(0, 1 << 20) == elf()


def test_setup_header_fields() -> None:
    data = bzimage(b"payload", cmdline_size=4096, initrd_addr_max=0x37FFFFFF, setup_sectors=27)
    header = read_setup_header(MemoryImage("kernel test", data))
    assert (header.version, header.cmdline_size, header.initrd_addr_max) == (0x20F, 4096, 0x37FFFFFF)
    assert data[header.payload_offset :] == b"payload"
    assert header.payload_length == 7
    assert header.raw == data[0x1F1:0x26C]


PACKED = COMPRESSORS["gzip"](elf())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bzimage(PACKED)[:0x220], "not a bzImage"),
        (bzimage(PACKED)[:-1], "damaged or truncated bzImage"),
        (bzimage(PACKED, payload_length=0), "damaged or truncated bzImage"),
        (bzimage(PACKED, payload_length=0xFFFFFFFF), "damaged or truncated bzImage"),
        (bzimage(PACKED, version=0x207), "boot protocol 2.07 is too old"),
        (bzimage(PACKED, loadflags=0), "zImage"),
        (bzimage(PACKED)[:0x201] + b"\xff" + bzimage(PACKED)[0x202:], "damaged setup header"),
        (bzimage(PACKED)[:0x201] + b"\x10" + bzimage(PACKED)[0x202:], "damaged setup header"),
        (bzimage(PACKED[:-30]), "damaged gzip payload"),
        (bzimage(b"\x89LZO" + PACKED), "lzo compression is not supported"),
        (bzimage(b"not compressed"), "compressed in no way known"),
    ],
)
def test_bzimage_refusals(data: bytes, message: str) -> None:
    image = MemoryImage("kernel test", data)
    with pytest.raises(UserError, match=message) as caught:
        extract_kernel(image, read_setup_header(image))
    assert caught.value.code == EXIT_IMAGE


def test_bzimage_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmrun.boot.bzimage._KERNEL_LIMIT", MIB)
    image = MemoryImage("kernel test", bzimage(COMPRESSORS["zstd"](bytes(MIB + 1))))
    with pytest.raises(UserError, match="inflates to more than 1 MiB"):
        extract_kernel(image, read_setup_header(image))


GOOD_ELF = elf(
    [(0x1000000, b"text", 0x1000), (0x1200000, b"data", 0x2000)], notes=LINUX_NOTE + pvh_note(0x1000000)
)
INTERESTING = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)


@given(st.lists(st.tuples(st.integers(4, len(GOOD_ELF) - 1), INTERESTING), min_size=1, max_size=12))
def test_damaged_elf_is_refused_or_sound(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD_ELF)
    for offset, value in changes:
        data[offset] = value
    try:
        kernel = parse(bytes(data))
    except UserError as error:
        assert error.code == EXIT_IMAGE
        return
    end = MIB
    for segment in kernel.segments:
        assert end <= segment.address < segment.address + segment.memory_size <= HOLE
        assert segment.file_size <= segment.memory_size
        assert segment.offset + segment.file_size <= len(data)
        end = segment.address + segment.memory_size
    for entry in (kernel.entry, kernel.pvh_entry):
        assert entry is None or MIB <= entry < end


@given(st.lists(st.tuples(st.integers(0x1F1, 0x26C), INTERESTING), min_size=1, max_size=8))
def test_damaged_bzimage_is_refused_or_sound(changes: list[tuple[int, int]]) -> None:
    data = bytearray(bzimage(PACKED))
    for offset, value in changes:
        data[offset] = value
    image = MemoryImage("kernel test", bytes(data))
    try:
        header = read_setup_header(image)
        extract_kernel(image, header)
    except UserError as error:
        assert error.code == EXIT_IMAGE
    else:
        assert header.payload_offset + header.payload_length <= image.size
        assert 0x1F1 + len(header.raw) <= 0x290


def test_file_image_refusals(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            FileImage(path, "kernel")
        assert caught.value.code == EXIT_IMAGE


def test_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"x" * 5000)
    with FileImage(path, "kernel") as image:
        os.truncate(path, 100)
        with pytest.raises(UserError, match="ends 4900 bytes too early"):
            image.read_into(0, memoryview(bytearray(5000)))
