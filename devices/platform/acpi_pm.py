"""The ACPI fixed hardware: power button, sleep control, PM timer, and the reset register. VMM process.

ACPI 6.4, section 4.8 (fixed hardware) and 4.8.3.6 (reset register). There is no SMI command port, so the
machine is in ACPI mode from the start and SCI_EN reads as one. Sleep states other than S5 do not exist. The
timer never raises its carry interrupt (TMR_STS stays zero): ACPICA and Linux only read the counter.

The FADT describes: PM1a_EVT at +0 (4 bytes), PM1a_CNT at +4 (2 bytes), PM_TMR at +8 (4 bytes; TMR_VAL_EXT
when it has 32 bits), RESET_REG at +12 (1 byte) with RESET_VALUE 1, and S5 as {5, 5} in the DSDT.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from devices.board import IrqLine
from devices.state import SavedState

STATUS, ENABLE, CONTROL, TIMER, RESET = 0, 2, 4, 8, 12
SIZE = 13

POWER_BUTTON = 1 << 8
# Timer, global lock, power button, sleep button, clock: what an OS may enable. It reads back what it wrote to
# be sure.
ENABLE_BITS = 1 << 0 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10

CONTROL_SCI_EN = 1 << 0
CONTROL_BM_RLD = 1 << 1
CONTROL_SLP_TYP_SHIFT = 10
CONTROL_SLP_TYP = 7 << CONTROL_SLP_TYP_SHIFT
CONTROL_SLP_EN = 1 << 13

S5_SLP_TYP = 5
RESET_VALUE = 1
TIMER_HZ = 3_579_545
MAX_UPTIME = 1 << 62  # nanoseconds


class AcpiPm:
    """Thirteen ports. `irq` is the SCI's input.

    `on_power_off` (S5) and `on_reset` are called on the vCPU's thread, without the lock. `timer_bits` is 24
    or 32; `timer_start` is the CLOCK_MONOTONIC nanosecond at which the timer was zero.
    """

    __slots__ = (
        "_irq",
        "_lock",
        "control",
        "enable",
        "irq_level",
        "on_power_off",
        "on_reset",
        "status",
        "timer_bits",
        "timer_start",
    )

    def __init__(
        self,
        irq: IrqLine,
        on_power_off: Callable[[], None],
        on_reset: Callable[[], None],
        *,
        timer_bits: int = 32,
    ) -> None:
        if timer_bits not in (24, 32):
            raise ValueError(f"a PM timer has 24 or 32 bits, not {timer_bits}")
        self._irq = irq
        self._lock = threading.Lock()
        self.on_power_off = on_power_off
        self.on_reset = on_reset
        self.timer_bits = timer_bits
        self.timer_start = time.monotonic_ns()
        self.status = 0
        self.enable = 0
        self.control = CONTROL_SCI_EN
        self.irq_level = False

    def press_power_button(self) -> None:
        """Ask the guest's OS to shut down: an SCI, if it enabled the button. Safe from any thread."""
        with self._lock:
            self.status |= POWER_BUTTON
            self._update_irq()

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "status": self.status,
                "enable": self.enable,
                "control": self.control,
                "timer_bits": self.timer_bits,
                "timer_ns": time.monotonic_ns() - self.timer_start,
            }

    def load(self, state: dict[str, Any]) -> None:
        """The timer goes on from where it was saved: a counter that jumps would look broken. Raises
        ValueError
        for what `save` cannot have said. Drives the interrupt line.
        """
        saved = SavedState("ACPI power management", state)
        status = saved.bits("status", POWER_BUTTON)
        enable = saved.bits("enable", ENABLE_BITS)
        control = saved.bits("control", CONTROL_BM_RLD | CONTROL_SLP_TYP | CONTROL_SCI_EN)
        if not control & CONTROL_SCI_EN:
            raise saved.wrong("control", "is not in ACPI mode")
        saved.same("timer_bits", self.timer_bits, "timer width")
        elapsed = saved.number("timer_ns", MAX_UPTIME)
        with self._lock:
            self.status, self.enable, self.control = status, enable, control
            self.timer_start = time.monotonic_ns() - elapsed
            self._update_irq()

    def read(self, offset: int, size: int) -> int:
        # Registers are read as one picture, so that a wide read of the timer is a single moment.
        with self._lock:
            picture = (
                self.status
                | self.enable << 8 * ENABLE
                | self.control << 8 * CONTROL
                | self._timer() << 8 * TIMER
            )
        return picture >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        power_off = reset = False
        with self._lock:
            for i in range(size):
                register, byte = offset + i, value >> 8 * i & 0xFF
                if STATUS <= register < ENABLE:
                    self.status &= ~(byte << 8 * (register - STATUS))  # a one clears
                elif ENABLE <= register < CONTROL:
                    self.enable = _replace(self.enable, register - ENABLE, byte) & ENABLE_BITS
                elif CONTROL <= register < CONTROL + 2:
                    written = _replace(self.control, register - CONTROL, byte)
                    self.control = written & (CONTROL_BM_RLD | CONTROL_SLP_TYP) | CONTROL_SCI_EN
                    sleep = (written & CONTROL_SLP_TYP) >> CONTROL_SLP_TYP_SHIFT
                    power_off |= bool(written & CONTROL_SLP_EN) and sleep == S5_SLP_TYP
                elif register == RESET:
                    reset |= byte == RESET_VALUE
            self._update_irq()
        if power_off:
            self.on_power_off()
        if reset:
            self.on_reset()

    def _timer(self) -> int:
        elapsed = time.monotonic_ns() - self.timer_start
        return elapsed * TIMER_HZ // 1_000_000_000 & (1 << self.timer_bits) - 1

    def _update_irq(self) -> None:
        level = bool(self.status & self.enable)
        if level != self.irq_level:
            self.irq_level = level
            self._irq.set_level(level)


def _replace(word: int, index: int, byte: int) -> int:
    """`word` with its byte `index` replaced."""
    return word & ~(0xFF << 8 * index) | byte << 8 * index
