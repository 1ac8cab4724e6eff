"""A session with the agent in a guest, over any connected stream socket.

    with AgentSession(sock) as session:
        session.hello(timeout=30)
        session.set_time()
        status = session.exec(["make", "test"], stdout=1, stderr=2).wait()

One thread reads; who calls sends. Methods may be called from any thread. The reader never sends and never
waits for a consumer, so a guest that floods or stalls one stream holds up nothing else on the host.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time

from vmrun.agent import files, protocol
from vmrun.agent.process import Capture, Process
from vmrun.agent.protocol import (
    COPY_SPECIAL_BITS,
    EXEC_KEEP,
    EXEC_MERGE,
    EXEC_NO_STDIN,
    EXEC_TTY,
    HEADER,
    HELLO,
    HELLO_AT_ONCE,
    LINGER_FOREVER,
    MAGIC,
    NOBODY,
    NONCE_BYTES,
    PAYLOAD_MAX,
    STDOUT,
    AgentError,
    AgentGone,
    AgentProtocolError,
    AgentRefused,
)
from vmrun.agent.streams import OutputStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import TypeVar

    from vmrun.agent.process import Sink, Source
    from vmrun.agent.protocol import ExitStatus

    W = TypeVar("W", Process, "_Answer", "_Duty")

MERGED = Capture(0)
"""For `stderr`: into the same pipe as stdout, in the order in which it was written."""
PULL = OutputStream(lambda size: None)
"""For `stdout` and `stderr`: the caller takes it from `process.outputs` itself."""

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8

_RECEIVE_BYTES = 4 * (HEADER.size + PAYLOAD_MAX)
_HELLO_AGAIN = 0.25
_CLOCK_TOLERANCE = 500_000_000  # ns that a restored guest's clock may be off: this is on its way for a while
_CHANNELS = 200
_ERROR_TEXT_BYTES = 4096
_END_SECONDS = 30.0  # for the end of a copy whose last byte has come or gone
_REASON_SECONDS = 5.0  # for what the guest says of one that it broke off
_NUMBERS = frozenset(
    (
        "version",
        "uptime_ms",
        "memory",
        "memory_free",
        "memory_available",
        "processes",
        "oom_kills",
        "pid",
        "cgroup",
    )
)
_WORDS = frozenset(("kernel", "machine", "hostname"))


class _Answer:
    """Waits for the reply to a request that starts nothing."""

    __slots__ = ("_done", "failure", "reply")

    def __init__(self) -> None:
        self._done = threading.Event()
        self.reply: tuple[int, int, bytes] = (0, 0, b"")
        self.failure: AgentGone | None = None

    def on_reply(self, payload: bytes) -> bool:
        self.reply = protocol.parse_reply(payload)
        self._done.set()
        return False

    def on_failure(self, failure: AgentGone) -> None:
        self.failure = failure
        self._done.set()

    def wait(self, timeout: float | None) -> tuple[int, int, bytes]:
        if not self._done.wait(timeout):
            raise TimeoutError("the guest does not answer")
        if self.failure is not None:
            raise self.failure
        return self.reply


class _Duty:
    """The reply to what nobody waits for, and without which the session may not go on."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def on_reply(self, payload: bytes) -> bool:
        number, _, _ = protocol.parse_reply(payload)
        if number:
            raise AgentGone(f"{self._what}: {os.strerror(number)}")
        return False

    def on_failure(self, failure: AgentGone) -> None:
        pass


class AgentSession:
    """Owns `sock` (blocking, SOCK_STREAM). `hello` comes first; then any number of commands at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._channels: dict[int, Process | _Answer | _Duty] = {}
        self._next = 0
        self._nonce = b""
        self._peer_flags = 0
        self._failure: AgentGone | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> AgentSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session: whatever waits on it gets AgentGone. The agent kills its commands later, when the
        next session begins (those with `keep` excepted)."""
        self._fail(AgentGone("the session was closed"))
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()
        with self._sending:  # whoever sends has come back, or would find another's descriptor
            self._sock.close()

    def interrupt(self) -> None:
        """Whatever waits on it gets AgentGone, now and later; `close` still closes it."""
        self._fail(AgentGone("the session was interrupted"))

    def hello(self, timeout: float = 60.0) -> None:
        """Begin: find the agent, past whatever an older session left in the stream.

        Raises TimeoutError when it does not answer, AgentGone at the stream's end, and AgentError when it
        speaks another version.
        """
        deadline = time.monotonic() + timeout
        self._nonce = os.urandom(NONCE_BYTES)
        seen = bytearray()
        again = 0.0
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    raise TimeoutError("the agent in the guest does not answer")
                self._sock.settimeout(deadline - now)
                if now >= again:
                    self._sock.sendall(protocol.hello(self._nonce, NOBODY))
                    again = now + _HELLO_AGAIN
                self._sock.settimeout(min(deadline, again) - now if again > now else 0.001)
                try:
                    data = self._sock.recv(PAYLOAD_MAX)
                except TimeoutError:
                    continue
                if not data:
                    raise AgentGone("the connection to the agent has ended")
                seen += data
                peer = self._find_hello(seen)
                if peer is not None:
                    break
                if MAGIC in data:
                    again = 0.0  # an agent that has just started, and knows nothing of ours
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            self._sock.sendall(protocol.hello(self._nonce, peer))
            self._sock.settimeout(None)
        except TimeoutError:
            raise
        except OSError as error:
            raise AgentGone(f"the connection to the agent has ended: {error.strerror}") from error
        self._listen(bytes(seen))

    def hello_restored(self) -> None:
        """Begin with an agent that waited for a host when its machine was saved: nothing is waited for.

        Before anything that is asked for later the guest gets random numbers of its own, and the right time
        where its clock is more than half a second off. Should it refuse either, the session ends and
        every call raises AgentGone.
        """
        self._nonce = os.urandom(NONCE_BYTES)
        entropy = self._frames(
            lambda channel: _Duty("adding entropy"), protocol.OP_ADD_ENTROPY, os.urandom(64)
        )
        now = time.time_ns()
        fields = struct.pack("<QIQ", now // 10**9, now % 10**9, _CLOCK_TOLERANCE)
        clock = self._frames(lambda channel: _Duty("setting the clock"), protocol.OP_SET_TIME, fields)
        self._listen(None)
        self._send(protocol.hello(self._nonce, NOBODY, HELLO_AT_ONCE) + entropy[1] + clock[1])

    def _listen(self, begun: bytes | None) -> None:
        self._reader = threading.Thread(target=self._read, args=(begun,), daemon=True, name="agent")
        self._reader.start()

    def ping(self, timeout: float | None = 10.0) -> float:
        """The seconds from here to the agent and back."""
        begin = time.monotonic()
        if self.request("ping", protocol.OP_PING, b"ping", timeout) != b"ping":
            raise AgentProtocolError("the guest's answer to a ping is another one")
        return time.monotonic() - begin

    def set_time(self, timeout: float | None = 10.0) -> float:
        """Set the guest's clock to the host's; returns by how many seconds it was ahead."""
        way = min(self.ping(timeout) for _ in range(3)) / 2
        now = time.time_ns() + int(way * 1e9)
        fields = struct.pack("<QI", now // 10**9, now % 10**9)
        answer = self.request("setting the clock", protocol.OP_SET_TIME, fields, timeout)
        if len(answer) != 8:
            raise AgentProtocolError("the guest's time is not one")
        return float(int.from_bytes(answer, "little") - now) / 1e9

    def add_entropy(self, entropy: bytes | None = None, timeout: float | None = 10.0) -> None:
        """Reseed the guest's random number generator, with 64 fresh bytes when none are given (32 to 512)."""
        self.request("adding entropy", protocol.OP_ADD_ENTROPY, entropy or os.urandom(64), timeout)

    def after_restore(self, timeout: float | None = 10.0) -> None:
        """What a clone needs before anything else runs in it: its own random numbers, and the right time."""
        self.add_entropy(timeout=timeout)
        self.set_time(timeout)

    def info(self, timeout: float | None = 10.0) -> dict[str, int | str]:
        """Facts about the guest, as it tells them: kernel, machine, hostname (str), uptime_ms, memory,
        memory_free, memory_available (bytes), processes, oom_kills, pid, cgroup, version (int)."""
        facts: dict[str, int | str] = {}
        for line in protocol.printable(self.request("info", protocol.OP_INFO, b"", timeout)).splitlines():
            name, _, value = line.partition("=")
            if name in _NUMBERS and value.isascii() and value.isdigit() and len(value) < 20:
                facts[name] = int(value)
            elif name in _WORDS:
                facts[name] = value[:256]
        return facts

    def set_hostname(self, name: str, timeout: float | None = 10.0) -> None:
        self.request("setting the host name", protocol.OP_HOSTNAME, protocol.text(name), timeout)

    def set_network(
        self,
        interface: str,
        address: str,
        prefix: int,
        gateway: str | None = None,
        timeout: float | None = 10.0,
    ) -> None:
        """Give `interface` an IPv4 address, bring it up, and route all through `gateway`."""
        numbers = [
            int.from_bytes(socket.inet_aton(address), "big"),
            prefix,
            int.from_bytes(socket.inet_aton(gateway), "big") if gateway else 0,
        ]
        fields = struct.pack("<3I", *numbers) + protocol.text(interface)
        self.request(f"configuring {interface}", protocol.OP_NETWORK, fields, timeout)

    def mount(
        self,
        kind: str,
        source: str,
        target: str,
        flags: int = 0,
        data: str = "",
        timeout: float | None = 30.0,
    ) -> None:
        """mount(2) in the guest, with MS_* flags; makes the directory. Raises AgentError with the reason."""
        fields = struct.pack("<I", flags)
        fields += b"".join(protocol.text(value) for value in (kind, source, target, data))
        self._run_function("mount", protocol.OP_MOUNT, fields, timeout)

    def sync(self, timeout: float | None = 60.0) -> None:
        """Have the guest write all it holds to its disks."""
        self._run_function("sync", protocol.OP_SYNC, b"", timeout)

    def poweroff(self, *, reset: bool = False, timeout: float | None = 60.0) -> None:
        """Sync and end the machine. Returns when the agent has begun; the session ends with the machine."""
        how = struct.pack("<I", int(reset))
        # It waits for the end of its input: a guest that ends at once may never send its reply.
        self._start("power off", protocol.OP_POWER, how, b"", None, None, timeout).join_input(timeout)

    def exec(
        self,
        argv: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        stdin: Source = None,
        stdout: Sink = None,
        stderr: Sink = None,
        keep: bool = False,
        linger: float | None = 0.5,
        timeout: float | None = 30.0,
    ) -> Process:
        """Run a command. Returns when it has started; raises AgentRefused (with `exit_code`) when it cannot.

        `user`: name, uid, name:group or uid:gid, by the guest's own /etc/passwd; without it, root.
        `env` is all it gets, besides PATH, HOME and USER where they are missing. `tty` is (rows, columns) of
        a terminal, whose output is stdout. `stdin`: a file descriptor, bytes, an iterable of bytes, or None
        for /dev/null. `stdout`, `stderr`: a file descriptor, a function, a `Capture`, `PULL`, or None to
        drop it; `stderr` may be `MERGED`. After its exit, output that others still hold open is awaited for
        `linger` seconds (None: for ever). `keep`: it outlives the session, and prints to the guest's console;
        `stdout` and `stderr` get nothing. `timeout` is for its start.
        """
        if isinstance(argv, str | bytes):
            raise TypeError(f"a command is a list of words, as in ['sh', '-c', {argv!r}]")
        flags = (EXEC_TTY if tty else 0) | (EXEC_MERGE if stderr is MERGED and not tty else 0)
        flags |= (EXEC_NO_STDIN if stdin is None and not tty else 0) | (EXEC_KEEP if keep else 0)
        rows, columns = tty or (0, 0)
        milliseconds = LINGER_FOREVER if linger is None else min(int(linger * 1000), LINGER_FOREVER - 1)
        fields = struct.pack("<IIHH", flags, milliseconds, rows & 0xFFFF, columns & 0xFFFF)
        fields += protocol.text(user or "") + protocol.text(cwd or "")
        fields += protocol.texts(argv) + protocol.texts(
            [f"{name}={value}" for name, value in (env or {}).items()]
        )
        what = os.fsdecode(argv[0]) if argv else "no command"
        return self._start(
            what, protocol.OP_EXEC, fields, stdin, stdout, None if stderr is MERGED else stderr, timeout
        )

    def copy_in(
        self, host_path: str, guest_path: str, *, owner: str = "", special_bits: bool = False
    ) -> files.Totals:
        """Copy a file or directory tree into the guest, as `cp` does: see docs/agent.md for where it goes."""
        totals = files.Totals()
        fields = self._copy_fields(guest_path, files.base_name(host_path), owner, special_bits)
        errors = Capture(_ERROR_TEXT_BYTES)
        fd = files.open_source(host_path)
        try:
            process = self._start(
                guest_path, protocol.OP_PUT, fields, files.entries(fd, totals), None, errors, 30.0
            )
        except Exception:  # what interrupts us may come when somebody reads it already
            os.close(fd)
            raise
        try:
            status = process.wait()
        except BaseException:
            process.abandon()
            raise
        if not process.join_input(_END_SECONDS):
            raise AgentError(f"copying to {guest_path}: the guest is done, and takes nothing any more")
        if process.input_error is not None:
            raise process.input_error
        if status.exit_code:
            raise _copy_error(f"copying to {guest_path}", errors)
        return totals

    def copy_out(
        self,
        guest_path: str,
        host_path: str,
        *,
        special_bits: bool = False,
        limits: files.Limits | None = None,
    ) -> files.Totals:
        """Copy a file or directory tree out of the guest. Raises OSError, AgentError, and of these
        files.StreamError for what the host does not take; what was written until then stays."""
        totals = files.Totals()
        fields = self._copy_fields(guest_path, "", "", special_bits)
        errors = Capture(_ERROR_TEXT_BYTES)
        process = self._start(guest_path, protocol.OP_GET, fields, None, PULL, errors, 30.0)
        output = process.outputs[STDOUT]
        try:
            files.extract(
                output.read,
                host_path,
                files.base_name(guest_path),
                totals,
                limits or files.Limits(),
                special_bits,
            )
            status = _end_of_files(process)
        except BaseException as error:
            process.abandon(STDOUT)
            if isinstance(error, files.StreamEnd) and process.ended(_REASON_SECONDS) and errors.data:
                # The guest's own reason is the better one when its stream ended early.
                raise _copy_error(f"copying from {guest_path}", errors) from error
            raise
        if status.exit_code:
            raise _copy_error(f"copying from {guest_path}", errors)
        for line in protocol.printable(bytes(errors.data)).splitlines():
            totals.leave_out(line)
        return totals

    def _copy_fields(self, path: str, name: str, owner: str, special_bits: bool) -> bytes:
        flags = COPY_SPECIAL_BITS if special_bits else 0
        return struct.pack("<I", flags) + b"".join(protocol.text(value) for value in (path, name, owner))

    def _run_function(self, what: str, operation: int, fields: bytes, timeout: float | None) -> None:
        errors = Capture(_ERROR_TEXT_BYTES)
        process = self._start(what, operation, fields, None, None, errors, timeout)
        if process.wait(timeout).exit_code:
            raise _copy_error(what, errors)

    def _start(
        self,
        what: str,
        operation: int,
        fields: bytes,
        stdin: Source,
        stdout: Sink,
        stderr: Sink,
        timeout: float | None,
    ) -> Process:
        deadline = _deadline(timeout)
        process = self._open(
            lambda channel: Process(self, channel, stdin, stdout, stderr), operation, fields, deadline
        )
        number, stage, _ = process.await_start(_left(deadline))
        if number:
            raise AgentRefused(what, number, stage)
        process.start_streams()
        return process

    def request(self, what: str, operation: int, fields: bytes, timeout: float | None) -> bytes:
        """Ask and wait for the answer's data. Raises AgentRefused, TimeoutError or AgentGone."""
        deadline = _deadline(timeout)
        answer = self._open(lambda channel: _Answer(), operation, fields, deadline)
        number, stage, data = answer.wait(_left(deadline))
        if number:
            raise AgentRefused(what, number, stage)
        return data

    def _open(self, make: Callable[[int], W], operation: int, fields: bytes, deadline: float | None) -> W:
        """Take a channel, send the request, and return who waits for what comes on the channel."""
        if self._reader is None:
            raise AgentGone("the session has not begun")
        channel, frames, waiter = self._frames(make, operation, fields)
        try:
            self._send(frames, deadline)
        except TimeoutError:
            self._forget(channel)  # of which the guest has not heard
            raise
        return waiter

    def _frames(self, make: Callable[[int], W], operation: int, fields: bytes) -> tuple[int, bytes, W]:
        """Take a channel: its number, the request in bytes, and who waits for what comes on the channel."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if len(self._channels) >= _CHANNELS:
                raise AgentError(f"{_CHANNELS} commands are under way in this guest already")
            # A number just used is used again last: easier to follow in a trace.
            self._next = self._next % 0xFFFF + 1
            while self._next in self._channels:
                self._next = self._next % 0xFFFF + 1
            channel = self._next
            waiter = self._channels[channel] = make(channel)
        try:
            frames = b"".join(protocol.request_frames(channel, operation, fields))
        except ValueError:
            with self._lock:
                del self._channels[channel]
            raise
        return channel, frames, waiter

    def send(self, kind: int, flags: int, channel: int, payload: bytes = b"") -> None:
        """One frame; waits while the guest takes nothing. Raises AgentGone."""
        self._send(protocol.frame(kind, flags, channel, payload))

    def _send(self, frames: bytes, deadline: float | None = None) -> None:
        """All of `frames`, which are whole. Raises AgentGone, and TimeoutError when the guest has taken none
        of it at `deadline`."""
        left = _left(deadline)
        if not self._sending.acquire(timeout=-1 if left is None else left):
            raise TimeoutError("the guest does not answer")
        rest = memoryview(frames)
        try:
            while rest and self._failure is None:
                try:
                    # For this call only: the socket shares its flags with its duplicates.
                    rest = rest[self._sock.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    self._await_room(deadline)
        except TimeoutError:
            if len(rest) == len(frames):
                raise
            # Nothing can follow a frame that is torn.
            self._fail(AgentGone("the guest takes nothing any more"))
        except (BrokenPipeError, ConnectionResetError) as error:
            # What the guest said last, an exit code perhaps, may still be to be read: the reader goes on to
            # the end of it, and tells all who wait.
            gone = AgentGone(f"the connection to the agent has ended: {error.strerror}")
            raise self._failure or gone from None
        except OSError as error:
            self._fail(AgentGone(f"the connection to the agent has ended: {error.strerror}"))
        except BaseException:
            self._fail(AgentGone("the session was interrupted"))
            raise
        finally:
            self._sending.release()
        if self._failure is not None:
            raise self._failure

    def _await_room(self, deadline: float | None) -> None:
        left = _left(deadline)
        room = select.poll()
        room.register(self._sock, select.POLLOUT)
        if not room.poll(None if left is None else left * 1000):
            raise TimeoutError("the guest does not answer")

    def _find_hello(self, seen: bytearray) -> bytes | None:
        """The agent's nonce, once its hello has come; then `seen` is what came after it."""
        at = seen.find(self._nonce)
        while at >= 0:
            begin = at - (HELLO.size - NONCE_BYTES)
            if begin >= 0 and seen.startswith(MAGIC, begin):
                _, version, self._peer_flags, window, peer, _ = HELLO.unpack_from(seen, begin)
                if version != protocol.VERSION or window != protocol.WINDOW:
                    raise AgentError(
                        f"the agent in the guest speaks version {version}, not {protocol.VERSION}"
                    )
                del seen[: begin + HELLO.size]
                return bytes(peer)
            at = seen.find(self._nonce, at + 1)
        # A hello may be cut anywhere.
        del seen[: max(0, len(seen) - HELLO.size)]
        return None

    def _await_hello(self) -> bytes:
        """What came after the agent's answer to `hello_restored`."""
        seen = bytearray()
        while self._find_hello(seen) is None:
            data = self._sock.recv(PAYLOAD_MAX)
            if not data:
                raise AgentGone("the connection to the agent has ended")
            seen += data
        if not self._peer_flags & HELLO_AT_ONCE:
            raise AgentGone("the agent in the guest is too old")
        return bytes(seen)

    def _read(self, begun: bytes | None) -> None:
        buffer = bytearray(_RECEIVE_BYTES)
        view = memoryview(buffer)
        try:
            if begun is None:
                begun = self._await_hello()
            view[: len(begun)] = begun
            have = len(begun)
            while True:
                used = self._take_frames(view, have)
                # Less than a frame is left, so there is always room to receive into.
                buffer[: have - used] = buffer[used:have]
                have -= used
                count = self._sock.recv_into(view[have:])
                if not count:
                    self._fail(AgentGone("the connection to the agent has ended"))
                    return
                have += count
        except AgentGone as failure:
            self._fail(failure)
        except AgentError as error:
            self._fail(AgentGone(str(error)))
        except OSError as error:
            self._fail(AgentGone(f"the connection to the agent has ended: {error.strerror}"))

    def _take_frames(self, view: memoryview, have: int) -> int:
        at = 0
        while have - at >= HEADER.size:
            kind, flags, channel, size = HEADER.unpack_from(view, at)
            if kind == MAGIC[0]:
                if have - at < HELLO.size:
                    break
                # Its answer to a hello that we sent twice; any other means that our session is over.
                if bytes(view[at + HELLO.size - NONCE_BYTES : at + HELLO.size]) != self._nonce:
                    raise AgentGone("the agent in the guest started anew")
                at += HELLO.size
                continue
            if size > PAYLOAD_MAX:
                raise AgentProtocolError("the guest sent a frame that is too long")
            if have - at < HEADER.size + size:
                break
            begin = at + HEADER.size
            at = begin + size
            self._dispatch(kind, flags, channel, bytes(view[begin:at]))
        return at

    def _dispatch(self, kind: int, flags: int, channel: int, payload: bytes) -> None:
        # Nothing ends a channel but the guest's own last frame for it, so all others are its mistakes.
        waiter = self._channels.get(channel)
        if waiter is None:
            raise AgentProtocolError("the guest sent to a channel that is not open")
        if kind == protocol.REPLY:
            if not waiter.on_reply(payload):
                self._forget(channel)
            return
        if not isinstance(waiter, Process):
            raise AgentProtocolError("the guest sent something else than a reply")
        if kind == protocol.DATA:
            waiter.on_data(flags, payload)
        elif kind == protocol.END:
            waiter.on_end(flags)
        elif kind == protocol.CREDIT:
            if len(payload) != 4:
                raise AgentProtocolError("the guest sent credit that is no number")
            waiter.on_credit(flags, int.from_bytes(payload, "little"))
        elif kind == protocol.STOP:
            waiter.on_stop(flags)
        elif kind == protocol.EXIT:
            waiter.on_exit(protocol.parse_exit(payload))
            self._forget(channel)
        else:
            raise AgentProtocolError("the guest sent a frame that there is not")

    def _forget(self, channel: int) -> None:
        with self._lock:
            self._channels.pop(channel, None)

    def _fail(self, failure: AgentGone) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = failure
            waiters = list(self._channels.values())
            self._channels.clear()
        try:
            # Whoever sends or receives comes back.
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        for waiter in waiters:
            waiter.on_failure(self._failure)


def _end_of_files(process: Process) -> ExitStatus:
    """How a copy out of the guest ended, whose tree has come: nothing else may come, nor the end not."""
    try:
        if not process.outputs[STDOUT].at_end(_END_SECONDS):
            raise files.StreamError("the guest sent more than the files that it was asked for")
        return process.wait(_END_SECONDS)
    except TimeoutError:
        raise files.StreamError("the guest has sent its files, and does not come to the end") from None


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    """The seconds until `deadline`, and 0 after it."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _copy_error(what: str, errors: Capture) -> AgentError:
    reason = " ".join(protocol.printable(bytes(errors.data)).split("\n")).strip()
    return AgentError(f"{what}: {reason or 'the agent gave no reason'}")
