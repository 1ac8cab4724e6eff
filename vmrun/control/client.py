"""Talking to a running machine: one object per machine, a method per command. Any process of the owner's.

The protocol is docs/control.md. Methods raise UserError for what the machine refuses and for a machine that
is not there, and MachineGone when its VMM dies without a word.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vmrun.control import runtime
from vmrun.control.protocol import MAX_RESPONSE, Message, encode
from vmrun.errors import EXIT_VMM, UserError

ANSWER_SECONDS = 15.0  # for commands that are done at once, and for a pause

# What a status may say, of a VMM that was taken over: more than any machine has.
MAX_PID = (1 << 31) - 1
MAX_NUMBER = 1 << 62
MAX_TEXT = 1 << 13


class MachineGone(UserError):
    """The VMM ended, or was killed, and did not say how the machine ended."""

    def __init__(self, name: str) -> None:
        super().__init__(f"machine {name} died: its process is gone", EXIT_VMM)


class NotAnswering(UserError):
    """The VMM is there and does not answer: stopped, in a debugger, or hung."""

    def __init__(self, name: str) -> None:
        super().__init__(f"machine {name} does not answer", EXIT_VMM)


@dataclass(frozen=True, slots=True)
class Status:
    """A machine at a glance. Sizes are bytes, `started` is seconds since the epoch; `workers` are process ids
    by name (blk0, net0 and so on).
    """

    name: str
    pid: int
    state: str
    vcpus: int
    memory: int
    memory_used: int
    disks: int
    nics: int
    started: float
    workers: dict[str, int] = field(default_factory=dict)

    @property
    def uptime(self) -> float:
        """Seconds since the machine was started or reset."""
        return max(0.0, time.time() - self.started)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a machine ended: the exit code that `vmrun boot` has for it, and why in one line."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot: bytes of `memory` that hold something, how many `seconds` the machine held still for it,
    and which disk images are part of it, with those that the machine writes to instead.
    """

    directory: Path
    memory: int
    seconds: float
    disks: dict[str, str]


class MachineClient:
    """A connection to the machine `name`: a context manager. One thread at a time."""

    def __init__(self, name: str, *, timeout: float = ANSWER_SECONDS) -> None:
        """UserError when no machine of that name runs."""
        self.name = name
        self.timeout = timeout
        self._next_id = 0
        self._input = b""
        self._answers: dict[int, Message] = {}
        self._sock = _connect(runtime.find(name), name, timeout)

    def status(self) -> Status:
        return _parse_status(self._ask("status"))

    def inspect(self) -> dict[str, Any]:
        """All there is to know, as JSON has it: the status, `config`, and counters."""
        return self._ask("inspect")

    def stop(self, *, force: bool = False) -> None:
        """Ask the guest to shut down, or with `force` end the machine at once. See `stop_and_wait`."""
        self._ask("stop", force=force)

    def stop_and_wait(self, *, force: bool = False, timeout: float | None = None) -> Ending:
        """Likewise, and return when the machine has ended. TimeoutError after `timeout` seconds."""
        waiting = self._send("wait")  # first, so that the end cannot be missed
        self.stop(force=force)
        return _parse_ending(self._receive(waiting, timeout))

    def reset(self) -> None:
        """Start the guest again, in a machine made anew; returns when that runs."""
        self._receive(self._send("reset"), None)

    def pause(self) -> None:
        """Returns when no vCPU is in the guest any more."""
        self._ask("pause")

    def resume(self) -> None:
        self._ask("resume")

    def resize(self, disk: int, size: int) -> None:
        """Let disk `disk`, counted from 0, have `size` bytes, more than before. The guest is told."""
        self._receive(self._send("resize", disk=disk, size=size), None)

    def snapshot(self, directory: Path, *, end: bool = False) -> "Saved":
        """Write a snapshot of the machine to `directory`, which must not exist. It is paused meanwhile, and
        goes on, or is to `end`. Returns when the snapshot is there, which takes longer for more memory, and
        the machine has ended if it is to.
        """
        path = os.fspath(directory.absolute())
        waiting = self._send("wait") if end else None  # first, so that the end cannot be missed
        result = self._receive(self._send("snapshot", directory=path, end=end), None)
        if waiting is not None:
            # Only then are its disks free for a machine that is restored.
            with suppress(MachineGone):
                self._receive(waiting, None)
        return Saved(
            Path(path),
            int(result.get("memory", 0)),
            float(result.get("seconds", 0.0)),
            result.get("disks", {}),
        )

    def wait(self, timeout: float | None = None) -> Ending:
        """Wait for the machine's end. TimeoutError after `timeout` seconds: then close this."""
        return _parse_ending(self._receive(self._send("wait"), timeout))

    def events(self) -> Iterator[Message]:
        """What happens to the machine from now on, as documented, until it has ended."""
        self._ask("events")
        return self._events()

    def _events(self) -> Iterator[Message]:
        while True:
            try:
                message = self._message(None)
            except MachineGone:
                return
            if "event" in message:
                yield message

    def console(self, *, replay: int = 0) -> socket.socket:
        """The guest's console, as a socket: what it prints (first the last `replay` bytes it has printed) and
        what it is to read. Takes over the connection; the caller closes it.
        """
        return self._stream("console", replay=replay)

    def log(self, *, follow: bool = False) -> socket.socket:
        """What the guest has printed lately, and with `follow` what it prints from now on; likewise."""
        return self._stream("log", follow=follow)

    def _stream(self, command: str, **keys: Any) -> socket.socket:
        number = self._send(command, **keys)
        # Byte for byte at the end of the line: what comes after it is not ours.
        self._receive(number, self.timeout, chunk=1)
        self._sock.settimeout(None)
        sock, self._sock = self._sock, socket.socket(socket.AF_UNIX)
        self._sock.close()
        return sock

    def _ask(self, command: str, **keys: Any) -> Message:
        return self._receive(self._send(command, **keys), self.timeout)

    def _send(self, command: str, **keys: Any) -> int:
        self._next_id += 1
        self._sock.settimeout(self.timeout)
        try:
            self._sock.sendall(encode({"id": self._next_id, "command": command, **keys}))
        except TimeoutError:
            raise NotAnswering(self.name) from None
        except OSError:
            # Closed: it may have said before that it takes no requests from us.
            message = self._message(self.timeout)
            raise (MachineGone(self.name) if message.get("ok", True) else _refusal(message)) from None
        return self._next_id

    def _receive(self, number: int, timeout: float | None, *, chunk: int = 65536) -> Message:
        deadline = None if timeout is None else time.monotonic() + timeout
        while number not in self._answers:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                message = self._message(left, chunk)
            except TimeoutError:
                if timeout == self.timeout:
                    raise NotAnswering(self.name) from None
                raise
            if message.get("id") is None and not message.get("ok", True):
                raise _refusal(message)  # to nobody's request: the connection was refused
            answered = message.get("id")
            # To what nobody asked is kept no answer: a VMM that was taken over could fill our memory.
            if isinstance(answered, int) and 0 < answered <= self._next_id:
                self._answers[answered] = message
        message = self._answers.pop(number)
        if not message.get("ok"):
            raise _refusal(message)
        result = message.get("result")
        return result if isinstance(result, dict) else {}

    def _message(self, timeout: float | None, chunk: int = 65536) -> Message:
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._input:
            if len(self._input) > MAX_RESPONSE:
                raise UserError(f"machine {self.name} answers nonsense", EXIT_VMM)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"machine {self.name}: time is over")
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(chunk)
            except ConnectionResetError:
                data = b""
            if not data:
                raise MachineGone(self.name)
            self._input += data
        line, _, self._input = self._input.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise UserError(f"machine {self.name} answers nonsense", EXIT_VMM)
        return message

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> "MachineClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connect(directory: Path, name: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + timeout
    try:
        directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        sock.close()
        raise MachineGone(name) from None
    try:
        path = runtime.bounded_socket_path(directory / runtime.SOCKET, directory_fd)
        while True:
            try:
                sock.settimeout(max(0.01, deadline - time.monotonic()))
                sock.connect(path)
                return sock
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
                # Between the claim of a name and listen(2) is a moment; or too many connect at once.
                if runtime.running().get(name) is None:
                    raise MachineGone(name) from None
                if time.monotonic() > deadline:
                    raise NotAnswering(name) from error
                time.sleep(0.01)
            except TimeoutError:
                raise NotAnswering(name) from None
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory_fd)


def ending_of(name: str) -> Ending | None:
    """How the detached machine `name` ended, if it has and nobody has used its name since."""
    path = runtime.ended(name)
    if path is None:
        return None
    try:
        return _parse_ending(json.loads((path / runtime.OUTCOME).read_text()))
    except (OSError, ValueError):
        return None


def _parse_status(result: Message) -> Status:
    """Of a confined VMM this may be what its guest says, which took it over: numbers that are none must not
    keep anybody from the list of the other machines, and words go to the user's terminal.
    """
    match result:
        case {
            "name": str(name),
            "pid": int(pid),
            "state": str(state),
            "vcpus": int(vcpus),
            "memory": int(memory),
            "memory_used": int(used),
            "disks": int(disks),
            "nics": int(nics),
            "started": int() | float() as started,
        }:
            workers = _parse_workers(result.get("workers", {}))
            # A comparison with NaN is false.
            if (
                0 < pid <= MAX_PID
                and workers is not None
                and all(0 <= number <= MAX_NUMBER for number in (vcpus, memory, used, disks, nics, started))
            ):
                return Status(
                    *(_line(name), pid, _line(state), vcpus, memory, used, disks, nics, started), workers
                )
    raise UserError("the machine's status is another version's, or nonsense", EXIT_VMM)


def _parse_workers(found: object) -> dict[str, int] | None:
    if not isinstance(found, dict):
        return None
    if not all(isinstance(pid, int) and 0 < pid <= MAX_PID for pid in found.values()):
        return None
    return {_line(name): pid for name, pid in found.items()}


def _parse_ending(result: object) -> Ending:
    """Whose words they are, see `_parse_status`. A code beyond a byte could be taken for success."""
    match result:
        case {"code": int(code), "reason": str(reason)} if 0 <= code <= 255:
            return Ending(code, _line(reason))
    return Ending(EXIT_VMM, "how the machine ended is not known")


def _refusal(message: Message) -> UserError:
    match message.get("error"):
        case {"message": str(text), "exit_code": int(code)} if 0 < code <= 255:
            return UserError(_line(text), code)
        case {"message": str(text)}:
            return UserError(_line(text), EXIT_VMM)
    return UserError("refused", EXIT_VMM)


def _line(text: str) -> str:
    """One line that does nothing to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_TEXT])
