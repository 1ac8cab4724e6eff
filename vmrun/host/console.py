"""The terminal (or pipe, file, nothing) on stdin and stdout as a machine's serial console. VMM process.

vCPU threads call `write`, which never waits; everything else happens on the main loop's thread, which watches
`input_fd`, `wake_fd` and, while `pending_output`, `output_fd`. See termios(3) and, for the escape keys,
qemu(1): Ctrl-A x leaves, Ctrl-A Ctrl-A (or Ctrl-A a) is one Ctrl-A for the guest, Ctrl-A h is help. They
exist on a terminal only: what comes from a pipe or a file reaches the guest byte for byte.
"""

import atexit
import errno
import os
import select
import signal
import stat
import termios
import threading
from types import FrameType, TracebackType
from typing import Any

OUTPUT_LIMIT = 1 << 20  # bytes of guest output held for a reader that does not read
WRITE_CHUNK = 1 << 16
BLOCKING_CHUNK = (
    256  # a terminal that polls as writable takes this much (WAKEUP_CHARS in drivers/tty/n_tty.c)
)

ESCAPE = 0x01  # Ctrl-A
HELP = "\r\n[vmrun] Ctrl-A x: {leave}   Ctrl-A Ctrl-A: send Ctrl-A   Ctrl-A h: this help\r\n"


class Console:
    """The console on the open files `stdin` and `stdout`: a context manager; while it is open a terminal is
    in raw mode.

    A file that epoll cannot watch (a regular file, /dev/null) is stood in for by an eventfd that is always
    ready, so the main loop treats all alike. A side that is closed has fd -1. The main loop stops watching
    `input_fd` once `input_ended`, and ends the machine once `escape_requested`.

    Output is bounded at `limit` bytes: when a reader is that far behind, the oldest is dropped, for the
    newest says why a guest stopped, and a line in its place says how much was lost. A reader that goes away
    (EPIPE) only means that output is thrown away from then on. `close` waits for the reader to take the rest.
    """

    def __init__(
        self,
        stdin: int = 0,
        stdout: int = 1,
        *,
        limit: int = OUTPUT_LIMIT,
        leave: str = "leave and stop the machine",
    ) -> None:
        self.input_fd = -1
        self.output_fd = -1
        self.wake_fd = -1
        self.input_ended = False
        self.escape_requested = False
        self._stdin = stdin
        self._help = HELP.format(leave=leave).encode()
        self._limit = limit
        self._lock = threading.Lock()
        self._buffer = bytearray()  # written by vCPU threads, under the lock
        self._lost = 0  # bytes dropped at the head of the buffer, likewise
        self._woken = False  # likewise: wake_fd is signalled and not yet drained
        self._in_flight = memoryview(b"")  # taken from the buffer, not yet accepted by stdout; main loop only
        self._escaped = False
        self._terminal = _Terminal(stdin)
        self._standins: list[int] = []
        self._output_gone = False
        # Asked before anything is opened here, which would take the number of a closed stdin or stdout.
        has_input = _is_open(stdin) and not self._terminal.in_background()
        self._output, self._chunk = _open_output(stdout)
        try:
            self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if self._output >= 0:
                self.output_fd = self._watchable(self._output, select.EPOLLOUT)
            if has_input:
                self.input_fd = self._watchable(stdin, select.EPOLLIN)
            self.input_ended = self.input_fd < 0
        except BaseException:
            self.close()
            raise

    def _watchable(self, fd: int, events: int) -> int:
        with select.epoll() as epoll:
            try:
                epoll.register(fd, events)
                return fd
            except PermissionError:  # "the target file does not support epoll": it never makes anyone wait
                standin = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._standins.append(standin)
                return standin

    def write(self, data: bytes) -> None:
        """Queue guest output. Any thread; never waits for the reader, never fails."""
        with self._lock:
            self._buffer += data
            excess = len(self._buffer) - self._limit
            if excess > 0:
                del self._buffer[:excess]
                self._lost += excess
            wake = not self._woken
            self._woken = True
        if wake and self.wake_fd >= 0:
            os.eventfd_write(self.wake_fd, 1)

    @property
    def pending_output(self) -> bool:
        """Whether output waits for stdout to have room: the main loop then watches `output_fd` for
        EPOLLOUT.
        """
        return not self._output_gone and self.output_fd >= 0 and bool(self._in_flight or self._buffer)

    def on_wake(self) -> None:
        """`wake_fd` is readable: there is new output."""
        with self._lock:
            self._woken = False
            try:
                os.eventfd_read(self.wake_fd)
            except BlockingIOError:
                pass
        self.on_output_ready()

    def on_output_ready(self) -> None:
        """Hand stdout what it takes without waiting."""
        while self._take():
            try:
                written = os.write(self._output, self._in_flight[: self._chunk])
            except BlockingIOError:
                return
            except OSError as error:
                self._give_up_output(error)
                return
            self._in_flight = self._in_flight[written:]
            if self._chunk == BLOCKING_CHUNK:
                return  # a second write might wait: ask epoll first

    def _take(self) -> bool:
        """Refill `_in_flight` from the buffer; whether there is anything to write."""
        if not self._in_flight:
            with self._lock:
                if self._output < 0 or self._output_gone:
                    self._buffer.clear()
                    return False
                notice = f"\r\n[vmrun: {self._lost} bytes of console output lost]\r\n" if self._lost else ""
                self._lost = 0
                self._in_flight = memoryview(notice.encode() + self._buffer[:WRITE_CHUNK])
                del self._buffer[:WRITE_CHUNK]
        return bool(self._in_flight)

    def _give_up_output(self, error: OSError) -> None:
        """The reader is gone, or the disk is full: the machine goes on without a console."""
        self._output_gone = True  # but open until `close`: the main loop may still be watching it
        self._in_flight = memoryview(b"")
        if error.errno not in (errno.EPIPE, errno.EIO):
            try:
                os.write(2, f"vmrun: console output stops: {error.strerror}\n".encode())
            except OSError:
                pass

    def on_input_ready(self, limit: int = 4096) -> bytes:
        """What the guest is to get of up to `limit` bytes typed: may be empty. Sets `input_ended`,
        `escape_requested`.
        """
        if self.input_ended:
            return b""
        try:
            data = os.read(self._stdin, limit)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""  # the terminal hung up
        if not data:
            self.input_ended = True
        return self._without_escapes(data) if self._terminal.is_raw else data

    def _without_escapes(self, data: bytes) -> bytes:
        for_guest = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    for_guest.append(byte)
                continue
            self._escaped = False
            if byte in b"xX":
                self.escape_requested = True
                break
            if byte in (ESCAPE, ord("a")):
                for_guest.append(ESCAPE)
            elif byte in b"hH?":
                self.write(self._help)
        return bytes(for_guest)

    def close(self) -> None:
        """Restore the terminal, then write what is left, waiting for the reader as long as it takes: an
        interrupt ends that. Fine to call twice. No thread may call `write` any more.
        """
        self._terminal.restore()
        try:
            self._flush()
        finally:
            self.input_fd = self.output_fd = -1
            self.input_ended = True
            fds = [self.wake_fd, self._output, *self._standins]
            self.wake_fd = self._output = -1
            self._standins = []
            for fd in fds:
                if fd >= 0:
                    os.close(fd)

    def _flush(self) -> None:
        poll = select.poll()
        if self._output >= 0:
            poll.register(self._output, select.POLLOUT)
        while self._take():
            poll.poll()
            self.on_output_ready()

    def __enter__(self) -> "Console":
        self._terminal.make_raw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Terminal:
    """The mode of a terminal, put back however the process ends, short of SIGKILL (`reset` or `stty sane`
    helps then).
    """

    FATAL = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.is_raw = False
        self._saved: list[Any] = []
        self._handled: list[signal.Signals] = []

    def in_background(self) -> bool:
        """Whether reading the terminal would stop us (`vmrun boot ... &`): it then serves for output only."""
        try:
            return os.isatty(self.fd) and os.tcgetpgrp(self.fd) != os.getpgrp()
        except OSError:
            return False  # not our controlling terminal: nobody stops us

    def make_raw(self) -> None:
        if self.is_raw or not _is_open(self.fd) or not os.isatty(self.fd) or self.in_background():
            return
        self._saved = termios.tcgetattr(self.fd)
        atexit.register(self.restore)
        # Fatal signals that nobody handles would end the process past `finally` and atexit.
        for number in self.FATAL:
            if (
                threading.current_thread() is threading.main_thread()
                and signal.getsignal(number) == signal.SIG_DFL
            ):
                signal.signal(number, _exit_on_signal)
                self._handled.append(number)
        iflag, oflag, cflag, lflag, ispeed, ospeed, control = termios.tcgetattr(self.fd)
        # cfmakeraw(3), but for OPOST: our own messages on the same terminal still want their newlines
        # translated.
        iflag &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        control = list(control)
        control[termios.VMIN], control[termios.VTIME] = 1, 0
        self.is_raw = True
        # TCSANOW, here and in `restore`: waiting for output to drain would hang on a terminal stopped with
        # Ctrl-S.
        termios.tcsetattr(self.fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, control])

    def restore(self) -> None:
        if not self.is_raw:
            return
        self.is_raw = False
        atexit.unregister(self.restore)
        try:
            termios.tcsetattr(self.fd, termios.TCSANOW, self._saved)
        except termios.error:
            pass  # the terminal is gone
        for number in self._handled:
            if signal.getsignal(number) is _exit_on_signal:
                signal.signal(number, signal.SIG_DFL)
        self._handled.clear()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_output(stdout: int) -> tuple[int, int]:
    """A descriptor of our own for `stdout`, and how many bytes one write may have so that it does not wait.
    -1: closed.

    O_NONBLOCK belongs to the open file description, which we share with the shell and everything else on the
    terminal: setting it would break them. So a terminal or a pipe is opened anew. Where that is not allowed
    (su), small writes after a poll have to do. Regular files keep their description: its offset is shared,
    and writes do not wait.
    """
    try:
        mode = os.fstat(stdout).st_mode
    except OSError:
        return -1, 0
    if stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(stdout)):
        return os.dup(stdout), WRITE_CHUNK
    try:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{stdout}", flags), WRITE_CHUNK
    except OSError:  # a socket (ENXIO), no /proc, not our terminal
        return os.dup(stdout), BLOCKING_CHUNK
