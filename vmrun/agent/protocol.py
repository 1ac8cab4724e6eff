"""The agent's protocol in bytes: frames, the hello, fields, and what the guest's answers mean.

docs/agent.md is its text, vmrun/guestkit/agent/agent.h the guest's copy of these numbers. All numbers are
little-endian. Nothing here does input or output.
"""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSION = 1
HEADER = struct.Struct("<BBHI")  # type, flags, channel, bytes of payload
PAYLOAD_MAX = 65536
WINDOW = 262144
"""Bytes that a stream's sender may have under way."""
REQUEST_MAX = 4 << 20

MAGIC = b"\xf5vmrun-agent\xc1\xe2\xd3\xb4"
NONCE_BYTES = 16
HELLO = struct.Struct("<16sHHI16s16s")  # magic, version, flags, window, own nonce, echo of the other's
NOBODY = bytes(NONCE_BYTES)
HELLO_AT_ONCE = 1
"""A flag of a hello: frames follow at once. In the agent's: it takes them."""

REQUEST, REPLY, DATA, END, CREDIT, EXIT, SIGNAL, RESIZE, STOP = range(1, 10)
FLAG_MORE = 1  # of a REQUEST
FLAG_FAMILY = 1  # of a SIGNAL
STDIN, STDOUT, STDERR = range(3)  # the streams of a channel, in the flags of DATA, END, CREDIT and STOP

OP_EXEC, OP_PUT, OP_GET, OP_PING, OP_SET_TIME, OP_ADD_ENTROPY, OP_INFO = range(1, 8)
OP_MOUNT, OP_HOSTNAME, OP_POWER, OP_SYNC, OP_NETWORK = range(8, 13)

EXEC_TTY, EXEC_MERGE, EXEC_NO_STDIN, EXEC_KEEP = 1, 2, 4, 8
COPY_SPECIAL_BITS = 1
LINGER_FOREVER = 0xFFFFFFFF

STAGE_SETUP, STAGE_USER, STAGE_CWD, STAGE_EXEC = range(1, 5)
_STAGES = {STAGE_USER: "user", STAGE_CWD: "working directory", STAGE_EXEC: "program"}

_REPLY = struct.Struct("<IB3x")  # errno, stage; data follows
_EXIT = struct.Struct("<BBBxI")  # by a signal, core dumped, code or signal, OOM kills meanwhile
_ERRNO_MAX = 4095

EXIT_CANNOT_RUN = 126
EXIT_NOT_FOUND = 127
_SIGNAL_BASE = 128


class AgentError(Exception):
    """The agent could not do what it was asked for; the text is one line for people."""


class AgentGone(AgentError):
    """The connection to the agent has ended, or it does not answer: its guest, or the agent, is gone."""


class AgentProtocolError(AgentGone):
    """The guest sent what the protocol does not allow. The session is over."""


class AgentRefused(AgentError):
    """The guest's kernel refused: `errno` is the guest's, `stage` what it was about (STAGE_*, or 0)."""

    def __init__(self, what: str, number: int, stage: int = 0) -> None:
        where = f" ({_STAGES[stage]})" if stage in _STAGES else ""
        # A hostile image chooses the words of its own command.
        super().__init__(f"{one_line(what)}{where}: {os.strerror(number)}")
        self.errno = number
        self.stage = stage

    @property
    def exit_code(self) -> int:
        """What a shell exits with for a command that did not start: 127 not found, 126 otherwise."""
        missing = self.stage == STAGE_EXEC and self.errno in (errno.ENOENT, errno.ENOTDIR)
        return EXIT_NOT_FOUND if missing else EXIT_CANNOT_RUN


class ExitStatus:
    """How a command ended: with `code` (0 to 255) or by `signal`; the one that does not apply is None.

    `oom_kills` counts the processes that the guest killed for want of memory while the command ran: in the
    command's own cgroup where the guest has cgroups, else anywhere in the guest.
    """

    __slots__ = ("code", "core_dumped", "oom_kills", "signal")

    def __init__(self, code: int | None, signal: int | None, core_dumped: bool, oom_kills: int) -> None:
        self.code = code
        self.signal = signal
        self.core_dumped = core_dumped
        self.oom_kills = oom_kills

    @property
    def exit_code(self) -> int:
        """As a shell says it: the code, or 128 and the signal's number."""
        return self.code if self.code is not None else _SIGNAL_BASE + (self.signal or 0)

    @property
    def out_of_memory(self) -> bool:
        """Whether want of memory is what ended it: killed, or it says so of a child, and there were kills."""
        return self.oom_kills > 0 and self.exit_code != 0

    def __repr__(self) -> str:
        how = f"code {self.code}" if self.code is not None else f"signal {self.signal}"
        return f"<ExitStatus {how}, {self.oom_kills} OOM kills>"


def frame(kind: int, flags: int, channel: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, flags, channel, len(payload)) + payload


def pieces(payload: bytes) -> Iterator[bytes]:
    """Cut into what fits a frame, and wherever MAGIC stands: the agent looks for it in all that comes."""
    at = 0
    while at < len(payload):
        end = min(at + PAYLOAD_MAX, len(payload))
        found = payload.find(MAGIC, at, end)
        if found >= 0:
            end = found + 1
        yield payload if at == 0 and end == len(payload) else payload[at:end]
        at = end


def request_frames(channel: int, operation: int, fields: bytes) -> Iterator[bytes]:
    """Raises ValueError when the request is longer than the agent takes."""
    whole = struct.pack("<I", operation) + fields
    if len(whole) > REQUEST_MAX:
        raise ValueError("the command line and the environment are longer than 4 MiB")
    parts = list(pieces(whole))
    for part in parts[:-1]:
        yield frame(REQUEST, FLAG_MORE, channel, part)
    yield frame(REQUEST, 0, channel, parts[-1])


def text(value: str | bytes) -> bytes:
    """A string field. Raises ValueError for a NUL, which no name, argument or variable can hold."""
    encoded = os.fsencode(value)
    if b"\0" in encoded:
        raise ValueError(f"a NUL character in {encoded[:40]!r}")
    return struct.pack("<I", len(encoded)) + encoded


def texts(values: Sequence[str | bytes]) -> bytes:
    return struct.pack("<I", len(values)) + b"".join(text(value) for value in values)


def hello(nonce: bytes, echo: bytes, flags: int = 0) -> bytes:
    return HELLO.pack(MAGIC, VERSION, flags, WINDOW, nonce, echo)


def parse_reply(payload: bytes) -> tuple[int, int, bytes]:
    """errno (0: done), stage, data."""
    if len(payload) < _REPLY.size:
        raise AgentProtocolError("the guest sent a reply that is too short")
    number, stage = _REPLY.unpack_from(payload)
    if number > _ERRNO_MAX:
        raise AgentProtocolError("the guest sent an errno that is none")
    return number, stage, payload[_REPLY.size :]


def parse_exit(payload: bytes) -> ExitStatus:
    if len(payload) != _EXIT.size:
        raise AgentProtocolError("the guest sent an exit of the wrong length")
    by_signal, core, value, kills = _EXIT.unpack(payload)
    if by_signal > 1 or core > 1 or (by_signal and not 1 <= value <= 64):
        raise AgentProtocolError("the guest sent an exit that cannot be")
    return ExitStatus(None if by_signal else value, value if by_signal else None, bool(core), kills)


def printable(data: bytes) -> str:
    """What the guest says, for a terminal: no control characters, which could do anything to it."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in data.decode("utf-8", "replace"))


def one_line(name: str | bytes) -> str:
    """The same for a name or a line, which stays one."""
    return printable(os.fsencode(name)).replace("\n", "?")
