"""What holds for every platform device: no access of any width or value at any offset does harm. And the two
smallest."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.bus import Bus, BusDevice
from devices.platform.acpi_pm import SIZE, AcpiPm
from devices.platform.cmos import Cmos
from devices.platform.debug_exit import DebugExit
from devices.platform.i8042 import I8042
from devices.platform.post import CAPACITY, PostCodes
from devices.platform.uart import Uart


class Line:
    def set_level(self, asserted: bool) -> None:
        assert isinstance(asserted, bool)


def nothing(*_: object) -> None:
    pass


DEVICES: dict[str, Callable[[], BusDevice]] = {
    "uart": lambda: Uart(Line(), nothing),
    "cmos": lambda: Cmos(1 << 30),
    "i8042 data": lambda: I8042(Line(), nothing).data,
    "i8042 command": lambda: I8042(Line(), nothing).command,
    "acpi_pm": lambda: AcpiPm(Line(), nothing, nothing),
    "debug_exit": lambda: DebugExit(nothing),
    "post": lambda: PostCodes(),
}

accesses = st.lists(
    st.tuples(
        st.booleans(),
        st.one_of(st.integers(0, 15), st.integers(0, 0xFFFF)),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=60, deadline=None)
@given(accesses=accesses)
def test_any_access_is_harmless(name: str, accesses: list[tuple[bool, int, int, int]]) -> None:
    device = DEVICES[name]()
    for is_write, offset, size, value in accesses:
        if is_write:
            device.write(offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= device.read(offset, size) < 1 << 8 * size


def test_the_timer_port_is_left_free() -> None:
    bus = Bus("PIO", 1 << 16)
    i8042 = I8042(Line(), nothing)
    bus.insert(0x60, 1, i8042.data)
    bus.insert(0x64, 1, i8042.command)
    bus.insert(0x600, SIZE, AcpiPm(Line(), nothing, nothing))
    bus.write(0x64, 1, 0xAA)
    assert bus.read(0x60, 1) == 0x55
    assert bus.read(0x61, 1) == 0xFF


def test_debug_exit() -> None:
    codes: list[int] = []
    port = DebugExit(codes.append)
    port.write(0, 1, 42)
    port.write(0, 4, 0x01020307)
    port.write(1, 1, 9)
    assert codes == [42, 7]
    assert port.read(0, 1) == 0xFF


def test_post_codes() -> None:
    seen: list[int] = []
    post = PostCodes(lambda _, value: seen.append(value))
    assert post.read(0, 1) == 0
    before = time.monotonic_ns()
    for value in (1, 2, 3):
        post.write(0, 1, value)
    post.write(1, 1, 99)
    assert [value for _, value in post.codes] == seen == [1, 2, 3]
    assert before <= post.codes[0][0] <= post.codes[2][0] <= time.monotonic_ns()
    assert post.read(0, 1) == 3
    for _ in range(CAPACITY):
        post.write(0, 1, 7)
    assert len(post.codes) == CAPACITY
    assert post.codes[0][1] == 7
