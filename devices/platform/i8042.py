"""The i8042 keyboard controller, with nothing plugged in: there for the CPU reset line. VMM process.

After the IBM PS/2 keyboard controller: data at port 0x60, status and commands at 0x64. The two are inserted
into the bus one by one, because 0x61 between them belongs to the timer. Every question gets its answer at
once, so no driver waits for a keyboard: there is no auxiliary port, the test of the keyboard port fails, and
a byte for the keyboard is answered by 0xFE ("resend") with an interrupt, as the chip does when no keyboard
clocks its line.
"""

import threading
from collections.abc import Callable
from typing import Any

from devices.board import IrqLine
from devices.platform.isa import ByteDevice
from devices.state import SavedState

STATUS_OUTPUT_FULL = 0x01
STATUS_SYSTEM = 0x04  # the self-test passed
STATUS_COMMAND = 0x08  # the last write was a command
STATUS_UNLOCKED = 0x10
STATUS_TIMEOUT = 0x40
STATUS_BITS = STATUS_OUTPUT_FULL | STATUS_SYSTEM | STATUS_COMMAND | STATUS_UNLOCKED | STATUS_TIMEOUT

CONFIG_KEYBOARD_INTERRUPT = 0x01
CONFIG_SYSTEM = 0x04
CONFIG_KEYBOARD_DISABLED = 0x10
CONFIG_AUX_DISABLED = 0x20
CONFIG_TRANSLATE = 0x40

READ_CONFIG = 0x20
WRITE_CONFIG = 0x60
DISABLE_AUX = 0xA7
ENABLE_AUX = 0xA8
TEST_AUX = 0xA9
SELF_TEST = 0xAA
TEST_KEYBOARD = 0xAB
DISABLE_KEYBOARD = 0xAD
ENABLE_KEYBOARD = 0xAE
READ_INPUT_PORT = 0xC0
READ_OUTPUT_PORT = 0xD0
WRITE_OUTPUT_PORT = 0xD1
WRITE_KEYBOARD_OUTPUT = 0xD2
WRITE_AUX_OUTPUT = 0xD3
WRITE_AUX = 0xD4
PULSE_OUTPUT_PORT = (
    0xF0  # to 0xFF: pulses the lines whose low bits are clear, the lowest being the CPU's reset
)

WITH_PARAMETER = (WRITE_CONFIG, WRITE_OUTPUT_PORT, WRITE_KEYBOARD_OUTPUT, WRITE_AUX_OUTPUT, WRITE_AUX)

SELF_TEST_PASSED = 0x55
CLOCK_LINE_STUCK = 0x01
RESEND = 0xFE
OUTPUT_NOT_RESET = 0x01
OUTPUT_A20 = 0x02


class _DataPort(ByteDevice):
    __slots__ = ("_controller",)

    def __init__(self, controller: "I8042") -> None:
        self._controller = controller

    def read_byte(self, offset: int) -> int:
        return 0xFF if offset else self._controller.read_data()

    def write_byte(self, offset: int, value: int) -> None:
        if not offset:
            self._controller.write_data(value)


class _CommandPort(ByteDevice):
    __slots__ = ("_controller",)

    def __init__(self, controller: "I8042") -> None:
        self._controller = controller

    def read_byte(self, offset: int) -> int:
        return 0xFF if offset else self._controller.read_status()

    def write_byte(self, offset: int, value: int) -> None:
        if not offset:
            self._controller.write_command(value)


class I8042:
    """`data` belongs at port 0x60 and `command` at 0x64, one byte each; `irq` is input 1.

    `on_reset` is called on the vCPU's thread, without the lock, when the guest pulls the reset line.
    """

    __slots__ = (
        "_irq",
        "_lock",
        "command",
        "config",
        "data",
        "from_keyboard",
        "irq_level",
        "on_reset",
        "output",
        "pending",
        "status",
    )

    def __init__(self, irq: IrqLine, on_reset: Callable[[], None]) -> None:
        self._irq = irq
        self._lock = threading.Lock()
        self.on_reset = on_reset
        self.data = _DataPort(self)
        self.command = _CommandPort(self)
        self.config = CONFIG_TRANSLATE | CONFIG_AUX_DISABLED | CONFIG_KEYBOARD_DISABLED | CONFIG_SYSTEM
        self.status = STATUS_UNLOCKED | STATUS_SYSTEM
        self.output = 0  # the last byte put out; whether it was read yet is in `status`
        self.from_keyboard = False  # it came from the keyboard's side, so it interrupts
        self.pending = 0  # the command whose parameter the next data byte is, or 0
        self.irq_level = False

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "config": self.config,
                "status": self.status,
                "output": self.output,
                "from_keyboard": self.from_keyboard,
                "pending": self.pending,
            }

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `save` cannot have said. Drives the interrupt line."""
        saved = SavedState("keyboard controller", state)
        config, output = saved.number("config", 0xFF), saved.number("output", 0xFF)
        status = saved.bits("status", STATUS_BITS)
        from_keyboard = saved.flag("from_keyboard")
        pending = saved.number("pending", 0xFF)
        if pending and pending not in WITH_PARAMETER:
            raise saved.wrong("pending", "is no command with a parameter")
        with self._lock:
            self.config, self.output, self.status = config, output, status
            self.from_keyboard, self.pending = from_keyboard, pending
            self._update_irq()

    def read_status(self) -> int:
        with self._lock:
            return self.status

    def read_data(self) -> int:
        with self._lock:
            self.status &= ~(STATUS_OUTPUT_FULL | STATUS_TIMEOUT)
            self._update_irq()
            return self.output

    def write_data(self, value: int) -> None:
        with self._lock:
            command, self.pending = self.pending, 0
            self.status &= ~STATUS_COMMAND
            reset = command == WRITE_OUTPUT_PORT and not value & OUTPUT_NOT_RESET
            if command == WRITE_CONFIG:
                self.config = value
            elif command == WRITE_KEYBOARD_OUTPUT:
                self._put(value, from_keyboard=True)
            elif command == WRITE_AUX_OUTPUT:
                # Without an auxiliary port this is an unknown command, and its parameter a byte for nobody.
                self._put(RESEND, STATUS_TIMEOUT)
            elif command != WRITE_OUTPUT_PORT:
                # For the keyboard, whose interface a byte enables, or for the auxiliary device: neither is
                # there.
                if command != WRITE_AUX:
                    self.config &= ~CONFIG_KEYBOARD_DISABLED
                self._put(RESEND, STATUS_TIMEOUT, from_keyboard=True)
            self._update_irq()
        if reset:
            self.on_reset()

    def write_command(self, value: int) -> None:
        with self._lock:
            self.pending = 0
            self.status |= STATUS_COMMAND
            if value == READ_CONFIG:
                self._put(self.config)
            elif value in WITH_PARAMETER:
                self.pending = value
            elif value == SELF_TEST:
                self.status |= STATUS_SYSTEM
                self._put(SELF_TEST_PASSED)
            elif value in (TEST_KEYBOARD, TEST_AUX):
                self._put(CLOCK_LINE_STUCK)
            elif value == DISABLE_AUX:
                self.config |= CONFIG_AUX_DISABLED
            elif value == DISABLE_KEYBOARD:
                self.config |= CONFIG_KEYBOARD_DISABLED
            elif value == ENABLE_KEYBOARD:
                self.config &= ~CONFIG_KEYBOARD_DISABLED
            elif value == READ_INPUT_PORT:
                self._put(0x80)  # the keyboard is not locked
            elif value == READ_OUTPUT_PORT:
                self._put(OUTPUT_NOT_RESET | OUTPUT_A20)
            # ENABLE_AUX finds nothing to enable: the configuration keeps saying so.
            self._update_irq()
        if value >= PULSE_OUTPUT_PORT and not value & OUTPUT_NOT_RESET:
            self.on_reset()

    def _put(self, value: int, status: int = 0, from_keyboard: bool = False) -> None:
        self.output = value
        self.from_keyboard = from_keyboard
        self.status = self.status & ~STATUS_TIMEOUT | STATUS_OUTPUT_FULL | status

    def _update_irq(self) -> None:
        wanted = self.from_keyboard and self.config & CONFIG_KEYBOARD_INTERRUPT
        level = bool(self.status & STATUS_OUTPUT_FULL and wanted)
        if level != self.irq_level:
            self.irq_level = level
            self._irq.set_level(level)
