"""BARs as a guest moves them: sizing, relocation, decoding switched by COMMAND, and places that are taken."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.pci.bars import BarKind
from devices.pci.function import PciFunction

COMMAND = 0x04
IO, MEMORY = 1, 2


class Scratch:
    """A device that answers with its name and counts how often it was mapped."""

    def __init__(self, name: int) -> None:
        self.name = name
        self.mapped: list[int | None] = []

    def read(self, offset: int, size: int) -> int:
        return self.name

    def write(self, offset: int, size: int, value: int) -> None:
        pass

    def map(self, address: int) -> None:
        self.mapped.append(address)

    def unmap(self) -> None:
        self.mapped.append(None)


def make(*bars: tuple[int, BarKind, int, Scratch]) -> PciFunction:
    function = PciFunction(vendor_id=0x1234, device_id=0x5678, class_code=0xFF0000)
    for index, kind, size, device in bars:
        function.add_bar(index, kind, size, device, device.map, device.unmap)
    return function


def test_sizing_reads_back_the_size_and_the_kind(guest: Any) -> None:
    slot = guest.plug(
        make(
            (0, BarKind.IO, 0x40, Scratch(1)),
            (1, BarKind.MEMORY_32, 0x1000, Scratch(2)),
            (2, BarKind.MEMORY_64_PREFETCHABLE, 0x4000, Scratch(3)),
        )
    )
    for index in range(6):
        guest.config_write(slot, 0x10 + 4 * index, 4, 0xFFFFFFFF)
    sizes = [guest.config_read(slot, 0x10 + 4 * index, 4) for index in range(6)]
    assert sizes == [0xFFFFFFC1, 0xFFFFF000, 0xFFFFC00C, 0xFFFFFFFF, 0, 0]


def test_addresses_are_assigned_at_plug_time_and_not_decoded_yet(guest: Any) -> None:
    port, memory = Scratch(1), Scratch(2)
    slots = [
        guest.plug(make((0, BarKind.IO, 0x40, port), (1, BarKind.MEMORY_32, 0x4000, memory)))
        for _ in range(2)
    ]
    assert slots == [1, 2]
    assert [guest.config_read(slot, 0x10, 4) for slot in slots] == [0xC001, 0xC041]
    assert [guest.config_read(slot, 0x14, 4) for slot in slots] == [0xC0000000, 0xC0004000]
    assert guest.mmio.read(0xC0000000, 4) == 0xFFFFFFFF


def test_command_switches_each_space(guest: Any) -> None:
    port, memory = Scratch(1), Scratch(2)
    slot = guest.plug(make((0, BarKind.IO, 0x40, port), (1, BarKind.MEMORY_32, 0x4000, memory)))
    guest.config_write(slot, COMMAND, 2, MEMORY)
    assert (guest.pio.read(0xC000, 1), guest.mmio.read(0xC0003FFF, 1)) == (0xFF, 2)
    guest.config_write(slot, COMMAND, 2, IO)
    assert (guest.pio.read(0xC03F, 1), guest.mmio.read(0xC0000000, 1)) == (1, 0xFF)
    guest.config_write(slot, COMMAND, 2, 0)
    assert guest.pio.read(0xC000, 1) == 0xFF
    assert memory.mapped == [0xC0000000, None]
    assert port.mapped == [0xC000, None]


def test_a_live_bar_moves(guest: Any) -> None:
    memory = Scratch(2)
    slot = guest.plug(make((0, BarKind.MEMORY_64_PREFETCHABLE, 0x1000, memory)))
    guest.config_write(slot, COMMAND, 2, MEMORY)
    guest.config_write(slot, 0x10, 4, 0xD0000FFF)
    assert guest.mmio.read(0xD0000000, 1) == 2
    assert guest.mmio.read(0xC0000000, 1) == 0xFF
    guest.config_write(slot, 0x14, 4, 1)  # above 4 GiB, outside the window
    assert guest.mmio.read(0x1D0000000, 1) == 0xFF
    guest.config_write(slot, 0x14, 4, 0)
    assert memory.mapped == [0xC0000000, None, 0xD0000000, None, 0xD0000000]


def test_a_bar_over_another_loses_and_comes_back(guest: Any) -> None:
    first, second = Scratch(1), Scratch(2)
    slots = [guest.plug(make((0, BarKind.MEMORY_32, 0x1000, device))) for device in (first, second)]
    for slot in slots:
        guest.config_write(slot, COMMAND, 2, MEMORY)
    guest.config_write(slots[1], 0x10, 4, 0xC0000000)
    assert guest.mmio.read(0xC0000000, 1) == 1
    assert second.mapped == [0xC0001000, None]
    guest.config_write(slots[0], 0x10, 4, 0xC8000000)
    assert guest.mmio.read(0xC0000000, 1) == 2
    assert guest.mmio.read(0xC8000000, 1) == 1


def test_a_bar_over_another_kind_of_device_is_mapped_once_rewritten(guest: Any) -> None:
    intruder, mine = Scratch(9), Scratch(1)
    guest.mmio.insert(0xC0000800, 16, intruder)
    slot = guest.plug(make((0, BarKind.MEMORY_32, 0x1000, mine)))
    guest.config_write(slot, COMMAND, 2, MEMORY)
    assert guest.mmio.read(0xC0000800, 1) == 9
    assert guest.mmio.read(0xC0000000, 1) == 0xFF
    guest.mmio.remove(0xC0000800)
    guest.config_write(slot, 0x10, 4, 0xC0000000)
    assert guest.mmio.read(0xC0000800, 1) == 1


@pytest.mark.parametrize("address", [0, 0x1000, 0xE0000000, 0xFEE00000, 0xFFFFF000])
def test_a_bar_outside_the_window_is_not_decoded(guest: Any, address: int) -> None:
    device = Scratch(1)
    slot = guest.plug(make((0, BarKind.MEMORY_32, 0x1000, device)))
    guest.config_write(slot, 0x10, 4, address)
    guest.config_write(slot, COMMAND, 2, MEMORY)
    assert device.mapped == []
    assert guest.config_read(slot, 0x10, 4) == address


def test_bars_that_make_no_sense_are_refused(guest: Any) -> None:
    for index, kind, size in (
        (0, BarKind.MEMORY_32, 0x1800),
        (0, BarKind.IO, 2),
        (6, BarKind.IO, 4),
        (5, BarKind.MEMORY_64_PREFETCHABLE, 0x1000),
    ):
        with pytest.raises(ValueError):
            make((index, kind, size, Scratch(1)))
    with pytest.raises(ValueError, match="taken"):
        make((0, BarKind.MEMORY_64_PREFETCHABLE, 0x1000, Scratch(1)), (1, BarKind.IO, 4, Scratch(2)))
    with pytest.raises(ValueError, match="no room"):
        guest.plug(make((0, BarKind.IO, 0x8000, Scratch(1))))


addresses = st.one_of(
    st.sampled_from(
        (0xC0000000, 0xC0001000, 0xC0002000, 0xC0004000, 0xDFFFF000, 0xC000, 0xC100, 0xFFFFFFFF, 0, 1)
    ),
    st.integers(0, 0xFFFFFFFF),
)
writes = st.tuples(
    st.integers(1, 3), st.sampled_from((0x04, 0x10, 0x14, 0x18, 0x1C)), st.sampled_from((1, 2, 4)), addresses
)


@settings(max_examples=150, deadline=None)
@given(st.lists(writes, max_size=40))
def test_however_bars_move_they_stay_aligned_apart_and_where_they_say(
    fake_guest: Any, accesses: list[tuple[int, int, int, int]]
) -> None:
    guest = fake_guest()
    functions = []
    for number in range(3):
        functions.append(
            make(
                (0, BarKind.IO, 0x40, Scratch(0)),
                (1, BarKind.MEMORY_32, 0x1000 << number, Scratch(1)),
                (2, BarKind.MEMORY_64_PREFETCHABLE, 0x2000, Scratch(2)),
            )
        )
        guest.plug(functions[-1])
    for slot in (1, 2, 3):
        guest.config_write(slot, COMMAND, 2, IO | MEMORY)
    for slot, offset, size, value in accesses:
        guest.config_write(slot, offset, size, value)
        assert not guest.overlaps()
    for slot, function in enumerate(functions, 1):
        assert guest.config_read(slot, 0, 4) == 0x56781234
        command = guest.config_read(slot, COMMAND, 2)
        for bar in function.bars.values():
            address = function.bar_address(bar)
            assert address % bar.size == 0
            enabled = command & (IO if bar.kind is BarKind.IO else MEMORY)
            assert bar.mapped is None or (enabled and bar.mapped == address)
            assert bar.device.mapped[-1:] == [bar.mapped] or bar.device.mapped == []
            if enabled and bar.mapped is None:
                bus = guest.pio if bar.kind is BarKind.IO else guest.mmio
                start, end = (0xC000, 0x10000) if bar.kind is BarKind.IO else (0xC0000000, 0xE0000000)
                if start <= address and address + bar.size <= end:  # then only because it is taken
                    assert any(low < address + bar.size and address < high for low, high, _ in bus._table[1])
    guest.close()
