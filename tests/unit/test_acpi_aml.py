"""The AML encoder against encodings written out by hand from the specification."""

import pytest

from vmrun.boot import aml


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x10000, "0c00000100"),
        (0xFFFFFFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integer(value: int, encoding: str) -> None:
    assert aml.integer(value) == bytes.fromhex(encoding)


@pytest.mark.parametrize(
    ("path", "encoding"),
    [
        ("_HID", b"_HID"),
        ("\\_S5", b"\\_S5_"),
        ("_SB.PCI0", b"\x2e_SB_PCI0"),
        ("\\_SB.PCI0.COM1", b"\\\x2f\x03_SB_PCI0COM1"),
    ],
)
def test_name_string(path: str, encoding: bytes) -> None:
    assert aml.name_string(path) == encoding


@pytest.mark.parametrize("path", ["", "TOOLONG", "lowr", "1ABC", "A.", "A-B", "É"])
def test_bad_names(path: str) -> None:
    with pytest.raises(ValueError, match="no ACPI name"):
        aml.name_string(path)


@pytest.mark.parametrize(
    ("size", "length"),
    [(0, "05"), (58, "3f"), (59, "4104"), (4089, "4fff"), (4090, "810001"), (70000, "871711")],
)
def test_package_length_counts_itself(size: int, length: str) -> None:
    # A scope: its length, four bytes of name, `size` bytes of terms.
    assert aml.scope("ABCD", b"x" * size) == b"\x10" + bytes.fromhex(length) + b"ABCD" + b"x" * size


def test_terms() -> None:
    assert aml.name("_UID", aml.integer(1)) == b"\x08_UID\x01"
    assert aml.package(aml.integer(5), aml.integer(0)) == b"\x12\x05\x02\x0a\x05\x00"
    assert aml.buffer(b"ab") == b"\x11\x05\x0a\x02ab"
    assert aml.device("COM1", b"\x00") == b"\x5b\x82\x06COM1\x00"
    assert aml.eisa_id("PNP0A03") == bytes.fromhex("0c41d00a03")
    for bad in ("pnp0a03", "PNP0A0", "PNP0A030"):
        with pytest.raises(ValueError, match="EISA"):
            aml.eisa_id(bad)
    with pytest.raises(ValueError, match="256 elements"):
        aml.package(*[b"\0"] * 256)
    with pytest.raises(ValueError, match="AML integer"):
        aml.integer(-1)


def test_resources() -> None:
    assert aml.io_ports(0x3F8, 8) == bytes.fromhex("47 01 f803 f803 01 08")
    assert aml.isa_irq(4) == bytes.fromhex("22 1000")
    assert aml.fixed_memory(0xE0000000, 0x100000) == bytes.fromhex("86 0900 01 000000e0 00001000")
    assert aml.bus_numbers(0, 0) == bytes.fromhex("88 0d00 02 0c 00 0000 0000 0000 0000 0100")
    assert aml.io_window(0xC000, 0xFFFF) == bytes.fromhex("88 0d00 01 0c 03 0000 00c0 ffff 0000 0040")
    assert aml.memory_window(0xC0000000, 0xDFFFFFFF) == bytes.fromhex(
        "87 1700 00 0c 01 00000000 000000c0 ffffffdf 00000000 00000020"
    )
    assert aml.resources(b"\x22\x10\x00") == b"\x11\x08\x0a\x05\x22\x10\x00\x79\x00"
