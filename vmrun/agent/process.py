"""A command in the guest as the host has it: its streams, signals and end.

A thread moves each stream between the guest and a file descriptor, a function or bytes, so that blocking
descriptors, which others may share, stay as they are. Threads of streams never hold up the session's reader.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time

from vmrun.agent import protocol
from vmrun.agent.protocol import (
    CREDIT,
    DATA,
    END,
    FLAG_FAMILY,
    RESIZE,
    SIGNAL,
    STDERR,
    STDIN,
    STDOUT,
    STOP,
    AgentGone,
    AgentProtocolError,
    ExitStatus,
)
from vmrun.agent.streams import InputStream, OutputStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from typing import Protocol, TypeAlias

    Source: TypeAlias = int | bytes | Iterable[bytes] | None
    Sink: TypeAlias = int | Callable[[bytes], object] | OutputStream | None

    class Sender(Protocol):
        def send(self, kind: int, flags: int, channel: int, payload: bytes = b"") -> None: ...


class Capture:
    """A sink that keeps the first `limit` bytes in `data`; `cut` tells that there were more."""

    __slots__ = ("cut", "data", "limit")

    def __init__(self, limit: int = 1 << 30) -> None:
        self.data = bytearray()
        self.limit = limit
        self.cut = False

    def __call__(self, data: bytes) -> None:
        room = self.limit - len(self.data)
        self.data += data[:room]
        self.cut = self.cut or len(data) > room


class Process:
    """Made by `AgentSession.exec`. Its methods may be called from any thread."""

    def __init__(self, session: Sender, channel: int, stdin: Source, stdout: Sink, stderr: Sink) -> None:
        self.pid = 0
        """In the guest."""
        self.output_error: OSError | None = None
        """What failed first in writing output on the host (but for a reader that went away)."""
        self.input_error: Exception | None = None
        """What reading `stdin` on the host failed with; the command was killed for it."""
        self._session = session
        self._channel = channel
        self._status: ExitStatus | None = None
        self._failure: AgentGone | None = None
        self._replied = threading.Event()
        self._reply: tuple[int, int, bytes] = (0, 0, b"")
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._input = InputStream()
        self._source = stdin
        self._wake = -1
        self._sinks = {STDOUT: stdout, STDERR: stderr}
        self.outputs = {
            stream: OutputStream(lambda size, stream=stream: self._give(stream, size))  # type: ignore[misc]
            for stream in (STDOUT, STDERR)
        }
        """For a sink that is PULL: `take` or `read` it."""
        self._threads: list[threading.Thread] = []
        self._pumping: threading.Thread | None = None

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Its end, with all output written. Raises TimeoutError, or AgentGone without an end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._over.wait(timeout):
            raise TimeoutError("the command in the guest still runs")
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError("the command in the guest has ended, but nobody takes its output")
        if self._status is None:
            raise self._failure or AgentGone("the session is over")
        return self._status

    def ended(self, timeout: float) -> bool:
        """Whether its output is written and it has ended within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self._over.wait(max(0.0, deadline - time.monotonic()))

    def end(self, seconds: float) -> bool:
        """Kill all that it has started, and tell as `ended` does. A guest that does not listen, to which
        nothing more can be sent, takes no longer.
        """
        threading.Thread(target=self._try_kill, daemon=True, name=f"agent-end-{self._channel}").start()
        return self.ended(seconds)

    def _try_kill(self) -> None:
        try:
            self.kill()
        except AgentGone:
            pass  # and it with the guest

    def join_input(self, timeout: float | None = None) -> bool:
        """After the end: wait until nothing reads `stdin` any more. It may be in the middle of a read, or of
        sending to a guest that takes nothing: then False after `timeout` seconds.
        """
        if self._pumping is None:
            return True
        self._pumping.join(timeout)
        return not self._pumping.is_alive()

    def abandon(self, stream: int | None = None) -> None:
        """Kill it, and take what still comes on `stream`, to its end. Waits for nothing: a hostile guest may
        never listen, and send for ever.
        """

        def work() -> None:
            self._try_kill()
            if stream is not None:
                self._drain(stream, None)

        threading.Thread(target=work, daemon=True, name=f"agent-end-{self._channel}").start()

    def poll(self) -> ExitStatus | None:
        """Its end if it has come; output may still be on its way to its sinks."""
        return self._status

    def signal(self, number: int) -> None:
        """To its process group. Nothing happens when it has ended."""
        self._control(SIGNAL, 0, struct.pack("<I", number))

    def kill(self) -> None:
        """SIGKILL to all that it has started."""
        self._control(SIGNAL, FLAG_FAMILY, struct.pack("<I", 9))

    def resize(self, rows: int, columns: int) -> None:
        """The terminal's new size; the command gets SIGWINCH."""
        self._control(RESIZE, 0, struct.pack("<HH", rows & 0xFFFF, columns & 0xFFFF))

    def _control(self, kind: int, flags: int, payload: bytes) -> None:
        if not self._over.is_set():
            self._session.send(kind, flags, self._channel, payload)

    def _give(self, stream: int, size: int) -> None:
        if not self._over.is_set():
            try:
                self._session.send(CREDIT, stream, self._channel, struct.pack("<I", size))
            except AgentGone:
                pass  # the stream's end tells

    # What follows is called by the session, most of it by its reader: nothing here may wait for the guest.

    def await_start(self, timeout: float | None) -> tuple[int, int, bytes]:
        """The reply to the request: errno, stage, data."""
        if not self._replied.wait(timeout):
            raise TimeoutError("the guest does not answer")
        if self._failure is not None:
            raise self._failure
        return self._reply

    def start_streams(self) -> None:
        for stream, sink in self._sinks.items():
            if not isinstance(sink, OutputStream):
                self._start(self._drain, stream, sink)
        if self._source is not None:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            if self._over.is_set():
                os.eventfd_write(self._wake, 1)
            self._pumping = threading.Thread(target=self._pump, daemon=True, name=f"agent-in-{self._channel}")
            self._pumping.start()

    def _start(self, work: Callable[[int, Sink], None], stream: int, sink: Sink) -> None:
        thread = threading.Thread(
            target=work, args=(stream, sink), daemon=True, name=f"agent-out-{self._channel}"
        )
        self._threads.append(thread)
        thread.start()

    def on_reply(self, payload: bytes) -> bool:
        """False when the channel is over with it."""
        if self._replied.is_set():
            raise AgentProtocolError("the guest replied twice")
        self._reply = protocol.parse_reply(payload)
        number, _, data = self._reply
        if not number:
            if len(data) != 4:
                raise AgentProtocolError("the guest sent a process id that is none")
            self.pid = int.from_bytes(data, "little")
        self._replied.set()
        return not number

    def on_data(self, stream: int, data: bytes) -> None:
        self._output(stream).put(data)

    def on_end(self, stream: int) -> None:
        self._output(stream).end()

    def on_credit(self, stream: int, size: int) -> None:
        if stream != STDIN:
            raise AgentProtocolError("the guest gave credit for a stream of its own")
        self._input.add_credit(size)

    def on_stop(self, stream: int) -> None:
        if stream != STDIN:
            raise AgentProtocolError("the guest stopped a stream of its own")
        self._stop_input()

    def on_exit(self, status: ExitStatus) -> None:
        if not self._replied.is_set():
            raise AgentProtocolError("the guest told of an end before the start")
        self._finish(status, None)

    def on_failure(self, failure: AgentGone) -> None:
        self._finish(None, failure)

    def _finish(self, status: ExitStatus | None, failure: AgentGone | None) -> None:
        self._status, self._failure = status, failure
        for output in self.outputs.values():
            output.end(failure)
        self._over.set()
        self._replied.set()
        self._stop_input()

    def _output(self, stream: int) -> OutputStream:
        if stream not in self.outputs or not self._replied.is_set():
            raise AgentProtocolError("the guest sent to a stream that there is not")
        return self.outputs[stream]

    def _stop_input(self) -> None:
        self._input.stop()
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _drain(self, stream: int, sink: Sink) -> None:
        output = self.outputs[stream]
        try:
            while data := output.take():
                if sink is None:
                    continue
                try:
                    _deliver(sink, data)
                except OSError as error:
                    # As with a pipe whose reader went away: the command gets SIGPIPE.
                    if not isinstance(error, BrokenPipeError) and self.output_error is None:
                        self.output_error = error
                    sink = None
                    self._control(STOP, stream, b"")
        except AgentGone:
            pass  # wait() tells

    def _pump(self) -> None:
        chunks = _chunks(self._source, self._wake)
        try:
            for data in chunks:
                if not self._send_input(data):
                    return
            if not self._over.is_set():
                self._session.send(END, STDIN, self._channel)
        except AgentGone:
            pass  # wait() tells
        except Exception as error:  # whatever the caller's source raises is the caller's to see
            self.input_error = error
            try:
                self.kill()
            except AgentGone:
                pass
        finally:
            # A source that is a generator closes its files now, and not when it is collected.
            chunks.close()
            with self._lock:
                wake, self._wake = self._wake, -1
                os.close(wake)

    def _send_input(self, data: bytes) -> bool:
        for piece in protocol.pieces(data):
            at = 0
            while at < len(piece):
                size = self._input.claim(len(piece) - at)
                if not size:
                    return False
                self._session.send(DATA, STDIN, self._channel, piece[at : at + size])
                at += size
        return True


def _deliver(sink: Sink, data: bytes) -> None:
    if isinstance(sink, int):
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(sink, rest) :]
    elif callable(sink):
        sink(data)


def _chunks(source: Source, wake: int) -> Generator[bytes, None, None]:
    if isinstance(source, bytes):
        for at in range(0, len(source), protocol.PAYLOAD_MAX):
            yield source[at : at + protocol.PAYLOAD_MAX]
    elif isinstance(source, int):
        ready = select.poll()
        ready.register(source, select.POLLIN)
        ready.register(wake, select.POLLIN)
        while True:
            found = dict(ready.poll())
            if wake in found or found.get(source, 0) & select.POLLNVAL:
                return
            try:
                data = os.read(source, protocol.PAYLOAD_MAX)
            except BlockingIOError:
                continue
            if not data:
                return
            yield data
    elif source is not None:
        yield from source
