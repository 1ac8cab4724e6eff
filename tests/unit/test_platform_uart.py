"""The 16550A as drivers meet it: detection, the interrupt rules, loopback, and input that must not be
lost."""

import threading

import pytest

from devices.platform.uart import (
    DATA,
    FIFO_SIZE,
    IER,
    IIR_FCR,
    LCR,
    LSR,
    MCR,
    MSR,
    POLLS_OF_A_LISTENER,
    SCR,
    Uart,
)

ENABLE_FIFO, CLEAR_BOTH, TRIGGER_8 = 0x01, 0x06, 0x80
LOOP = 0x10


class Line:
    """An interrupt line that remembers every change."""

    def __init__(self) -> None:
        self._high = False
        self.changes: list[bool] = []

    def set_level(self, asserted: bool) -> None:
        self._high = asserted
        self.changes.append(asserted)

    def high(self) -> bool:
        return self._high


class Port:
    """The UART with its surroundings, and the register access of a driver."""

    def __init__(self) -> None:
        self.line = Line()
        self.sent = bytearray()
        self.room_calls = 0
        self.uart = Uart(self.line, self.sent.extend, self.on_room)

    def on_room(self) -> None:
        self.room_calls += 1

    def read(self, register: int) -> int:
        return self.uart.read(register, 1)

    def write(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)


@pytest.fixture
def port() -> Port:
    return Port()


def test_bytes_go_out_one_by_one(port: Port) -> None:
    calls: list[bytes] = []
    port.uart.output = calls.append
    for byte in b"Linux":
        assert port.read(LSR) & 0x60 == 0x60  # always ready: nobody waits
        port.write(DATA, byte)
    assert calls == [b"L", b"i", b"n", b"u", b"x"]


def test_linux_detects_a_16550a(port: Port) -> None:
    """The steps of Linux' 8250 autoconfiguration, also those for the clones it must not take us for."""
    port.write(IER, 0)
    assert port.read(IER) & 0x0F == 0
    port.write(IER, 0x0F)
    assert port.read(IER) & 0x0F == 0x0F
    port.write(IER, 0)
    port.write(MCR, LOOP | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, 0)
    port.write(LCR, 0xBF)
    port.write(IIR_FCR, 0)
    port.write(LCR, 0)
    port.write(IIR_FCR, ENABLE_FIFO)
    assert port.read(IIR_FCR) >> 6 == 3
    # ST16650 and its like have an enhanced feature register that reads as zero here.
    for lcr in (0x80, 0xBF):
        port.write(LCR, lcr)
        assert port.read(IIR_FCR) != 0
    # A National SuperIO shows MCR's loop bit in its bank 2.
    port.write(LCR, 0xE0)
    before = port.read(IIR_FCR)
    port.write(LCR, 0)
    port.write(MCR, LOOP)
    port.write(LCR, 0xE0)
    assert not (port.read(IIR_FCR) ^ before) & LOOP
    port.write(LCR, 0)
    port.write(MCR, 0)
    # A TI16750 has 64-byte FIFOs, an XScale a unit enable bit.
    port.write(IIR_FCR, ENABLE_FIFO | 0x20)
    assert port.read(IIR_FCR) >> 5 == 6
    port.write(IER, 0x40)
    assert port.read(IER) == 0
    # And the receive FIFO holds 16 bytes.
    port.write(IIR_FCR, ENABLE_FIFO | CLEAR_BOTH)
    port.write(MCR, LOOP)
    for byte in range(256):
        port.write(DATA, byte)
    count = 0
    while port.read(LSR) & 1:
        assert port.read(DATA) == count
        count += 1
    assert count == 16
    assert not port.sent


def test_linux_finds_no_transmit_bugs(port: Port) -> None:
    """The THRE and TXEN tests of serial8250_do_startup."""
    for _ in range(2):
        port.write(IER, 0x02)
        assert port.line.high()
        assert port.read(IIR_FCR) == 0x02
        assert not port.line.high()
        assert port.read(IIR_FCR) == 0x01
        port.write(IER, 0)


def test_transmit_interrupt_comes_after_each_byte(port: Port) -> None:
    port.write(IER, 0x02)
    assert port.read(IIR_FCR) == 0x02
    assert not port.line.high()
    port.write(DATA, 0x41)
    assert port.line.high()
    assert port.read(IIR_FCR) == 0x02
    assert not port.line.high()


def test_enabling_again_does_not_raise_it_again(port: Port) -> None:
    port.write(IER, 0x02)
    port.read(IIR_FCR)
    port.write(IER, 0x03)
    assert not port.line.high()


def test_interrupt_priorities(port: Port) -> None:
    port.write(IIR_FCR, ENABLE_FIFO)
    port.write(MCR, LOOP)
    for _ in range(FIFO_SIZE + 1):
        port.write(DATA, 0x55)
    port.write(IER, 0x0F)
    assert port.read(IIR_FCR) == 0xC6  # overrun
    assert port.read(LSR) == 0x63
    assert port.read(LSR) == 0x61  # reading acknowledges
    assert port.read(IIR_FCR) == 0xC4  # data
    assert port.read(IIR_FCR) == 0xC4  # reading does not acknowledge that
    for _ in range(FIFO_SIZE):
        assert port.read(DATA) == 0x55
    assert port.read(IIR_FCR) == 0xC2  # transmitter, acknowledged by reading
    assert port.read(IIR_FCR) == 0xC0  # modem status
    assert port.line.high()
    port.read(MSR)
    assert port.read(IIR_FCR) == 0xC1
    assert not port.line.high()


def test_trigger_level(port: Port) -> None:
    port.write(IIR_FCR, ENABLE_FIFO | TRIGGER_8)
    port.write(IER, 0x01)
    assert port.uart.feed(b"1234567") == 7
    assert port.line.high()
    assert port.read(IIR_FCR) == 0xCC  # below the level: as after the character timeout
    assert port.uart.feed(b"8") == 1
    assert port.read(IIR_FCR) == 0xC4
    assert bytes(port.read(DATA) for _ in range(8)) == b"12345678"
    assert not port.line.high()
    assert port.line.changes == [True, False]
    assert port.read(DATA) == 0


def test_back_pressure(port: Port) -> None:
    port.write(IIR_FCR, ENABLE_FIFO)
    port.write(IER, 0x01)
    text = bytes(range(40))
    assert port.uart.feed(text) == FIFO_SIZE
    assert port.uart.feed(text[FIFO_SIZE:]) == 0
    assert port.room_calls == 0
    assert port.read(DATA) == 0
    assert port.room_calls == 1
    assert port.read(DATA) == 1
    assert port.room_calls == 1  # once told, nothing new until feed() falls short again
    assert port.uart.feed(text[FIFO_SIZE:]) == 2
    port.read(DATA)
    assert port.room_calls == 2


def test_on_room_may_feed(port: Port) -> None:
    rest = bytearray(b"a longer line than the FIFO takes at once")
    whole = bytes(rest)

    def refill() -> None:
        del rest[: port.uart.feed(bytes(rest))]

    port.uart.on_room = refill
    refill()
    assert rest == whole
    port.write(IIR_FCR, ENABLE_FIFO)
    port.write(IER, 0x01)
    got = bytearray()
    while port.read(LSR) & 1:
        got.append(port.read(DATA))
    assert got == whole


def test_one_byte_without_fifo(port: Port) -> None:
    port.write(IER, 0x01)
    assert port.uart.feed(b"ab") == 1
    assert port.read(IIR_FCR) == 0x04
    assert port.read(DATA) == ord("a")
    assert port.uart.feed(b"b") == 1


def test_input_waits_for_a_listener(port: Port) -> None:
    """A driver empties the FIFO when it starts: what was piped in before must still be there afterwards."""
    assert port.uart.feed(b"echo hello\n") == 0
    port.write(IIR_FCR, ENABLE_FIFO | CLEAR_BOTH)
    port.read(DATA)
    assert port.room_calls == 0
    port.write(IER, 0x05)
    assert port.room_calls == 1
    assert port.uart.feed(b"echo hello\n") == 11


def test_a_poller_is_a_listener(port: Port) -> None:
    port.uart.feed(b"x")
    for _ in range(POLLS_OF_A_LISTENER * 2):  # a console driver: looks once per byte it sends
        port.read(LSR)
        port.write(DATA, 0x2E)
    assert port.room_calls == 0
    for _ in range(POLLS_OF_A_LISTENER):
        assert not port.read(LSR) & 1
    assert port.room_calls == 1
    assert port.uart.feed(b"x") == 1
    assert port.read(LSR) & 1
    assert port.read(DATA) == ord("x")


def test_no_input_from_the_line_in_loopback(port: Port) -> None:
    port.write(IER, 0x01)
    port.write(MCR, LOOP)
    assert port.uart.feed(b"x") == 0
    port.write(MCR, 0)
    assert port.room_calls == 1


def test_loopback_modem_lines(port: Port) -> None:
    assert port.read(MSR) == 0xB0
    port.write(MCR, LOOP)
    assert port.read(MSR) == 0x0B  # three lines fell
    assert port.read(MSR) == 0x00
    for output, line in ((0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)):
        port.write(MCR, LOOP | output)
        assert port.read(MSR) & 0xF0 == line
    port.write(MCR, LOOP | 0x04)
    assert port.read(MSR) == 0x48  # DCD fell; RI rose, which is no event
    port.write(MCR, LOOP)
    assert port.read(MSR) == 0x04  # only the trailing edge of RI counts


def test_overrun_without_fifo_keeps_the_newest(port: Port) -> None:
    port.write(MCR, LOOP)
    port.write(DATA, 1)
    port.write(DATA, 2)
    assert port.read(LSR) & 0x02
    assert port.read(DATA) == 2


def test_changing_the_fifo_enable_bit_empties_it(port: Port) -> None:
    port.write(MCR, LOOP)
    port.write(IIR_FCR, ENABLE_FIFO)
    port.write(DATA, 1)
    port.write(IIR_FCR, ENABLE_FIFO)
    assert port.read(LSR) & 1
    port.write(IIR_FCR, 0)
    assert not port.read(LSR) & 1
    assert port.read(IIR_FCR) == 0x01


def test_divisor_and_scratch(port: Port) -> None:
    port.write(LCR, 0x83)
    port.write(DATA, 0x34)
    port.write(IER, 0x12)
    assert (port.uart.divisor, port.read(DATA), port.read(IER)) == (0x1234, 0x34, 0x12)
    port.write(LCR, 0x03)
    assert (port.read(IER), port.read(LCR)) == (0, 0x03)
    port.write(SCR, 0xA5)
    assert port.read(SCR) == 0xA5
    assert not port.sent


def test_wide_accesses_are_byte_cycles(port: Port) -> None:
    port.uart.write(LCR, 2, 0x0B_03)
    assert (port.read(LCR), port.read(MCR)) == (0x03, 0x0B)
    assert port.uart.read(LCR, 2) == 0x0B03
    assert port.uart.read(6, 4) >> 16 == 0xFFFF
    port.uart.write(0x1000, 8, (1 << 64) - 1)


def test_threads_lose_no_byte(port: Port) -> None:
    """The main loop feeds while a vCPU thread reads."""
    port.write(IIR_FCR, ENABLE_FIFO)
    port.write(IER, 0x01)
    text = bytes(i & 0xFF for i in range(600))
    room = threading.Event()
    port.uart.on_room = room.set
    got = bytearray()

    def vcpu() -> None:
        while len(got) < len(text):
            if port.read(LSR) & 1:
                got.append(port.read(DATA))

    thread = threading.Thread(target=vcpu)
    thread.start()
    sent = 0
    while sent < len(text):
        room.clear()
        sent += port.uart.feed(text[sent:])
        if sent < len(text):
            assert room.wait(30)
    thread.join(30)
    assert got == text
