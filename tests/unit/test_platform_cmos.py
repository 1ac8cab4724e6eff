"""The real-time clock as Linux and SeaBIOS read and set it."""

from calendar import timegm

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.platform.cmos import Cmos

GIB = 1 << 30
NOW = timegm((2031, 12, 7, 21, 58, 59))  # a Sunday


class Host:
    def __init__(self) -> None:
        self.now = float(NOW)

    def clock(self) -> float:
        return self.now


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def cmos(host: Host) -> Cmos:
    return Cmos(GIB, 0, host.clock)


def read(cmos: Cmos, register: int) -> int:
    cmos.write(0, 1, register)
    return cmos.read(1, 1)


def write(cmos: Cmos, register: int, value: int) -> None:
    cmos.write(0, 1, register)
    cmos.write(1, 1, value)


def clock(cmos: Cmos) -> list[int]:
    """Century, year, month, day, weekday, hours, minutes, seconds."""
    return [read(cmos, register) for register in (0x32, 9, 8, 7, 6, 4, 2, 0)]


def test_time_in_bcd(cmos: Cmos) -> None:
    assert clock(cmos) == [0x20, 0x31, 0x12, 0x07, 1, 0x21, 0x58, 0x59]


def test_time_goes_on(cmos: Cmos, host: Host) -> None:
    host.now += 3 * 3600 + 2
    assert clock(cmos) == [0x20, 0x31, 0x12, 0x08, 2, 0x00, 0x59, 0x01]


def test_binary_and_12_hours(cmos: Cmos, host: Host) -> None:
    write(cmos, 0x0B, 0x04)
    assert clock(cmos) == [20, 31, 12, 7, 1, 9 | 0x80, 58, 59]
    host.now = timegm((2031, 12, 7, 0, 5, 0))
    assert read(cmos, 4) == 12
    host.now = timegm((2031, 12, 7, 12, 5, 0))
    assert read(cmos, 4) == 12 | 0x80


def test_nobody_waits_for_an_update(cmos: Cmos, host: Host) -> None:
    for _ in range(100):
        host.now += 0.01
        assert not read(cmos, 0x0A) & 0x80
    assert read(cmos, 0x0D) == 0x80
    assert read(cmos, 0x0C) == 0


def test_setting_the_clock(cmos: Cmos, host: Host) -> None:
    """As Linux' mc146818_set_time: stop, write, go on."""
    write(cmos, 0x0B, 0x82)
    for register, value in ((0x32, 0x20), (9, 0x24), (8, 0x02), (7, 0x29), (4, 0x23), (2, 0x59), (0, 0x58)):
        write(cmos, register, value)
    host.now += 1000  # it stands still
    assert read(cmos, 0) == 0x58
    write(cmos, 0x0B, 0x02)
    assert cmos.offset == timegm((2024, 2, 29, 23, 59, 58)) - host.now
    host.now += 3
    assert clock(cmos) == [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x01]


def test_stopping_the_clock_keeps_the_moment(cmos: Cmos, host: Host) -> None:
    write(cmos, 0x0B, 0x82)
    host.now += 60
    assert clock(cmos) == [0x20, 0x31, 0x12, 0x07, 1, 0x21, 0x58, 0x59]
    write(cmos, 0x0B, 0x02)
    assert cmos.offset == -60


def test_setting_a_running_clock(cmos: Cmos, host: Host) -> None:
    write(cmos, 4, 0x03)
    assert clock(cmos)[5:] == [0x03, 0x58, 0x59]
    assert cmos.offset == -18 * 3600


def test_interrupts_cannot_be_enabled(cmos: Cmos) -> None:
    write(cmos, 0x0B, 0x72)
    assert read(cmos, 0x0B) == 0x02


def test_shutdown_status_and_ram(cmos: Cmos) -> None:
    assert read(cmos, 0x0F) == 0
    write(cmos, 0x0F, 0x0A)
    assert read(cmos, 0x8F) == 0x0A  # bit 7 is not part of the index
    write(cmos, 0x7F, 0x5A)
    assert read(cmos, 0x7F) == 0x5A
    assert cmos.read(0, 1) == 0xFF
    write(cmos, 0x0D, 0)
    assert read(cmos, 0x0D) == 0x80


def test_memory_size() -> None:
    def memory(low: int, high: int = 0) -> list[int]:
        cmos = Cmos(low, high)
        word = [read(cmos, i) | read(cmos, i + 1) << 8 for i in (0x15, 0x17, 0x30, 0x34, 0x5B)]
        return [*word, read(cmos, 0x5D)]

    assert memory(2 << 20) == [640, 1024, 1024, 0, 0, 0]
    assert memory(128 << 20) == [640, 0xFFFF, 0xFFFF, 112 * 16, 0, 0]
    assert memory(3 * GIB, 5 * GIB) == [640, 0xFFFF, 0xFFFF, 0xBF00, 0x4000, 1]


def test_checksum(cmos: Cmos) -> None:
    expected = sum(read(cmos, i) for i in range(0x10, 0x2E)) & 0xFFFF
    assert read(cmos, 0x2E) << 8 | read(cmos, 0x2F) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 2, 4, 6, 7, 8, 9, 10, 11, 0x32]), st.integers(0, 255)), max_size=30
    )
)
def test_any_time_written_is_harmless(writes: list[tuple[int, int]]) -> None:
    cmos = Cmos(GIB, 0, lambda: float(NOW))
    for register, value in writes:
        write(cmos, register, value)
        assert all(0 <= number <= 255 for number in clock(cmos))
