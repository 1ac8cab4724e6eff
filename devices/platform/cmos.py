"""The MC146818 real-time clock and its CMOS RAM at ports 0x70 (index) and 0x71 (data). VMM process.

The clock is the host's, in UTC, plus whatever the guest set it to. It is read out whole and never in the
middle of an update, so register A's update-in-progress bit is always clear: readers that follow the data
sheet (Linux' mc146818_get_time, SeaBIOS) never wait. Very old kernels wait for that bit to *rise*; they give
up after a while.

Left out: alarm, periodic and update-ended interrupts (their enable bits read as zero), the daylight-saving
switch, and the 32 kHz square wave. So whoever describes the machine must not give the clock an interrupt.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from devices.platform.isa import ByteDevice
from devices.state import SavedState

INDEX_PORT, DATA_PORT = 0, 1

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32
CLOCK_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
SHUTDOWN_STATUS = 0x0F

A_NORMAL = 0x26  # 32,768 Hz time base, 1,024 Hz rate, no update in progress
B_SET = 0x80  # the guest is setting the clock: it stands still
B_BINARY = 0x04
B_24_HOURS = 0x02
B_DAYLIGHT = 0x01
D_VALID = 0x80  # the battery is good
B_BITS = B_SET | B_BINARY | B_24_HOURS | B_DAYLIGHT  # those kept
HOUR_PM = 0x80

# Seconds that the guest's clock may be ahead of the host's, or behind: more than it can set, and the year
# still has four digits.
MAX_OFFSET = 7100 * 366 * 86400
MIN_OFFSET = -1900 * 365 * 86400

KIB, MIB = 1 << 10, 1 << 20


class Cmos(ByteDevice):
    """Two ports. `memory_below_4g` and `memory_above_4g` are bytes of RAM, for firmware that asks here.

    `offset` is how many seconds the guest's clock is ahead of `clock` (the host's, seconds since 1970).
    """

    __slots__ = ("_clock", "_lock", "index", "offset", "ram")

    def __init__(
        self, memory_below_4g: int, memory_above_4g: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.index = 0
        self.offset = 0.0
        self.ram = bytearray(128)
        self.ram[REGISTER_A] = A_NORMAL
        self.ram[REGISTER_B] = B_24_HOURS
        self.ram[REGISTER_D] = D_VALID
        self.ram[0x14] = 0x02  # equipment: a numeric coprocessor
        self._put(0x15, 2, 640)  # KiB of base memory
        extended = max(0, memory_below_4g - MIB) // KIB
        self._put(0x17, 2, min(extended, 0xFFFF))  # KiB above 1 MiB, twice
        self._put(0x30, 2, min(extended, 0xFFFF))
        self._put(0x34, 2, min(max(0, memory_below_4g - 16 * MIB) // (64 * KIB), 0xFFFF))
        self._put(0x5B, 3, min(memory_above_4g // (64 * KIB), 0xFFFFFF))
        checksum = sum(self.ram[0x10:0x2E])
        self.ram[0x2E], self.ram[0x2F] = checksum >> 8 & 0xFF, checksum & 0xFF

    def _put(self, register: int, size: int, value: int) -> None:
        self.ram[register : register + size] = value.to_bytes(size, "little")

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "index": self.index,
                "offset_us": round(self.offset * 1_000_000),
                "ram": self.ram.hex(),
            }

    def load(self, state: dict[str, Any]) -> None:
        """The clock goes on with the host's: `offset` is kept, however long ago it was saved. Raises
        ValueError
        for what `save` cannot have said.
        """
        saved = SavedState("real-time clock", state)
        index = saved.number("index", 0x7F)
        offset = saved.number("offset_us", MAX_OFFSET * 1_000_000, MIN_OFFSET * 1_000_000)
        ram = saved.exactly("ram", len(self.ram))
        if ram[REGISTER_A] & 0x80 or ram[REGISTER_B] & ~B_BITS:
            raise saved.wrong("ram", "has bits in registers A and B that this clock has not")
        with self._lock:
            self.index = index
            self.offset = offset / 1_000_000
            self.ram[:] = ram

    def read_byte(self, offset: int) -> int:
        if offset != DATA_PORT:
            return 0xFF  # the index cannot be read back
        with self._lock:
            if self.index in CLOCK_REGISTERS and not self.ram[REGISTER_B] & B_SET:
                self._latch()
            return self.ram[self.index]

    def write_byte(self, offset: int, value: int) -> None:
        with self._lock:
            if offset == INDEX_PORT:
                self.index = value & 0x7F  # bit 7 masks NMIs, of which there are none
            elif offset == DATA_PORT:
                self._write(self.index, value)

    def _write(self, register: int, value: int) -> None:
        if register in CLOCK_REGISTERS:
            if self.ram[REGISTER_B] & B_SET:
                self.ram[register] = value
            else:
                self._latch()
                self.ram[register] = value
                self._set_clock()
        elif register == REGISTER_A:
            self.ram[REGISTER_A] = value & 0x7F
        elif register == REGISTER_B:
            was_set = self.ram[REGISTER_B] & B_SET
            if value & B_SET and not was_set:
                self._latch()
            self.ram[REGISTER_B] = value & B_BITS
            if was_set and not value & B_SET:
                self._set_clock()
        elif register not in (REGISTER_C, REGISTER_D):
            self.ram[register] = value

    def _latch(self) -> None:
        """Put the current time into the clock registers."""
        now = time.gmtime(self._clock() + self.offset)
        hours = now.tm_hour
        afternoon = 0
        if not self.ram[REGISTER_B] & B_24_HOURS:
            afternoon = HOUR_PM if hours >= 12 else 0
            hours = hours % 12 or 12
        self.ram[SECONDS] = self._encode(min(now.tm_sec, 59))
        self.ram[MINUTES] = self._encode(now.tm_min)
        self.ram[HOURS] = self._encode(hours) | afternoon
        self.ram[WEEKDAY] = self._encode((now.tm_wday + 1) % 7 + 1)  # Sunday is 1
        self.ram[DAY] = self._encode(now.tm_mday)
        self.ram[MONTH] = self._encode(now.tm_mon)
        self.ram[YEAR] = self._encode(now.tm_year % 100)
        self.ram[CENTURY] = self._encode(now.tm_year // 100)

    def _set_clock(self) -> None:
        """Take the clock registers as the guest's time. It may have written anything: out of range is
        clamped."""
        from calendar import timegm  # here: few guests do this, and every start would pay

        hours = self.ram[HOURS]
        if not self.ram[REGISTER_B] & B_24_HOURS:
            hours = self._decode(hours & ~HOUR_PM) % 12 + (12 if hours & HOUR_PM else 0)
        else:
            hours = self._decode(hours)
        year = 100 * self._decode(self.ram[CENTURY]) + self._decode(self.ram[YEAR])
        month = self._decode(self.ram[MONTH])
        midnight = timegm((min(max(year, 1970), 9000), min(max(month, 1), 12), 1, 0, 0, 0))
        day, minutes, seconds = (self._decode(self.ram[i]) for i in (DAY, MINUTES, SECONDS))
        set_to = midnight + 86400 * (max(day, 1) - 1) + 3600 * hours + 60 * minutes + seconds
        self.offset = set_to - self._clock()

    def _encode(self, value: int) -> int:
        return value if self.ram[REGISTER_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.ram[REGISTER_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)
