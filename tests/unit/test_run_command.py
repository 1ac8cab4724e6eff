"""A command as a shell has it: exit codes, streams, terminal, signals, time limits. The agent is real, and
on the host; what uses it is a process of its own, as `vmrun exec` is.
"""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent_guest import agent
from vmrun.agent.protocol import ExitStatus
from vmrun.errors import EXIT_TIMEOUT
from vmrun.image.config import ImageConfig
from vmrun.run import command as commands
from vmrun.run.phases import Phases

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
MIB = 1 << 20

# Arguments: the agent's socket, "tty" or "pipes", the time limit in seconds or 0, the seconds of grace, and
# the command.
PROGRAM = """
import socket, sys, time
from vmrun.agent.session import AgentSession
from vmrun.agent.process import Process
from vmrun.errors import UserError
from vmrun.image.config import ImageConfig
from vmrun.run import command
from vmrun.run.phases import Phases

fd, kind, limit, grace, *argv = sys.argv[1:]
command.GRACE_SECONDS = float(grace)
timeout = float(limit) or None
with AgentSession(socket.socket(fileno=int(fd))) as session:
    session.hello(20)
    place = command.Place(session.exec, Process.wait, ImageConfig())
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    wanted = command.Command(tuple(argv), env=(("PATH", "/usr/bin:/bin"),), tty=kind == "tty")
    try:
        outcome = command.run(place, wanted, deadline, timeout, Phases())
    except UserError as error:
        outcome = command.Outcome(error.code, str(error), own=True)
print(outcome.own, outcome.started, outcome.stopped, outcome.reason, file=sys.stderr)
sys.exit(outcome.code)
"""


@contextmanager
def running(
    *argv: str,
    kind: str = "pipes",
    limit: float = 0,
    grace: float = 10,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """The process, and the agent's."""
    with agent() as (sock, guest):
        command = [sys.executable, "-c", PROGRAM, str(sock.fileno()), kind, str(limit), str(grace), *argv]
        fds = [sock.fileno()]
        with subprocess.Popen(
            command, cwd=ROOT, pass_fds=fds, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        ) as process:
            try:
                yield process, guest
            finally:
                guest.send_signal(signal.SIGCONT)
                process.kill()


def run(*argv: str, input: bytes | None = None, limit: float = 0) -> tuple[int, bytes, bytes, str]:
    """The code, what the command printed, and the last line, about how it ended."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with running(*argv, stdin=stdin, limit=limit) as (process, _):
        out, err = process.communicate(input, timeout=SECONDS)
        said, _, last = err.rstrip(b"\n").rpartition(b"\n")
        # What the command printed need not end with a newline.
        return process.returncode, out, said, last.decode()


def shell(script: str, **options: float) -> tuple[int, bytes, bytes, str]:
    return run("sh", "-c", script, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [0, 1, 42, 126, 127, 255])
def test_exit_codes(code: int) -> None:
    assert shell(f"exit {code}") == (code, b"", b"", f"False True False exit code {code}")


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV"])
def test_death_by_signal(name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    assert shell(f"kill -{name} $$") == (128 + number, b"", b"", f"False True False killed by SIG{name}")


def test_what_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, _, last = run("no-such-program")
    assert (code, last.split()[:4]) == (127, ["False", "False", "False", "no-such-program"])
    code, _, _, last = run(str(tmp_path / "file"))
    assert code == 126 and "Permission denied" in last


def test_streams_are_apart_and_exact() -> None:
    data = os.urandom(4 * MIB)
    code, out, said, _ = run("sh", "-c", "tee /dev/stderr; printf end; echo >&2", input=data)
    assert (code, out) == (0, data + b"end")
    assert said == data


def test_many_bytes_in_and_out() -> None:
    data = os.urandom(64 * MIB)
    code, out, _, _ = run("cat", input=data)
    assert code == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_input_that_never_ends_holds_nothing_up() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb", buffering=0) as more:
        more.write(b"line\nmore")
        with running("sh", "-c", "read x; echo $x", stdin=read_end) as (process, _):
            out, _ = process.communicate(timeout=SECONDS)
            assert (process.returncode, out) == (0, b"line\n")


def test_a_reader_that_goes_away() -> None:
    with running("yes") as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"])
def test_signals_reach_the_command(name: str) -> None:
    script = f"trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 0.05; done"
    with running("sh", "-c", script) as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.Signals[f"SIG{name}"])
        out, _ = process.communicate(timeout=SECONDS)
        assert (process.returncode, out) == (7, f"got {name}\n".encode())


def test_a_command_that_does_not_end_when_asked() -> None:
    with running("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done", grace=0.5) as (
        process,
        _,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 128 + signal.SIGTERM
        assert err == b"True True True did not end within 0.5 s of SIGTERM\n"


def test_time_is_up() -> None:
    code, out, said, last = shell("echo so far; echo and here >&2; sleep 1000", limit=2)
    assert (code, out, said) == (EXIT_TIMEOUT, b"so far\n", b"and here")
    assert last == "True True True timed out after 2 s"


def test_time_is_up_though_the_guest_does_not_listen() -> None:
    read_end, write_end = os.pipe()
    # More input than all the buffers on the way hold: whoever sends it is stuck.
    feeder = subprocess.Popen(["sh", "-c", "cat /dev/zero"], stdout=write_end, stderr=subprocess.DEVNULL)
    os.close(write_end)
    try:
        with running("sh", "-c", "echo ready; cat > /dev/null", limit=3, stdin=read_end) as (process, guest):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            guest.send_signal(signal.SIGSTOP)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(SECONDS) == EXIT_TIMEOUT
    finally:
        os.close(read_end)
        feeder.kill()
        feeder.wait()


def test_time_is_up_though_nobody_takes_the_output() -> None:
    with running("sh", "-c", "head -c 200000 /dev/zero; exit 0", limit=2) as (process, _):
        assert process.wait(SECONDS) == EXIT_TIMEOUT


class Starting:
    """A place whose guest takes its time for the start of a command, and asks for a signal meanwhile."""

    def __init__(self, ask: Callable[[], None] = lambda: None) -> None:
        self.ask = ask
        self.go = threading.Event()
        self.signalled = threading.Event()
        self.heard: list[int] = []

    def execute(self, *_: Any, **how: Any) -> Any:
        self.ask()
        self.go.wait()
        return self

    # What the command is.

    output_error = None

    def signal(self, number: int) -> None:
        self.heard.append(number)
        self.signalled.set()

    def poll(self) -> object:
        return self

    def wait(self, process: object, timeout: float) -> ExitStatus:
        assert self.signalled.wait(SECONDS)
        return ExitStatus(3, None, False, 0)

    def run(self, timeout: float | None) -> commands.Outcome:
        place = commands.Place(self.execute, self.wait, ImageConfig())
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        rescue = threading.Timer(SECONDS, self.go.set)
        rescue.start()
        try:
            return commands.run(place, commands.Command(("x",)), deadline, timeout, Phases())
        finally:
            self.go.set()
            rescue.cancel()


def test_time_is_up_before_the_guest_has_started_it() -> None:
    outcome = Starting().run(0.2)
    assert outcome == commands.Outcome(
        EXIT_TIMEOUT, "timed out after 0.2 s", own=True, started=False, stopped=True
    )


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_ends_what_the_guest_does_not_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "START_GRACE_SECONDS", 0.2)
    number = signal.Signals[f"SIG{name}"]
    outcome = Starting(lambda: os.kill(os.getpid(), number)).run(None)
    assert (outcome.code, outcome.own, outcome.started, outcome.stopped) == (128 + number, True, False, True)
    assert outcome.reason == f"SIG{name} before the guest had started the command"


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1"])
def test_a_signal_reaches_what_is_just_being_started(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "START_GRACE_SECONDS", SECONDS)
    number = signal.Signals[f"SIG{name}"]
    seen = threading.Event()
    noticed = commands._Asked.signal

    def notice(asked: commands._Asked, number: int) -> None:
        noticed(asked, number)
        seen.set()

    def ask() -> None:
        os.kill(os.getpid(), number)
        assert seen.wait(SECONDS)
        starting.go.set()

    monkeypatch.setattr(commands._Asked, "signal", notice)
    starting = Starting(ask)
    assert starting.run(None).code == 3
    assert starting.heard == [number]


def test_what_the_start_fails_with_is_told() -> None:
    def fail() -> None:
        raise ValueError("a NUL character")

    with pytest.raises(ValueError, match="a NUL"):
        Starting(fail).run(None)


class Terminal:
    """A pseudo-terminal: our end, and the one that a command runs on."""

    def __init__(self) -> None:
        self.fd, self.theirs = pty.openpty()
        self.resize(33, 99)
        self._seen = b""

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.fd, (rows, columns))

    def expect(self, text: bytes) -> None:
        while text not in self._seen:
            self._seen += os.read(self.fd, 65536)
        self._seen = self._seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.theirs)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.close()


def test_a_terminal(terminal: Terminal) -> None:
    before = termios.tcgetattr(terminal.theirs)
    script = (
        "trap 'stty size' WINCH; trap 'echo interrupted; exit 9' INT; stty size; test -t 2 && tty; "
        "echo ready; while :; do sleep 0.05; done"
    )
    fd = terminal.theirs
    with running("sh", "-c", script, kind="tty", stdin=fd, stdout=fd, stderr=fd) as (process, _):
        terminal.expect(b"33 99\r\n/dev/pts/")
        terminal.expect(b"ready")
        assert termios.tcgetattr(fd) != before
        terminal.resize(40, 120)
        process.send_signal(signal.SIGWINCH)
        terminal.expect(b"40 120\r\n")
        terminal.type(b"\x03")
        terminal.expect(b"interrupted")
        assert process.wait(SECONDS) == 9
    assert termios.tcgetattr(fd) == before


def test_a_terminal_gets_what_is_typed_to_its_end(terminal: Terminal) -> None:
    fd = terminal.theirs
    with running("sh", "-c", "echo ready; cat; echo after", kind="tty", stdin=fd, stdout=fd) as (process, _):
        terminal.expect(b"ready")
        terminal.type(b"a line\n\x04")
        terminal.expect(b"a line\r\na line\r\nafter")
        assert process.wait(SECONDS) == 0


def test_what_was_typed_before_counts(terminal: Terminal) -> None:
    fd = terminal.theirs
    terminal.type(b"typed before\n")
    with running("sh", "-c", "read x; echo got $x", kind="tty", stdin=fd, stdout=fd) as (process, _):
        terminal.expect(b"got typed before")
        assert process.wait(SECONDS) == 0


def test_a_terminal_must_be_one() -> None:
    with running("true", kind="tty") as (process, _):
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 64
    assert b"stdin is not a terminal" in err
