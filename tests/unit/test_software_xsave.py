"""XSAVE and XRSTOR between KVM's image and the guest's area, rule by rule (SDM volume 1, 13.7 and 13.8)."""

import pytest

from vmrun.kvm import abi
from vmrun.kvm.software.features import adjust_cpuid, xsave_layout
from vmrun.kvm.software.xsave import AVX, HEADER, SSE, X87, MalformedArea, area_size, restore, save

LAYOUT = {2: (576, 256), 5: (832, 64), 6: (896, 512), 7: (1408, 1024)}
SIZE = 2432
XCR0 = 0xE7
PARTS = {
    0: [(0, 24), (32, 160)],
    1: [(160, 416)],
    2: [(576, 832)],
    5: [(832, 896)],
    6: [(896, 1408)],
    7: [(1408, 2432)],
}
MXCSR = 24
MASK = 28


def _filled(byte: int, in_use: int, mxcsr: int = 0x1F80) -> bytearray:
    area = bytearray([byte]) * SIZE
    area[MXCSR:MASK] = mxcsr.to_bytes(4, "little")
    area[MASK:32] = (0x2FFFF).to_bytes(4, "little")
    area[HEADER : HEADER + 64] = in_use.to_bytes(8, "little") + bytes(56)
    return area


def _in_use(area: bytes) -> int:
    return int.from_bytes(area[HEADER : HEADER + 8], "little")


def _holds(area: bytes, component: int) -> set[int]:
    return {byte for start, end in PARTS[component] for byte in area[start:end]}


@pytest.mark.parametrize("components", [0, X87, SSE, AVX, X87 | SSE, 7, 0xE0, 0xE7])
def test_save_touches_only_what_is_asked_for(components: int) -> None:
    image, area = _filled(0xAA, XCR0, 0x9FC0), _filled(0x55, 0x23)
    before = bytes(area)
    save(bytes(image), area, LAYOUT, components)
    for component in PARTS:
        assert _holds(area, component) == {0xAA if components >> component & 1 else 0x55}
    mxcsr = int.from_bytes(area[MXCSR:MASK], "little")
    assert mxcsr == (0x9FC0 if components & (SSE | AVX) else 0x1F80)
    assert _in_use(area) == (0x23 & ~components) | components
    assert area[416:512] == before[416:512]  # software's own bytes
    assert area[HEADER + 8 : HEADER + 64] == before[HEADER + 8 : HEADER + 64]
    assert len(area) == SIZE


def test_save_tells_what_is_in_its_initial_state() -> None:
    image, area = _filled(0xAA, X87 | SSE), _filled(0x55, XCR0)
    save(bytes(image), area, LAYOUT, 0xE7)
    assert _in_use(area) == X87 | SSE


@pytest.mark.parametrize("components", [0, X87, SSE, AVX, 7, 0xE0, 0xE7])
@pytest.mark.parametrize("present", [0, X87, 7, 0xE4, 0xE7])
def test_restore(components: int, present: int) -> None:
    image, area = _filled(0xAA, XCR0), _filled(0x55, present)
    restore(image, bytes(area), LAYOUT, components, XCR0)
    for component in PARTS:
        loaded = components & present & 1 << component
        assert _holds(image, component) == {0x55 if loaded else 0xAA}
    # What is asked for and not present goes to its initial state: its bit is clear in what KVM is given.
    assert _in_use(image) == (XCR0 & ~components) | (present & components)
    assert len(image) == SIZE


@pytest.mark.parametrize(("components", "wanted"), [(X87, 0x1F80), (SSE, 0x9FC0), (AVX, 0x9FC0), (7, 0x9FC0)])
def test_restore_of_mxcsr_follows_what_is_asked_for(components: int, wanted: int) -> None:
    image, area = _filled(0xAA, XCR0), _filled(0x55, 0, 0x9FC0)
    restore(image, bytes(area), LAYOUT, components, XCR0)
    assert int.from_bytes(image[MXCSR:MASK], "little") == wanted


def test_restore_of_mxcsr_alone_reaches_kvm() -> None:
    """KVM reads MXCSR only along with components in use: the initial XMM registers go with it as zeros."""
    image, area = _filled(0xAA, XCR0), _filled(0x55, 0, 0x9FC0)
    restore(image, bytes(area), LAYOUT, XCR0, XCR0)
    assert _in_use(image) == SSE
    assert _holds(image, 1) == {0}
    image, area = _filled(0xAA, XCR0), _filled(0x55, 0)
    restore(image, bytes(area), LAYOUT, XCR0, XCR0)
    assert _in_use(image) == 0


def test_mxcsr_mask_of_the_processor_decides() -> None:
    image, area = _filled(0xAA, XCR0), _filled(0x55, 7, 0x21F80)  # AMD's misaligned mode
    restore(image, bytes(area), LAYOUT, SSE, XCR0)
    for mask, mxcsr in ((0x2FFFF, 0x10000), (0xFFFF, 0x21F80), (0, 0x1FC0), (0xFFFF, 1 << 31)):
        image, area = _filled(0xAA, XCR0), _filled(0x55, 7, mxcsr)
        image[MASK:32] = mask.to_bytes(4, "little")
        with pytest.raises(MalformedArea):
            restore(image, bytes(area), LAYOUT, SSE, XCR0)
        restore(image, bytes(area), LAYOUT, X87, XCR0)  # not looked at


@pytest.mark.parametrize("bit", [3, 4, 8, 9, 17, 62, 63])
def test_states_that_are_not_enabled(bit: int) -> None:
    image, area = _filled(0xAA, XCR0), _filled(0x55, 1 << bit)
    with pytest.raises(MalformedArea):
        restore(image, bytes(area), LAYOUT, X87, XCR0)


@pytest.mark.parametrize("offset", range(8, 24))
def test_header_bytes_that_must_be_zero(offset: int) -> None:
    image, area = _filled(0xAA, XCR0), _filled(0x55, X87)
    area[HEADER + offset] = 0x80
    before = bytes(image)
    with pytest.raises(MalformedArea):
        restore(image, bytes(area), LAYOUT, 7, XCR0)
    assert image == before


@pytest.mark.parametrize(
    ("components", "size"), [(0, 576), (3, 576), (4, 832), (7, 832), (0x20, 896), (0xE7, 2432), (0x80, 2432)]
)
def test_area_size(components: int, size: int) -> None:
    assert area_size(LAYOUT, components) == size
    save(bytes(_filled(0xAA, XCR0)), bytearray(size), LAYOUT, components)
    restore(_filled(0xAA, XCR0), bytes(size), LAYOUT, components, XCR0)


def test_round_trip() -> None:
    image, area = _filled(0xAA, 0xE7, 0xBF80), bytearray(SIZE)
    save(bytes(image), area, LAYOUT, XCR0)
    other = _filled(0x11, 0xE7)
    restore(other, bytes(area), LAYOUT, XCR0, XCR0)
    assert all(_holds(other, component) == {0xAA} for component in PARTS)
    assert other[MXCSR:MASK] == image[MXCSR:MASK]


def _leaf(function: int, index: int = 0, **values: int) -> abi.kvm_cpuid_entry2:
    return abi.kvm_cpuid_entry2(function=function, index=index, **values)


def test_the_guest_is_told_of_every_vector_state() -> None:
    leaves = [
        _leaf(1),
        _leaf(7, ebx=1 << 9 | 1 << 20),
        _leaf(0xD, 0, eax=0xE7),
        _leaf(0xD, 1, eax=0xF),
        *(_leaf(0xD, number, eax=size, ebx=offset) for number, (offset, size) in LAYOUT.items()),
    ]
    adjust_cpuid(leaves)
    assert xsave_layout(leaves) == (0xE7, LAYOUT)
    assert leaves[0].ecx == 1 << 26 | 1 << 28
    assert leaves[1].ebx == 1 << 16
    assert leaves[3].eax == 0
