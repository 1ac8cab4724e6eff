"""What firmware reads of the machine: fw_cfg, the debug console, and the files made of a configuration."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.memory import GuestMemory
from devices.platform.debug_console import LINE_SIZE, DebugConsole
from devices.platform.fw_cfg import (
    FILE_DIRECTORY,
    FIRST_FILE,
    ID,
    MAX_CPUS,
    NAME_SIZE,
    NB_CPUS,
    SIGNATURE,
    FwCfg,
)
from vmrun.boot import firmware
from vmrun.boot.e820 import E820_RAM, E820_RESERVED
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.machine.layout import FOUR_GIB, HIGH_RAM_START, PCI_ECAM_SIZE, PCI_ECAM_START
from vmrun.machine.memory import Ram

MIB = 1 << 20
ROM = b"\x55\xaa\x02" + bytes(1021)


def read_item(config: FwCfg, number: int, size: int) -> bytes:
    config.write(0, 2, number)
    return bytes(config.read(1, 1) for _ in range(size))


def read_files(config: FwCfg) -> dict[str, bytes]:
    (count,) = struct.unpack(">I", read_item(config, FILE_DIRECTORY, 4))
    entries = struct.iter_unpack(">IHH56s", read_item(config, FILE_DIRECTORY, 4 + 64 * count)[4:])
    return {
        name.rstrip(b"\0").decode(): read_item(config, number, size) for size, number, zero, name in entries
    }


def test_items() -> None:
    config = FwCfg({"b": b"two", "a": b"one"}, {MAX_CPUS: b"\x05\x00"})
    assert read_item(config, SIGNATURE, 6) == b"QEMU\0\0"
    assert read_item(config, ID, 4) == b"\x01\0\0\0"
    assert read_item(config, MAX_CPUS, 2) == b"\x05\0"
    assert read_item(config, 0x8000, 4) == bytes(4)
    assert read_files(config) == {"a": b"one", "b": b"two"}
    assert read_item(config, FIRST_FILE, 4) == b"one\0"


def test_a_file_name_fits_its_field() -> None:
    assert read_files(FwCfg({"x" * NAME_SIZE: b""}, {})) == {"x" * NAME_SIZE: b""}
    with pytest.raises(ValueError, match="longer than"):
        FwCfg({"x" * (NAME_SIZE + 1): b""}, {})


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 8), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)
        )
    )
)
def test_no_access_does_harm(accesses: list[tuple[bool, int, int, int]]) -> None:
    lines: list[str] = []
    for device in (FwCfg({"a": b"one"}, {}), DebugConsole(lines.append)):
        for write, offset, size, value in accesses:
            if write:
                device.write(offset, size, value)
            else:
                assert 0 <= device.read(offset, size) < 1 << 8 * size
    assert all(line.isprintable() for line in lines)


def test_the_debug_console_gives_lines() -> None:
    lines: list[str] = []
    console = DebugConsole(lines.append)
    assert console.read(0, 1) == 0xE9
    for byte in b"one\r\n\x1b[2J\xff\n" + b"x" * (LINE_SIZE + 1):
        console.write(0, 1, byte)
    assert lines == ["one", "?[2J?", "x" * LINE_SIZE]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bios.bin"
    path.write_bytes(bytes(range(256)) * 512)
    return path


def load(memory: GuestMemory, image: Path, rom: Path | None = None) -> firmware.Firmware:
    return firmware.load(memory, image, cpus=3, roms=[(0x1AF4, 0x1000, rom)] if rom else [])


def test_load(image: Path, tmp_path: Path) -> None:
    rom = tmp_path / "x.rom"
    rom.write_bytes(ROM)
    with Ram(64 * MIB) as ram:
        loaded = load(ram.memory, image, rom)
        assert loaded.image == image.read_bytes()
        assert ram.memory.read(HIGH_RAM_START - len(loaded.image), len(loaded.image)) == loaded.image
        assert loaded.ram_end == 64 * MIB - 64 * 1024
        files = read_files(loaded.config)
        assert [read_item(loaded.config, number, 2) for number in (NB_CPUS, MAX_CPUS)] == [b"\x03\0"] * 2
        assert files["pci1af4,1000.rom"] == ROM
        rsdp = files["etc/acpi/rsdp"]
        assert rsdp[:8] == b"RSD PTR " and sum(rsdp) & 0xFF == 0
        (rsdt,) = struct.unpack_from("<I", rsdp, 16)
        assert loaded.ram_end <= rsdt < 64 * MIB
        assert ram.memory.read(rsdt, 4) == b"RSDT"
        loader = files["etc/table-loader"]
        assert len(loader) == 128 and loader[4:].startswith(b"etc/acpi/rsdp\0")
        assert list(struct.iter_unpack("<QQI", files["etc/e820"]))[:3] == [
            (0, loaded.ram_end, E820_RAM),
            (loaded.ram_end, 64 * 1024, E820_RESERVED),
            (PCI_ECAM_START, PCI_ECAM_SIZE, E820_RESERVED),
        ]


def test_memory_above_4_gib(image: Path) -> None:
    with Ram(FOUR_GIB) as ram:
        entries = list(struct.iter_unpack("<QQI", read_files(load(ram.memory, image).config)["etc/e820"]))
    assert entries[0] == (0, 0xC0000000 - 64 * 1024, E820_RAM)
    assert entries[-1] == (FOUR_GIB, FOUR_GIB - 0xC0000000, E820_RAM)


@pytest.mark.parametrize("size", [0, 4096, 65537, 2 * MIB])
def test_images_that_cannot_be(tmp_path: Path, size: int) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(bytes(size))
    with Ram(16 * MIB) as ram, pytest.raises(UserError, match="64 KiB") as raised:
        load(ram.memory, path)
    assert raised.value.code == EXIT_IMAGE


@pytest.mark.parametrize(
    "rom", [b"", b"\x55", b"\x55\xaa\x00", b"\x55\xaa\x10" + bytes(64), b"MZ" * 512, ROM * 129]
)
def test_option_roms_that_cannot_be(image: Path, tmp_path: Path, rom: bytes) -> None:
    path = tmp_path / "bad.rom"
    path.write_bytes(rom)
    with Ram(16 * MIB) as ram, pytest.raises(UserError, match="ROM"):
        load(ram.memory, image, path)
