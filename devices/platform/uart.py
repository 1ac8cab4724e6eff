"""A 16550A UART: the serial console. VMM process; vCPU threads use the registers, the main loop feeds it
input.

After National Semiconductor's PC16550D data sheet. There is no line and so no baud rate: what is written has
been sent at once (LSR always says THRE and TEMT), so no driver ever waits for it. Parity, framing errors and
breaks do not occur.
"""

import threading
from collections.abc import Callable
from typing import Any

from devices.board import IrqLine
from devices.platform.isa import ByteDevice
from devices.state import SavedState

# Register offsets. With LCR.DLAB set, the first two are the divisor latch.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RECEIVED = 0x01
IER_TRANSMIT_EMPTY = 0x02
IER_LINE_STATUS = 0x04
IER_MODEM_STATUS = 0x08

# Interrupt identification, highest priority first.
IIR_LINE_STATUS = 0x06
IIR_RECEIVED = 0x04
IIR_TIMEOUT = 0x0C  # characters wait below the trigger level
IIR_TRANSMIT_EMPTY = 0x02
IIR_MODEM_STATUS = 0x00
IIR_NONE = 0x01
IIR_FIFOS_ENABLED = 0xC0

FCR_ENABLE = 0x01
FCR_CLEAR_RECEIVE = 0x02
FCR_TRIGGER_SHIFT = 6
FCR_BITS = FCR_ENABLE | 3 << FCR_TRIGGER_SHIFT  # those kept
TRIGGER_LEVELS = (1, 4, 8, 14)
FIFO_SIZE = 16

LCR_DLAB = 0x80

MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10

LSR_DATA_READY = 0x01
LSR_OVERRUN = 0x02
LSR_TRANSMIT_EMPTY = 0x20 | 0x40  # THRE and TEMT

MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_TRAILING_RI = 0x04

# This many looks at LSR in a row, with nothing sent in between, are somebody waiting for input without
# interrupts.
POLLS_OF_A_LISTENER = 16


class Uart(ByteDevice):
    """Eight ports. `output` is called for every byte sent, on the vCPU's thread, and must be quick.

    Input is held back (`feed` takes nothing) until the guest listens: it enabled the receive interrupt, or it
    polls the line status. Otherwise what was typed or piped in before a driver came up would be lost when the
    driver empties the FIFO. `on_room` is called, from whichever thread made room, when `feed` could take more
    after it had taken less than it was given. Callbacks run without the lock held and may call `feed`.
    """

    __slots__ = (
        "_irq",
        "_lock",
        "divisor",
        "fcr",
        "ier",
        "irq_level",
        "lcr",
        "mcr",
        "modem_delta",
        "on_room",
        "output",
        "overrun",
        "polls",
        "received",
        "scr",
        "starved",
        "transmit_empty",
    )

    def __init__(
        self, irq: IrqLine, output: Callable[[bytes], None], on_room: Callable[[], None] = lambda: None
    ) -> None:
        self._irq = irq
        self._lock = threading.Lock()
        self.output = output
        self.on_room = on_room
        self.ier = 0
        self.fcr = 0
        self.lcr = 0
        self.mcr = 0
        self.scr = 0
        self.divisor = 12  # 9600 baud, what firmware leaves
        self.received = bytearray()
        self.overrun = False
        self.transmit_empty = False  # the THRE interrupt is pending
        self.modem_delta = 0  # MSR bits 0 to 3
        self.polls = 0
        self.starved = False  # feed() could not take all
        self.irq_level = False

    def feed(self, data: bytes) -> int:
        """Take input from the line: returns how many of the first bytes of `data` were taken, perhaps
        none."""
        with self._lock:
            taken = min(self._room(), len(data))
            self.received += data[:taken]
            self.starved = taken < len(data)
            if taken:
                self._update_irq()
            return taken

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "ier": self.ier,
                "fcr": self.fcr,
                "lcr": self.lcr,
                "mcr": self.mcr,
                "scr": self.scr,
                "divisor": self.divisor,
                "received": self.received.hex(),
                "overrun": self.overrun,
                "transmit_empty": self.transmit_empty,
                "modem_delta": self.modem_delta,
                "polls": self.polls,
                "starved": self.starved,
            }

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `save` cannot have said. Drives the interrupt line."""
        saved = SavedState("serial port", state)
        fcr = saved.bits("fcr", FCR_BITS)
        if fcr and not fcr & FCR_ENABLE:
            raise saved.wrong("fcr", "has a trigger level without FIFOs")
        registers = {
            "ier": saved.number("ier", 0x0F),
            "lcr": saved.number("lcr", 0xFF),
            "mcr": saved.number("mcr", 0x1F),
            "scr": saved.number("scr", 0xFF),
            "divisor": saved.number("divisor", 0xFFFF),
            "modem_delta": saved.number("modem_delta", 0x0F),
            "polls": saved.number("polls", POLLS_OF_A_LISTENER),
            "overrun": saved.flag("overrun"),
            "transmit_empty": saved.flag("transmit_empty"),
            "starved": saved.flag("starved"),
        }
        received = saved.data("received", FIFO_SIZE if fcr & FCR_ENABLE else 1)
        with self._lock:
            for name, value in registers.items():
                setattr(self, name, value)
            self.fcr = fcr
            self.received = bytearray(received)
            self._update_irq()

    def read_byte(self, offset: int) -> int:
        with self._lock:
            value = self._read(offset)
            wake = self.starved and self._room() > 0
            if wake:
                self.starved = False
        if wake:
            self.on_room()
        return value

    def write_byte(self, offset: int, value: int) -> None:
        with self._lock:
            sent = self._write(offset, value)
            wake = self.starved and self._room() > 0
            if wake:
                self.starved = False
        if sent:
            self.output(bytes((value,)))
        if wake:
            self.on_room()

    def _room(self) -> int:
        listening = self.ier & IER_RECEIVED or self.polls >= POLLS_OF_A_LISTENER
        if not listening or self.mcr & MCR_LOOP:
            return 0
        return self._capacity() - len(self.received)

    def _capacity(self) -> int:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    def _read(self, offset: int) -> int:
        if offset == LSR:
            value = LSR_TRANSMIT_EMPTY
            if self.received:
                value |= LSR_DATA_READY
            elif self.polls < POLLS_OF_A_LISTENER:
                self.polls += 1
            if self.overrun:
                value |= LSR_OVERRUN
                self.overrun = False
                self._update_irq()
            return value
        if offset == DATA:
            if self.lcr & LCR_DLAB:
                return self.divisor & 0xFF
            if not self.received:
                return 0
            value = self.received.pop(0)
            self._update_irq()
            return value
        if offset == IER:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == IIR_FCR:
            cause = self._cause()
            if cause == IIR_TRANSMIT_EMPTY:
                # Reading the cause is what acknowledges it.
                self.transmit_empty = False
                self._update_irq()
            return cause | IIR_FIFOS_ENABLED if self.fcr & FCR_ENABLE else cause
        if offset == LCR:
            return self.lcr
        if offset == MCR:
            return self.mcr
        if offset == MSR:
            value = self._modem_lines() | self.modem_delta
            self.modem_delta = 0
            self._update_irq()
            return value
        if offset == SCR:
            return self.scr
        return 0xFF

    def _write(self, offset: int, value: int) -> bool:
        """Returns whether the byte goes out on the line."""
        if offset == DATA:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF00 | value
                return False
            self.polls = 0
            self.transmit_empty = True  # again: it left at once
            if self.mcr & MCR_LOOP:
                self._loop_back(value)
            self._update_irq()
            return not self.mcr & MCR_LOOP
        if offset == IER:
            if self.lcr & LCR_DLAB:
                self.divisor = value << 8 | self.divisor & 0xFF
                return False
            if value & ~self.ier & IER_TRANSMIT_EMPTY:
                # Enabling the interrupt while the transmitter is empty raises it: Linux tests for that.
                self.transmit_empty = True
            self.ier = value & 0x0F
            self._update_irq()
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            before = self._modem_lines()
            self.mcr = value & 0x1F
            after = self._modem_lines()
            self.modem_delta |= (before ^ after) >> 4 & ~MSR_TRAILING_RI
            if before & ~after & MSR_RI:
                self.modem_delta |= MSR_TRAILING_RI
            self._update_irq()
        elif offset == SCR:
            self.scr = value
        return False

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE or (value & FCR_ENABLE and value & FCR_CLEAR_RECEIVE):
            self.received.clear()
        # The other bits are only taken together with the enable bit.
        self.fcr = value & FCR_BITS if value & FCR_ENABLE else 0
        self._update_irq()

    def _loop_back(self, value: int) -> None:
        if len(self.received) < self._capacity():
            self.received.append(value)
            return
        self.overrun = True
        if not self.fcr & FCR_ENABLE:
            self.received[0] = value  # without a FIFO the new character replaces the old one

    def _modem_lines(self) -> int:
        if not self.mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD
        lines = 0
        for output, line in ((MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)):
            if self.mcr & output:
                lines |= line
        return lines

    def _cause(self) -> int:
        if self.ier & IER_LINE_STATUS and self.overrun:
            return IIR_LINE_STATUS
        if self.ier & IER_RECEIVED and self.received:
            if (
                not self.fcr & FCR_ENABLE
                or len(self.received) >= TRIGGER_LEVELS[self.fcr >> FCR_TRIGGER_SHIFT]
            ):
                return IIR_RECEIVED
            # A real chip waits four character times before it says so; here they have always passed.
            return IIR_TIMEOUT
        if self.ier & IER_TRANSMIT_EMPTY and self.transmit_empty:
            return IIR_TRANSMIT_EMPTY
        if self.ier & IER_MODEM_STATUS and self.modem_delta:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update_irq(self) -> None:
        # A PC lets OUT2 gate the line. That is left out, as in QEMU: small kernels were written without it.
        level = self.ier != 0 and self._cause() != IIR_NONE
        if level != self.irq_level:
            self.irq_level = level
            self._irq.set_level(level)
