"""The console on real pseudo-terminals, pipes and files: nothing lost, no waiting, the terminal put back."""

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrun.host.console import Console

ROOT = Path(__file__).parents[2]
F_GETPIPE_SZ = 1032


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    controller, terminal = os.openpty()
    yield controller, terminal
    os.close(controller)
    os.close(terminal)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    for fd in (read_end, write_end):
        try:
            os.close(fd)
        except OSError:
            pass  # the test closed it


def readable(fd: int, timeout: float = 10) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


def drain(fd: int) -> bytes:
    os.set_blocking(fd, False)
    data = b""
    try:
        while piece := os.read(fd, 1 << 16):
            data += piece
    except BlockingIOError:
        pass
    return data


def test_terminal_is_raw_inside_and_restored_after(terminal: tuple[int, int]) -> None:
    _, fd = terminal
    before = termios.tcgetattr(fd)
    with Console(fd, fd) as console:
        inside = termios.tcgetattr(fd)
        assert not inside[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        assert inside[1] & termios.OPOST
        assert console.input_fd == fd
    assert termios.tcgetattr(fd) == before
    with pytest.raises(RuntimeError), Console(fd, fd):
        raise RuntimeError
    assert termios.tcgetattr(fd) == before


def test_the_shells_descriptors_stay_blocking(terminal: tuple[int, int], pipe: tuple[int, int]) -> None:
    _, fd = terminal
    with Console(fd, fd) as console:
        console.write(b"x")
        console.on_wake()
        assert os.get_blocking(fd)
    with Console(pipe[0], pipe[1]) as console:
        console.write(b"x")
        console.on_wake()
        assert os.get_blocking(pipe[1])


def test_escape_keys(terminal: tuple[int, int]) -> None:
    controller, fd = terminal
    with Console(fd, fd) as console:
        for typed, expected in [
            (b"ls\r\x03\x04\x1d", b"ls\r\x03\x04\x1d"),  # Ctrl-C, Ctrl-D and Ctrl-] are the guest's
            (b"a\x01\x01b", b"a\x01b"),
            (b"\x01a", b"\x01"),
            (b"1\x01", b"1"),  # half a sequence; the other half comes alone
            (b"q2", b"2"),  # no such key: nothing
            (b"\x01h", b""),
        ]:
            os.write(controller, typed)
            got = b""
            while readable(fd, 0) or (not got and expected):
                got += console.on_input_ready()
            assert got == expected
            assert not console.escape_requested
        console.on_wake()
        assert b"Ctrl-A x" in os.read(controller, 1000)
        os.write(controller, b"z\x01xrest")
        assert readable(fd)
        assert console.on_input_ready() == b"z"
        assert console.escape_requested and not console.input_ended


def test_pipe_input_is_taken_as_it_is(pipe: tuple[int, int], tmp_path: Path) -> None:
    read_end, write_end = pipe
    with (tmp_path / "out").open("wb") as out, Console(read_end, out.fileno()) as console:
        os.write(write_end, b"\x01x\x00\xff")
        assert console.on_input_ready() == b"\x01x\x00\xff"
        os.close(write_end)
        assert readable(console.input_fd)
        assert not console.input_ended
        assert console.on_input_ready() == b""
        assert console.input_ended and not console.escape_requested
        assert console.on_input_ready() == b""


def test_file_and_dev_null_input(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"hello")
    with (tmp_path / "in").open("rb", buffering=0) as file, Console(file.fileno(), 1) as console:
        assert console.input_fd != file.fileno() and readable(console.input_fd)
        assert console.on_input_ready(3) + console.on_input_ready(3) == b"hello"
        assert readable(console.input_fd)
        assert console.on_input_ready() == b"" and console.input_ended
    with open(os.devnull, "rb", buffering=0) as null, Console(null.fileno(), 1) as console:
        assert readable(console.input_fd)
        assert console.on_input_ready() == b"" and console.input_ended


def test_file_output_is_appended_where_the_file_stands(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb", buffering=0) as file, open(os.devnull, "rb") as null:
        file.write(b"before ")
        with Console(null.fileno(), file.fileno()) as console:
            console.write(b"guest ")
            assert readable(console.wake_fd)
            console.on_wake()
            assert not readable(console.wake_fd, 0) and not console.pending_output
            console.write(b"more ")
        file.write(b"after")
    assert (tmp_path / "out").read_bytes() == b"before guest more after"


def test_a_slow_reader_gets_everything_up_to_the_limit(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    capacity = fcntl.fcntl(read_end, F_GETPIPE_SZ)
    sent = os.urandom(3 * capacity)
    received = bytearray()
    with Console(read_end, write_end, limit=len(sent)) as console:
        for start in range(0, len(sent), 1000):
            console.write(sent[start : start + 1000])
        console.on_wake()
        assert console.pending_output
        assert not select.select([], [console.output_fd], [], 0)[1]
        while console.pending_output:
            received += os.read(read_end, 5000)
            console.on_output_ready()
        received += drain(read_end)
    assert received == sent


def test_beyond_the_limit_the_oldest_goes_and_it_says_so(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    with Console(read_end, write_end, limit=1000) as console:
        console.write(b"a" * 600)
        console.write(b"b" * 700)
        console.write(b"c" * 100)
        console.on_wake()
        received = drain(read_end)
        assert (
            received
            == b"\r\n[vmrun: 400 bytes of console output lost]\r\n" + b"a" * 200 + b"b" * 700 + b"c" * 100
        )
        console.write(b"d")
        assert readable(console.wake_fd)
        console.on_wake()
        assert drain(read_end) == b"d"


def test_a_reader_that_goes_away_is_no_error(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    with open(os.devnull, "rb") as null, Console(null.fileno(), write_end) as console:
        os.close(read_end)
        console.write(b"x")
        console.on_wake()
        assert not console.pending_output
        console.write(b"y" * 5000)
        console.on_wake()
        assert not console.pending_output


def run_console(program: str, **how: object) -> subprocess.Popen[bytes]:
    start = "import os, sys, time, threading\nfrom vmrun.host.console import Console\n"
    return subprocess.Popen([sys.executable, "-c", start + program], cwd=ROOT, **how)  # type: ignore[call-overload,no-any-return]


def test_last_output_reaches_a_reader_that_comes_late() -> None:
    program = "with Console() as console: console.write(b'x' * 900000)"
    with run_console(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert readable(child.stdout.fileno())  # the pipe is full, and the child waits for us
        assert child.stdout.read() == b"x" * 900000
        assert child.wait() == 0


def test_a_socket_that_is_full_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()  # blocking, and not to be opened anew
    with ours, open(os.devnull, "rb") as null, theirs, Console(null.fileno(), theirs.fileno()) as console:
        console.write(bytes(1 << 20))
        console.on_wake()
        while select.select([], [console.output_fd], [], 0)[1]:
            console.on_output_ready()
        assert console.pending_output
        ours.close()
        console.on_output_ready()
        assert not console.pending_output


def test_last_output_to_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = "with Console() as console: console.write(b'x' * 5000)"
        with run_console(program, stdin=subprocess.DEVNULL, stdout=theirs) as child:
            assert child.wait() == 0
        theirs.close()
        assert ours.recv(10000, socket.MSG_WAITALL) == b"x" * 5000


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGHUP, 128 + signal.SIGHUP),
        (signal.SIGINT, -signal.SIGINT),
    ],
)
def test_terminal_is_restored_by_a_fatal_signal(terminal: tuple[int, int], number: int, code: int) -> None:
    controller, fd = terminal
    before = termios.tcgetattr(fd)
    program = "with Console() as console:\n  os.write(1, b'ready')\n  time.sleep(600)"
    with run_console(program, stdin=fd, stdout=fd, stderr=subprocess.DEVNULL) as child:
        assert readable(controller)
        assert os.read(controller, 5) == b"ready"
        assert termios.tcgetattr(fd) != before
        child.send_signal(number)
        assert child.wait() == code
    assert termios.tcgetattr(fd) == before


def test_terminal_is_restored_at_exit_without_the_context(terminal: tuple[int, int]) -> None:
    _, fd = terminal
    before = termios.tcgetattr(fd)
    program = "console = Console(); console.__enter__(); sys.exit(3)"
    with run_console(program, stdin=fd, stdout=fd) as child:
        assert child.wait() == 3
    assert termios.tcgetattr(fd) == before


def test_closed_standard_files() -> None:
    program = (
        "os.close(0); os.close(1)\n"
        "with Console() as console:\n"
        "  assert (console.input_fd, console.output_fd, console.input_ended) == (-1, -1, True)\n"
        "  console.write(b'x'); console.on_wake(); assert not console.pending_output\n"
        "  assert console.on_input_ready() == b''\n"
    )
    with run_console(program, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        assert child.stderr.read() == b""
        assert child.wait() == 0


def test_writers_in_threads_lose_nothing(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    received = bytearray()
    with Console(read_end, write_end) as console:
        threads = [
            threading.Thread(target=lambda b=b: [console.write(b) for _ in range(5000)]) for b in (b"a", b"b")
        ]
        for thread in threads:
            thread.start()
        while len(received) < 10000:
            assert readable(console.wake_fd)  # every write after a drain wakes us again
            console.on_wake()
            received += drain(read_end)
        for thread in threads:
            thread.join()
    assert received.count(b"a") == received.count(b"b") == 5000
