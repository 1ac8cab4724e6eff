"""Starts workers and looks after them: spawn, supervision by pidfd, orderly and other ends. VMM process.

A worker inherits the descriptors it is given and no others, an all but empty environment, and a session of
its own, so that Ctrl-C on the terminal reaches the VMM only, which then ends its workers in good order.
"""

import fcntl
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping

from devices.worker.sandbox import package_root

FIRST_FD = 3
MAX_STDERR = 4096
STUB = "import sys; sys.path[0:0] = [{root!r}]\nfrom {module} import main; main()"
# Which module has `main`: a device's worker imports disks and rings, of which the pager needs nothing.
ENTRY_POINT = "devices.worker.main"
ENTRY_POINTS = {"pager": "devices.pager.main"}
# glibc of some Python builds is found through the first; the second is the debugging switch.
PASSED_ENVIRONMENT = ("LD_LIBRARY_PATH", "VMRUN_DEBUG")
# How long a killed process may take to be gone: it may sit in uninterruptible I/O.
KILL_SECONDS = 5.0


class Worker:
    """A worker process. Owns the process, its pidfd, the read end of its stderr, and `channel` until somebody
    takes it.

    `pidfd` is readable when the process has ended: watch it, then call `poll`.
    """

    def __init__(self, name: str, pid: int, pidfd: int, channel: socket.socket, stderr_fd: int) -> None:
        self.name = name
        self.title = f"worker {name}"  # for messages
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self._stderr_fd = stderr_fd
        self._end: os.waitid_result | None = None
        self._last_words = ""

    def poll(self) -> bool:
        """Whether the process has ended. Reaps it, once."""
        if self._end is None:
            self._end = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            if self._end is not None:
                self._last_words = _last_line(self._stderr_fd)
        return self._end is not None

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the process to end. Returns whether it has."""
        if not self.poll():
            ended = select.poll()
            ended.register(self.pidfd, select.POLLIN)
            ended.poll(max(0.0, timeout) * 1000)
        return self.poll()

    @property
    def exit_code(self) -> int | None:
        """Its exit code, minus the signal that killed it, or None while it runs. See `poll`."""
        if self._end is None:
            return None
        return self._end.si_status if self._end.si_code == os.CLD_EXITED else -self._end.si_status

    def describe_exit(self) -> str:
        """How it ended, as one line for the user, with the last thing it said."""
        code = self.exit_code
        if code is None:
            return f"{self.title} is running"
        if code >= 0:
            text = f"{self.title} exited with status {code}"
        else:
            text = f"{self.title} was killed by signal {-code}"
            if -code == signal.SIGSYS:
                text += " (its sandbox met a forbidden system call)"
        said = self._last_words.removeprefix(f"vmrun worker {self.name}: ")
        return f"{text}: {said}" if said else text

    def stop(self, timeout: float = 10.0) -> None:
        """End it: close the channel, which lets it finish, flush and exit; after `timeout` seconds SIGTERM,
        then SIGKILL.

        A VMM that has confined itself may send signals to its own workers only. What else it started ends
        with its channel, or outlives it.

        Returns when the process is gone and reaped. Raises TimeoutError when even SIGKILL does not end it. A
        second call does nothing.
        """
        if self.pidfd < 0:
            return
        try:
            # Not only a close: whoever else has this socket, or reads from it now, gets the end too.
            self.channel.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed or never connected any more
        self.channel.close()
        for number, seconds in (
            (None, timeout),
            (signal.SIGTERM, min(1.0, timeout)),
            (signal.SIGKILL, KILL_SECONDS),
        ):
            if self.poll():
                break
            if number is not None:
                try:
                    signal.pidfd_send_signal(self.pidfd, number)
                except PermissionError:
                    break
            self.wait(seconds)
        if not self.poll():
            raise TimeoutError(f"{self.title} (process {self.pid}) does not end")
        os.close(self.pidfd)
        os.close(self._stderr_fd)
        self.pidfd = self._stderr_fd = -1

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def launch(kind: str, name: str, arguments: Mapping[str, str], fds: Mapping[str, int]) -> Worker:
    """Start a worker and return at once; the handshake on its channel tells when it is ready.

    `fds` become words like `image=4`, naming a duplicate in the worker; the caller keeps its own. See
    `devices.worker.main` for kinds and words; `devices.pager.main` is one more. Raises OSError.

    Call it from a thread that lives as long as the VMM: the worker dies with that thread (PR_SET_PDEATHSIG).
    """
    words = [f"{key}={value}" for key, value in arguments.items()]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stderr_read, stderr_write = -1, -1
    pid = -1
    high: list[int] = []
    try:
        # Non-blocking on both ends: a worker must not hang because nobody reads what it says.
        stderr_read, stderr_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        actions: list[tuple[int, int, int]] = [(os.POSIX_SPAWN_DUP2, stderr_write, 2)]
        # First out of the way: a descriptor of ours may have the number that another one gets in the worker.
        first_free = FIRST_FD + 1 + len(fds)
        for target, (key, fd) in enumerate({"channel": theirs.fileno(), **fds}.items(), FIRST_FD):
            high.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first_free))
            actions.append((os.POSIX_SPAWN_DUP2, high[-1], target))
            words.append(f"{key}={target}")
        if "VMRUN_DEBUG" in os.environ:
            del actions[0]  # straight to our own stderr, nothing lost
        pid = _spawn(kind, name, words, actions)
        pidfd = os.pidfd_open(pid)
    except BaseException:
        ours.close()
        if stderr_read >= 0:
            os.close(stderr_read)
        if pid > 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        theirs.close()
        for fd in (stderr_write, *high):
            if fd >= 0:
                os.close(fd)
    return Worker(name, pid, pidfd, ours, stderr_read)


def worker_command(kind: str, name: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """What to execute, and in which environment."""
    stub = STUB.format(root=package_root(), module=ENTRY_POINTS.get(kind, ENTRY_POINT))
    environment = {key: os.environ[key] for key in PASSED_ENVIRONMENT if key in os.environ}
    return [sys.executable, "-I", "-S", "-c", stub, kind, name, *words], environment


def _spawn(kind: str, name: str, words: list[str], actions: list[tuple[int, int, int]]) -> int:
    command, environment = worker_command(kind, name, [f"parent={os.getpid()}", *words])
    # SIGTERM and SIGINT as a worker expects them, whatever the VMM blocks or ignores.
    everything = [signal.SIGTERM, signal.SIGINT]
    return os.posix_spawn(
        sys.executable,
        command,
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=everything,
    )


def _last_line(fd: int) -> str:
    """The last line in a pipe. The writer is not trusted: only printable text goes to the user's terminal."""
    said = b""
    while True:
        try:
            piece = os.read(fd, 65536)
        except BlockingIOError:
            break
        if not piece:
            break
        said = (said + piece)[-MAX_STDERR:]
    lines = said.decode("utf-8", "replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return "".join(character if character.isprintable() else "?" for character in last)
