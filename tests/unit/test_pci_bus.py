"""The PCI bus by ports and by ECAM: mechanism 1, the host bridge, absent functions, slots, INTx routing."""

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.pci.function import PciFunction
from devices.pci.intx import INTX_GSIS, intx_gsi

ECAM = 0xE0000000


def make(**options: Any) -> PciFunction:
    return PciFunction(vendor_id=0x1234, device_id=0x5678, class_code=0x020000, **options)


def test_linux_finds_mechanism_1_and_a_host_bridge(guest: Any) -> None:
    guest.pio.write(0xCFB, 1, 0x01)
    guest.pio.write(0xCF8, 4, 0x80000000)
    assert guest.pio.read(0xCF8, 4) == 0x80000000
    assert guest.config_read(0, 0x0A, 2) == 0x0600
    assert guest.config_read(0, 0x0E, 1) == 0


def test_only_dword_writes_reach_the_address_register(guest: Any) -> None:
    guest.pio.write(0xCF8, 4, 0xFFFFFFFF)
    assert guest.pio.read(0xCF8, 4) == 0x8FFFFFFC
    guest.pio.write(0xCF8, 4, 0x80000800)
    for port, size in ((0xCF8, 1), (0xCF8, 2), (0xCF9, 1), (0xCFA, 2), (0xCFB, 1), (0xCFA, 4), (0xCF8, 8)):
        guest.pio.write(port, size, 0)
        assert guest.pio.read(port, size) == (1 << 8 * size) - 1
    assert guest.pio.read(0xCF8, 4) == 0x80000800


def test_data_port_gives_bytes_and_words(guest: Any) -> None:
    guest.plug(make())
    guest.pio.write(0xCF8, 4, 0x80000800)
    assert [guest.pio.read(0xCFC + index, 1) for index in range(4)] == [0x34, 0x12, 0x78, 0x56]
    assert guest.pio.read(0xCFE, 2) == 0x5678
    assert guest.pio.read(0xCFD, 2) == 0x7812
    guest.pio.write(0xCF8, 4, 0x8000083C)
    guest.pio.write(0xCFC, 1, 0x42)
    assert guest.pio.read(0xCFC, 4) & 0xFF == 0x42


def test_extended_registers_by_mechanism_1_as_on_amd(guest: Any) -> None:
    guest.plug(make())
    guest.pio.write(0xCF8, 4, 0x81000800)
    assert guest.pio.read(0xCFC, 4) == 0
    guest.pio.write(0xCF8, 4, 0x8F0008FC)
    assert guest.pio.read(0xCFC, 4) == 0


def test_without_the_enable_bit_nothing_answers(guest: Any) -> None:
    guest.pio.write(0xCF8, 4, 0)
    assert guest.pio.read(0xCFC, 4) == 0xFFFFFFFF


def test_absent_functions_read_ones(guest: Any) -> None:
    guest.plug(make())
    for address in (0x80001000, 0x80000900, 0x80010000, 0x80010800):  # slot 2, function 1, bus 1
        guest.pio.write(0xCF8, 4, address)
        assert guest.pio.read(0xCFC, 4) == 0xFFFFFFFF
        guest.pio.write(0xCFC, 4, 0)
    assert guest.mmio.read(ECAM + (2 << 15), 8) == (1 << 64) - 1


def test_ecam_sees_the_same_registers(guest: Any) -> None:
    guest.plug(make())
    base = ECAM + (1 << 15)
    assert guest.mmio.read(base, 4) == 0x56781234
    guest.mmio.write(base + 0x3C, 1, 7)
    assert guest.config_read(1, 0x3C, 1) == 7
    assert guest.mmio.read(base + 0x100, 4) == 0  # no extended capabilities
    assert guest.mmio.read(base + 0xFFE, 4) == 0xFFFF0000
    assert guest.mmio.read(ECAM + (1 << 15) + (1 << 12), 2) == 0xFFFF  # function 1


def test_slots(guest: Any) -> None:
    assert guest.plug(make()) == 1
    assert guest.plug(make(), slot=3) == 3
    assert guest.plug(make()) == 2
    assert guest.plug(make()) == 4
    for slot in (0, 3, 32, -1):
        with pytest.raises(ValueError, match="taken"):
            guest.plug(make(), slot=slot)


def test_intx_goes_where_the_interrupt_line_register_says(guest: Any) -> None:
    function = make(interrupt_pin=1)
    slot = guest.plug(function, slot=6)
    assert intx_gsi(6, 1) == 11
    assert guest.config_read(slot, 0x3C, 2) == 1 << 8 | 11
    [line] = guest.board.lines
    assert line.gsi == 11
    function.intx.set_asserted(True)
    assert line.level
    assert guest.config_read(slot, 0x06, 2) & 8
    guest.config_write(slot, 0x04, 2, 1 << 10)
    assert not line.level
    assert guest.config_read(slot, 0x06, 2) & 8, "the status bit tells of the device, not of the pin"
    guest.config_write(slot, 0x04, 2, 0)
    assert line.level
    function.intx.set_asserted(False)
    assert not line.level
    assert not guest.config_read(slot, 0x06, 2) & 8


def test_the_swizzle_spreads_neighbours_and_pins() -> None:
    assert {intx_gsi(slot, 1) for slot in range(4)} == set(INTX_GSIS)
    assert {intx_gsi(5, pin) for pin in range(1, 5)} == set(INTX_GSIS)
    assert intx_gsi(3, 2) == intx_gsi(4, 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0xCF8, 0xCFF) | st.integers(ECAM, ECAM + (3 << 15)),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, (1 << 64) - 1) | st.sampled_from((0x80000800, 0x80000804, 0x80001010)),
        ),
        max_size=40,
    )
)
def test_no_access_raises_or_changes_an_identity(fake_guest: Any, accesses: list[Any]) -> None:
    guest = fake_guest()
    guest.plug(make(interrupt_pin=1))
    guest.plug(make(interrupt_pin=1))
    for is_write, address, size, value in accesses:
        bus = guest.pio if address < 0x10000 else guest.mmio
        if is_write:
            bus.write(address, size, value & (1 << 8 * size) - 1)
        assert 0 <= bus.read(address, size) < 1 << 8 * size
    assert guest.config_read(0, 8, 4) == 0x06000000
    for slot in (1, 2):
        assert guest.config_read(slot, 0, 4) == 0x56781234
        assert guest.config_read(slot, 8, 4) == 0x02000000
        assert guest.config_read(slot, 0x0E, 1) == 0
        assert [guest.config_read(slot, 0x10 + 4 * index, 4) for index in range(6)] == [0] * 6
    guest.close()


def test_vcpus_that_move_bars_at_the_same_time(guest: Any) -> None:
    """Two functions fight for two places from two threads; whatever the order, nothing breaks or hangs."""
    from devices.pci.bars import BarKind

    class Silent:
        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None: ...

    functions = [make(), make()]
    for function in functions:
        function.add_bar(0, BarKind.MEMORY_32, 0x1000, Silent())
        guest.plug(function)
    failures: list[BaseException] = []

    def move(slot: int) -> None:
        try:
            base = ECAM + (slot << 15)
            guest.mmio.write(base + 4, 2, 2)
            for turn in range(300):
                guest.mmio.write(base + 0x10, 4, 0xC0000000 + 0x1000 * (turn % 2))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=move, args=(slot,)) for slot in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not guest.overlaps()
    assert [function.bars[0].mapped for function in functions].count(0xC0001000) == 1
