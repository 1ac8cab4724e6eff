"""The console hub and its log: many ends, none of which makes another wait."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.platform.uart import Uart
from vmrun.host.console import Console
from vmrun.host.console_hub import INPUT_LIMIT, ConsoleHub
from vmrun.host.console_log import ConsoleLog, read_log
from vmrun.machine.loop import EventLoop
from vmrun.machine.serial import SerialLink


@pytest.fixture
def log(tmp_path: Path) -> Iterator[ConsoleLog]:
    with ConsoleLog(tmp_path / "console.log", limit=100) as log:
        yield log


@pytest.fixture
def hub(log: ConsoleLog) -> Iterator[ConsoleHub]:
    with ConsoleHub(None, log, limit=50) as hub:
        yield hub


@given(st.lists(st.binary(max_size=350), max_size=20))
def test_a_log_keeps_the_last(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    with ConsoleLog(path, limit=100) as log:
        for piece in pieces:
            log.append(piece)
        written = b"".join(pieces)
        kept = log.read()
        assert written.endswith(kept) and min(100, len(written)) <= len(kept) <= 200
    assert read_log(path) == kept


def test_a_full_file_system_is_survived(log: ConsoleLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    log.append(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.append(b"12345")
    log.append(b"after")
    assert log.read() == b"before\r\n[vmrun: 5 bytes of console output lost]\r\nafter"


def test_output_goes_everywhere(hub: ConsoleHub) -> None:
    first: list[bytes] = []
    second: list[bytes] = []
    hub.write(b"a")
    hub.flush()
    hub.attach(first.append)
    hub.write(b"b")
    hub.on_wake()
    hub.attach(second.append)
    hub.write(b"c")
    hub.on_wake()
    hub.detach(first.append)
    hub.write(b"d")
    hub.on_wake()
    hub.detach(first.append)
    assert (first, second, hub.log.read()) == ([b"b", b"c"], [b"c", b"d"], b"abcd")
    assert not hub.pending_output


def test_a_main_loop_that_is_late_costs_the_oldest(hub: ConsoleHub) -> None:
    hub.write(b"x" * 40)
    hub.write(b"y" * 40)
    hub.on_wake()
    text = hub.log.read()
    assert text == b"\r\n[vmrun: 30 bytes of console output lost]\r\n" + b"x" * 10 + b"y" * 40


def test_input_is_bounded(hub: ConsoleHub) -> None:
    rooms = []
    hub.on_room = lambda: rooms.append(hub.room)
    assert hub.on_input_ready() == b""
    hub.type_in(b"z" * INPUT_LIMIT)
    assert hub.room == 0
    assert hub.on_input_ready(1000) == b"z" * 1000 and not rooms
    assert hub.on_input_ready() == b"z" * (INPUT_LIMIT - 1000)
    assert rooms == [INPUT_LIMIT] and hub.on_input_ready() == b""


class NoLine:
    def set_level(self, asserted: bool) -> None:
        pass


def test_the_terminal_and_listeners_share_one_serial_port(log: ConsoleLog) -> None:
    """On a real loop, with a UART: input from both, in bursts larger than the UART's FIFO."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    loop = EventLoop()
    with Console(in_read, out_write) as console, ConsoleHub(console, log) as hub:
        link = SerialLink(loop, hub, lambda: None)
        uart = Uart(NoLine(), hub.write, link.room_in_uart)
        link.start(uart)
        got = bytearray()

        def guest() -> None:
            """Polls, reads, and echoes, until it has read 600 bytes."""
            while len(got) < 600:
                if uart.read(5, 1) & 1:
                    byte = uart.read(0, 1)
                    got.append(byte)
                    uart.write(0, 1, byte)
                else:
                    time.sleep(0.0001)
            loop.call_soon(lambda: loop.call_later(0, loop.stop) and None)

        os.write(in_write, b"t" * 300)
        hub.type_in(b"l" * 200)
        loop.call_soon(lambda: hub.type_in(b"l" * 100))
        thread = threading.Thread(target=guest)
        thread.start()
        loop.run()
        thread.join()
        os.close(in_write)
        hub.flush()
    loop.close()
    assert sorted(got) == sorted(b"t" * 300 + b"l" * 300)
    assert os.read(out_read, 1000) == bytes(got)
    assert log.read() == bytes(got[-len(log.read()) :])
    for fd in (in_read, out_read, out_write):
        os.close(fd)


def test_the_end_of_the_terminals_input_is_not_the_end_of_input(log: ConsoleLog) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"typed")
    os.close(write_end)
    with Console(read_end, -1) as console, ConsoleHub(console, log) as hub:
        assert hub.on_input_ready() == b"typed"
        assert hub.on_input_ready() == b"" and console.input_ended and not hub.input_ended
        hub.type_in(b"later")
        assert hub.on_input_ready() == b"later"
    os.close(read_end)
