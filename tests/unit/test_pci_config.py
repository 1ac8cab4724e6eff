"""Configuration space: write masks, write-1-to-clear, capability lists, hooks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.pci.config import CAP_VENDOR, CONFIG_SIZE, EXTENDED_CONFIG_SIZE, ConfigSpace, MaskedBytes

access = st.tuples(
    st.integers(0, EXTENDED_CONFIG_SIZE + 8), st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 64) - 1)
)


def test_only_writable_bits_change() -> None:
    registers = MaskedBytes(8)
    registers.define(2, 2, 0xABCD, writable=0x0FF0)
    registers.write(2, 2, 0x1234)
    assert registers.read(2, 2) == 0xA23D


def test_clearable_bits_are_cleared_by_ones_only() -> None:
    registers = MaskedBytes(2)
    registers.define(0, 2, 0xF910, clearable=0xF900)
    registers.write(0, 2, 0x8010)
    assert registers.read(0, 2) == 0x7910
    registers.write(0, 1, 0xFF)
    assert registers.read(0, 2) == 0x7910


def test_past_the_end_reads_ones_and_ignores_writes() -> None:
    registers = MaskedBytes(4)
    registers.define(0, 4, 0, writable=0xFFFFFFFF)
    registers.write(2, 8, 0x1122334455667788)
    assert registers.read(0, 4) == 0x77880000
    assert registers.read(2, 4) == 0xFFFF7788
    assert registers.read(100, 4) == 0xFFFFFFFF
    assert len(registers.data) == 4


def test_capabilities_are_linked_in_order_and_aligned() -> None:
    config = ConfigSpace()
    first = config.add_capability(CAP_VENDOR, b"\x05\xaa\xbb", writable=b"\0\xf0")
    second = config.add_capability(0x11, b"\0" * 10)
    assert (first, second) == (0x40, 0x48)
    assert config.read(0x34, 1) == first
    assert config.read(first, 2) == second << 8 | CAP_VENDOR
    assert config.read(second, 2) == 0x11
    assert config.read(0x06, 2) & 0x10
    config.write(first, 8, (1 << 64) - 1)
    assert config.read(first, 4) == 0xFA05 << 16 | second << 8 | CAP_VENDOR


def test_a_capability_that_does_not_fit_is_refused() -> None:
    config = ConfigSpace()
    config.add_capability(CAP_VENDOR, bytes(CONFIG_SIZE - 0x40 - 2))
    with pytest.raises(ValueError, match="no room"):
        config.add_capability(CAP_VENDOR, b"")


def test_hooks_see_accesses_that_touch_their_bytes() -> None:
    config = ConfigSpace()
    config.define(0x50, 4, 0, writable=0xFF)
    seen: list[int] = []
    config.on_write(0x50, 2, lambda: seen.append(config.get(0x50, 1)))
    config.on_read(0x52, 1, lambda: config.put(0x52, 1, 0x77))
    config.write(0x4C, 4, 1)
    config.write(0x52, 2, 1)
    config.write(0x4F, 2, 0x3300)
    config.write(0x51, 1, 0)
    assert seen == [0x33, 0x33]
    assert config.read(0x50, 2) == 0x33
    assert config.data[0x52] == 0
    assert config.read(0x50, 4) == 0x770033


@settings(max_examples=100)
@given(st.lists(access, max_size=30), st.binary(min_size=64, max_size=64))
def test_no_write_changes_a_read_only_bit(accesses: list[tuple[int, int, int]], masks: bytes) -> None:
    config = ConfigSpace()
    for index, mask in enumerate(masks):
        config.define(4 * index, 1, 0x5A, writable=mask)
    before = bytes(config.data)
    for offset, size, value in accesses:
        config.write(offset, size, value)
        assert 0 <= config.read(offset, size) < 1 << (8 * size)
    for old, new, mask in zip(before, config.data, config.writable, strict=True):
        assert (old ^ new) & ~mask == 0
