"""One command in a sandbox, as a shell has it: terminal or pipes, signals, time limits, exit code. Owner's
process, main thread.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

from vmrun.agent.process import Process
from vmrun.agent.protocol import STAGE_CWD, STAGE_USER, AgentError, AgentRefused
from vmrun.errors import EXIT_GUEST_MEMORY, EXIT_TIMEOUT, UserError
from vmrun.run.phases import Phases

if TYPE_CHECKING:
    from vmrun.agent.protocol import ExitStatus
    from vmrun.image.config import ImageConfig

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# A command that was asked to end by one of these has so many seconds for it.
ENDING = (signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 10.0
# One that is asked to end while it is being started may have started: so long it may take to say so.
START_GRACE_SECONDS = 2.0
LOOK_SECONDS = 0.5
# When the time is up: for the command to be killed, and for what it has printed to arrive.
KILL_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and how. `tty`: it gets a terminal, ours."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    workdir: str | None = None
    user: str | None = None
    tty: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The exit code for the shell, and why in one line. `own` tells vmrun's codes from the command's,
    `started` whether the guest has started it, `stopped` whether it had to be ended.
    """

    code: int
    reason: str
    own: bool = False
    started: bool = True
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where commands run: how to start one (`vmrun.agent.session.AgentSession.exec`), how to wait for its end
    (`Process.wait`), and what the image says of itself.
    """

    execute: Callable[..., Process]
    wait: "Callable[[Process, float], ExitStatus]"
    image_config: "ImageConfig"


def run(place: Place, command: Command, deadline: float, timeout: float | None, phases: Phases) -> Outcome:
    """Run `command` to its end, with our own stdin, stdout and stderr; it is stopped at `deadline` (of
    time.monotonic), which was `timeout` seconds away, and when we are interrupted. Raises UserError and
    AgentError when the machine ends instead.
    """
    argv = command.argv or (*place.image_config.entrypoint, *place.image_config.cmd)
    if not argv and command.tty:
        argv = ("/bin/sh",)
    if not argv:
        raise UserError("no command: give one behind --, as in vmrun run -- uname -a")
    # Signals first: the command may run, and somebody see that it does, before we know.
    with _signals() as asked, _terminal(command.tty) as size:
        try:
            with phases.phase("start of the command"):
                process = _started(
                    lambda: place.execute(
                        argv,
                        env=_environment(command),
                        cwd=command.workdir,
                        user=command.user,
                        tty=size,
                        stdin=0,
                        stdout=1,
                        stderr=2,
                    ),
                    deadline,
                    asked,
                )
        except AgentRefused as error:
            return Outcome(error.exit_code, _refusal(error, command), started=False)
        if process is None:
            return _not_started(deadline, timeout, asked)
        asked.begin(process)
        try:
            with phases.phase("command"):
                return _wait(place, process, deadline, timeout, asked)
        finally:
            if process.poll() is None:
                process.end(KILL_SECONDS)


def _started(execute: Callable[[], Process], deadline: float, asked: "_Asked") -> Process | None:
    """What `execute` starts; None when it has not until `deadline`, or soon after we were asked to end. It is
    on a thread then, until its session ends: a hostile guest may take the request for ever.
    """
    done: SimpleQueue[Process | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            done.put(execute())
        except BaseException as error:
            done.put(error)

    threading.Thread(target=work, name="start", daemon=True).start()
    while True:
        left = min(deadline, asked.start_deadline) - time.monotonic()
        try:
            # In slices, as below.
            result = done.get(timeout=min(max(left, 0.0), LOOK_SECONDS))
        except Empty:
            if left <= 0:
                return None
            continue
        if isinstance(result, BaseException):
            raise result
        return result


def _not_started(deadline: float, timeout: float | None, asked: "_Asked") -> Outcome:
    if asked.start_deadline < deadline:
        name = signal.Signals(asked.first).name
        code, reason = 128 + asked.first, f"{name} before the guest had started the command"
    else:
        code, reason = EXIT_TIMEOUT, f"timed out after {timeout:g} s"
    return Outcome(code, reason, own=True, started=False, stopped=True)


def start(place: Place, command: Command) -> Outcome:
    """Have `command` run on without us; what it prints goes to the guest's console. Raises AgentError."""
    try:
        place.execute(
            command.argv, env=_environment(command), cwd=command.workdir, user=command.user, keep=True
        )
    except AgentRefused as error:
        return Outcome(error.exit_code, _refusal(error, command), started=False)
    return Outcome(0, "it runs")


def _environment(command: Command) -> dict[str, str]:
    given = dict(command.env)
    if command.tty and "TERM" in os.environ:
        given.setdefault("TERM", os.environ["TERM"])
    return given


class _Asked:
    """What the command was asked to do: by which signal to end, and until when it may take. A thread tells
    the guest, for a guest may not listen, and signal handlers and time limits cannot wait for it. `first` and
    `start_deadline` are the same for one that has not been started yet.
    """

    def __init__(self) -> None:
        self.number = self.first = 0
        self.deadline = self.start_deadline = float("inf")
        self._orders: SimpleQueue[Callable[[Process], None] | None] = SimpleQueue()

    def begin(self, process: Process) -> None:
        """Tell `process`, from what was asked until now on."""
        threading.Thread(target=self._tell, args=(process,), name="asked", daemon=True).start()

    def signal(self, number: int) -> None:
        if number in (signal.SIGINT, *ENDING) and not self.first:
            self.first, self.start_deadline = number, time.monotonic() + START_GRACE_SECONDS
        if number in ENDING and not self.number:
            self.number, self.deadline = number, time.monotonic() + GRACE_SECONDS
        self._orders.put(lambda process: process.signal(number))

    def resize(self) -> None:
        try:
            rows, columns = _size()
        except OSError:
            return  # no terminal
        self._orders.put(lambda process: process.resize(rows, columns))

    def close(self) -> None:
        self._orders.put(None)

    def _tell(self, process: Process) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order(process)
            except AgentError:
                return  # the machine has ended, which is noticed elsewhere


def _wait(place: Place, process: Process, deadline: float, timeout: float | None, asked: _Asked) -> Outcome:
    while True:
        left = min(deadline, asked.deadline) - time.monotonic()
        if left <= 0:
            if asked.deadline < deadline:
                name = signal.Signals(asked.number).name
                code, reason = 128 + asked.number, f"did not end within {GRACE_SECONDS:g} s of {name}"
            else:
                code, reason = EXIT_TIMEOUT, f"timed out after {timeout:g} s"
            return Outcome(code, reason, own=True, stopped=True)
        try:
            # In slices: a signal may bring the deadline forward.
            status = place.wait(process, min(left, LOOK_SECONDS))
        except TimeoutError:
            continue
        break
    if process.output_error is not None:
        raise process.output_error
    if status.out_of_memory:
        return Outcome(EXIT_GUEST_MEMORY, "the guest ran out of memory: give it more with --mem", own=True)
    if status.signal is not None:
        return Outcome(status.exit_code, f"killed by {_signal_name(status.signal)}")
    return Outcome(status.exit_code, f"exit code {status.exit_code}")


def _refusal(error: AgentRefused, command: Command) -> str:
    """Why the command was not started, naming what was wrong."""
    why = os.strerror(error.errno).lower()
    if error.stage == STAGE_CWD:
        return f"--workdir {command.workdir}: {why}" if command.workdir else f"the image's directory: {why}"
    if error.stage == STAGE_USER and error.errno == errno.ENOENT:
        return f"--user {command.user}: there is no such user in the guest"
    return str(error)


def _signal_name(number: int) -> str:
    """Python has names for those that C has; the guest may say any."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _signals() -> Iterator[_Asked]:
    """What is sent to us goes to the command."""
    asked = _Asked()

    def forward(number: int, frame: FrameType | None) -> None:
        asked.signal(number)

    def resized(number: int, frame: FrameType | None) -> None:
        asked.resize()

    handlers = {number: forward for number in FORWARDED} | {signal.SIGWINCH: resized}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, former in before.items():
            signal.signal(number, former)
        asked.close()


def _size() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    size = os.get_terminal_size(0)
    return size.lines, size.columns


@contextmanager
def _terminal(wanted: bool) -> Iterator[tuple[int, int] | None]:
    """Our terminal's size, the terminal being raw meanwhile: what is typed is the guest's, Ctrl-C
    included.
    """
    if not wanted:
        yield None
        return
    import termios
    import tty

    if not os.isatty(0):
        raise UserError("-t: stdin is not a terminal: leave -t out, for pipes")
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what was typed already counts
        yield _size()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
