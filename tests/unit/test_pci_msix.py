"""MSI-X: vectors follow the table, the masks and the enable bit; pending bits; hostile tables."""

import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from devices.pci.bars import BarKind
from devices.pci.function import PciFunction
from devices.pci.msix import MsiX

ENABLE, FUNCTION_MASK = 0x8000, 0x4000
BASE = 0xC0000000


class MsixFunction(PciFunction):
    """A function that is nothing but MSI-X."""

    def __init__(self, board: Any, vectors: int) -> None:
        super().__init__(vendor_id=0x1234, device_id=0x5678, class_code=0xFF0000)
        self.switches: list[bool] = []
        self.msix = MsiX(
            self.config,
            self.lock,
            1,
            [board.msi_vector() for _ in range(vectors)],
            lambda: self.switches.append(self.msix.enabled),
        )
        self.add_bar(1, BarKind.MEMORY_32, self.msix.bar_size, self.msix)

    def close(self) -> None:
        super().close()
        self.msix.close()


def plug(guest: Any, vectors: int = 3) -> tuple[MsixFunction, int, int]:
    """A function with MSI-X, its slot and the offset of its message control register."""
    function = MsixFunction(guest.board, vectors)
    slot = guest.plug(function)
    guest.config_write(slot, 4, 2, 2)
    [(capability, offset)] = guest.capabilities(slot)
    assert capability == 0x11
    return function, slot, offset + 2


def program(guest: Any, vector: int, address: int, data: int, control: int = 0) -> None:
    """As Linux does: the entry first, unmask last."""
    entry = BASE + 16 * vector
    guest.mmio.write(entry, 4, address & 0xFFFFFFFF)
    guest.mmio.write(entry + 4, 4, address >> 32)
    guest.mmio.write(entry + 8, 4, data)
    guest.mmio.write(entry + 12, 4, control)


def test_capability_describes_table_and_pba(guest: Any) -> None:
    function, slot, control = plug(guest)
    assert guest.config_read(slot, control, 2) == 2
    assert guest.config_read(slot, control + 2, 4) == 1
    assert guest.config_read(slot, control + 6, 4) == function.msix.pba_offset | 1
    assert function.msix.bar_size == 4096
    guest.config_write(slot, control, 2, 0x07FF)
    assert guest.config_read(slot, control, 2) == 2


def test_big_tables_do_not_run_into_their_pba(guest: Any) -> None:
    for vectors in (1, 128, 129, 256, 257):
        function = MsixFunction(guest.board, vectors)
        assert 16 * vectors <= function.msix.pba_offset
        assert function.msix.pba_offset + (vectors + 63) // 64 * 8 <= function.msix.bar_size
        function.close()


def test_a_vector_is_connected_when_enabled_and_unmasked(guest: Any) -> None:
    function, slot, control = plug(guest)
    vectors = guest.board.vectors
    assert [guest.mmio.read(BASE + 16 * index + 12, 4) for index in range(3)] == [1, 1, 1]
    program(guest, 0, 0xFEE01000, 0x41)
    assert vectors[0].message is None
    guest.config_write(slot, control, 2, ENABLE | FUNCTION_MASK)
    assert vectors[0].message is None
    guest.config_write(slot, control, 2, ENABLE)
    assert vectors[0].message == (0xFEE01000, 0x41)
    assert vectors[1].message is None
    guest.mmio.write(BASE + 12, 4, 1)
    assert vectors[0].message is None
    guest.mmio.write(BASE + 12, 4, 0)
    guest.mmio.write(BASE + 8, 4, 0x42)
    assert vectors[0].message == (0xFEE01000, 0x42)
    guest.mmio.write(BASE + 16, 8, 0xFEE00000)
    guest.mmio.write(BASE + 24, 8, 0x43)
    assert vectors[1].message == (0xFEE00000, 0x43)
    guest.config_write(slot, control, 2, 0)
    assert [vector.message for vector in vectors] == [None] * 3
    assert function.switches == [True, False]


def test_a_write_that_changes_nothing_does_not_connect_again(guest: Any) -> None:
    _, slot, control = plug(guest)
    guest.config_write(slot, control, 2, ENABLE)
    program(guest, 0, 0xFEE01000, 0x41)
    program(guest, 0, 0xFEE01000, 0x41)
    guest.config_write(slot, control, 2, ENABLE)
    assert guest.board.vectors[0].connects == 1


def test_pending_bits(guest: Any) -> None:
    function, slot, control = plug(guest, vectors=70)
    pba = BASE + function.msix.pba_offset
    guest.config_write(slot, control, 2, ENABLE)
    for vector in (1, 9, 69):
        os.eventfd_write(function.msix.fd(vector), 1)
    assert guest.mmio.read(pba, 8) == 1 << 1 | 1 << 9
    assert guest.mmio.read(pba + 1, 1) == 2
    assert guest.mmio.read(pba + 8, 8) == 1 << 5
    guest.mmio.write(pba, 8, 0)
    assert guest.mmio.read(pba, 4) == 1 << 1 | 1 << 9
    program(guest, 1, 0xFEE00000, 0x50)
    assert guest.mmio.read(pba, 4) == 1 << 9, "delivered by the board, no longer pending here"


def test_messages_that_reach_no_apic_are_never_connected(guest: Any) -> None:
    _, slot, control = plug(guest)
    guest.config_write(slot, control, 2, ENABLE)
    for address in (0, 0x1000, 0xFED00000, 0xFEF00000, 0x1_FEE00000, 0xFFFFFFFF_FFFFFFFC):
        program(guest, 0, address, 0xFFFFFFFF)
        assert guest.board.vectors[0].message is None
        assert guest.mmio.read(BASE, 8) == address


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4095),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, (1 << 64) - 1) | st.sampled_from((0, 1, 0xFEE00000, 0xFEE00000_00000000)),
            st.sampled_from((None, 0, ENABLE, ENABLE | FUNCTION_MASK)),
        ),
        max_size=40,
    )
)
def test_random_tables_connect_exactly_what_they_say(fake_guest: Any, accesses: list[Any]) -> None:
    guest = fake_guest()
    _, slot, control = plug(guest)
    for offset, size, value, switch in accesses:
        guest.mmio.write(BASE + offset, size, value & (1 << 8 * size) - 1)
        guest.mmio.read(BASE + offset, size)
        if switch is not None:
            guest.config_write(slot, control, 2, switch)
        for index, vector in enumerate(guest.board.vectors):
            low, high, data, masked = (
                guest.mmio.read(BASE + 16 * index + 4 * dword, 4) for dword in range(4)
            )
            assert low & 3 == 0
            assert masked in (0, 1)
            live = guest.config_read(slot, control, 2) & 0xC000 == ENABLE and not masked
            expected = (low, data) if live and low >> 20 == 0xFEE and not high else None
            assert vector.message == expected
    guest.close()
