"""Starting a machine in a process of its own: one that goes on without whoever started it (`vmrun boot
--detach`), or one that ends with it (`vmrun run`). The command's process until the fork, the VMM's after it.

The process forks before it has threads or workers: threads do not survive a fork, and workers die with the
thread that started them. A pipe tells the command what became of the machine, in a JSON line; its end without
a line means that the VMM died. Of an owned machine there is a second line, about its end; and a second pipe,
in the other direction, whose end tells the VMM that its owner is gone, whatever became of that.
"""

import fcntl
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

from vmrun.control import runtime
from vmrun.errors import EXIT_VMM, UserError

if TYPE_CHECKING:
    from subprocess import Popen

END_SECONDS = 20.0  # for a VMM to end in order; it takes milliseconds
MAX_MESSAGE = 1 << 16  # bytes of a line that an owner reads


class Detached:
    """The VMM's end of the pipe. `vmrun.control.session.Starter`. `owner_fd` reads as ended when the owner is
    gone; -1: it has none.
    """

    def __init__(self, fd: int, owner_fd: int = -1) -> None:
        self.owner_fd = owner_fd
        self._fd = fd
        self._told = False

    def claimed(self, directory: runtime.RuntimeDirectory) -> None:
        """From now on there is a place for what the VMM has to say."""
        fd = os.open(
            directory.path / runtime.VMM_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)

    def made(self) -> None:
        """Everything is open. Close what we have of whoever started the command: shells, make and CI leave
        descriptors open, which a guest that takes over this process would have, and which, the end of a pipe
        say, somebody may wait for. What is ours is close-on-exec, as Python opens it; that it was there
        before our last exec tells the other.
        """
        for fd in map(int, os.listdir("/proc/self/fd")):
            try:
                if fd > 2 and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                    os.close(fd)
            except OSError:
                pass  # it was the directory's

    def running(self, name: str) -> bool:
        """Tell that the machine runs. False when nobody is there to hear it."""
        return self.tell({"name": name})

    def tell(self, message: dict[str, Any]) -> bool:
        """The first message is the only one, but for an owner, who is told of the end too."""
        if self._fd < 0:
            return True
        try:
            os.write(self._fd, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return False
        finally:
            if self.owner_fd < 0 or self._told:
                os.close(self._fd)
                self._fd = -1
            self._told = True
        return True


class Starting:
    """A VMM that is on its way, in a process of its own, without a terminal. Owns the pipe it answers on.

    `vmm` returns an exit code and a reason. `others` are machines that the caller is starting too: their
    pipes are not this one's, which would keep them open.
    """

    def __init__(
        self,
        vmm: Callable[[Detached], tuple[int, str]],
        describe: Callable[[Exception], str],
        others: Iterable["Starting"] = (),
    ) -> None:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self._pipe = os.fdopen(read_end, "rb")
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            for each in (self, *others):
                each._pipe.close()
            _become_vmm(vmm, describe, write_end)
        os.close(write_end)

    def result(self) -> str:
        """Wait until the machine runs; returns its name.

        A VMM that ended before its machine ran, or raised (what `describe` makes one line of), is a UserError
        here, with the same code and text.
        """
        os.waitpid(self._pid, 0)
        line = self._pipe.readline()
        self.close()
        if not line:
            raise UserError("the machine's process died before the machine ran", EXIT_VMM)
        message: dict[str, Any] = json.loads(line)
        if "name" not in message:
            raise UserError(message["reason"], message["code"])
        name: str = message["name"]
        return name

    def close(self) -> None:
        """Listen no more: a machine on its way ends as soon as it wants to tell that it runs."""
        self._pipe.close()


def start(vmm: Callable[[Detached], tuple[int, str]], describe: Callable[[Exception], str]) -> str:
    """Start one machine and return its name once it runs. Raises as `Starting.result`."""
    starting = Starting(vmm, describe)
    try:
        return starting.result()
    finally:
        starting.close()


class Owned:
    """A machine that ends with this object, at the latest with this process. A context manager.

    `pidfd` is readable when the VMM has ended. `reaper`, if there is one, knows the process too and reaps it.
    """

    def __init__(
        self, pid: int, pidfd: int, owner_fd: int, pipe: IO[bytes], reaper: "Popen[bytes] | None" = None
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        # Of the VMM and its workers, and of the VMM alone in bytes, once it is closed.
        self.cpu_seconds, self.peak_memory = 0.0, 0
        self._reaper = reaper
        self.name = ""
        self._owner_fd = owner_fd
        self._pipe = pipe
        self._ending: tuple[int, str] | None = None

    def wait_until_running(self) -> str:
        """Returns the machine's name. UserError when it ended before it ran."""
        message = self._message()
        if "name" not in message:
            raise UserError(message["reason"], message["code"])
        # A confined VMM may have been taken over by its guest before this, and its owner, who is not
        # confined, goes by the name to directories that it reads and removes.
        self.name = runtime.check_name(message["name"])
        return self.name

    def wait(self) -> tuple[int, str]:
        """How the machine ended: its exit code, and why."""
        if self._ending is None:
            message = self._message()
            if "name" in message:
                message = self._message()
            self._ending = message.get("code", EXIT_VMM), message.get("reason", "")
        return self._ending

    def _message(self) -> dict[str, Any]:
        """A name, or a code and a reason. Of a confined VMM it may be the guest's words, which took it over:
        they are bounded, and only printable text goes to the user's terminal.
        """
        line = self._pipe.readline(MAX_MESSAGE)
        if not line:
            return {"code": EXIT_VMM, "reason": "the machine's process died"}
        try:
            match json.loads(line):
                case {"name": str(name)}:
                    return {"name": name}
                case {"code": int(code), "reason": str(reason)} if 0 <= code <= 255:
                    text = "".join(character if character.isprintable() else "?" for character in reason)
                    return {"code": code, "reason": text}
        except (ValueError, RecursionError):
            pass
        return {"code": EXIT_VMM, "reason": "the machine's process talks nonsense"}

    def alive(self, seconds: float = 0.0) -> bool:
        """Whether the VMM has not ended, and does not within `seconds`."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(int(seconds * 1000))

    def close(self) -> None:
        """Have the machine ended, if it runs, and wait for that. A VMM that does not end, because it is
        stopped or hangs, is killed.
        """
        if self._owner_fd >= 0:
            os.close(self._owner_fd)
            self._owner_fd = -1
            self._pipe.close()
            if self.alive(END_SECONDS):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            try:
                _, status, usage = os.wait4(self.pid, 0)
            except ChildProcessError:
                pass  # whoever made us ignores SIGCHLD, or a thread of the program's waits for any child
            else:
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
                self.peak_memory = usage.ru_maxrss << 10  # getrusage(2) has KiB
                if self._reaper is not None:
                    self._reaper.returncode = os.waitstatus_to_exitcode(status)
            finally:
                os.close(self.pidfd)

    def __enter__(self) -> "Owned":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_owned(vmm: Callable[[Detached], tuple[int, str]], describe: Callable[[Exception], str]) -> Owned:
    """Run `vmm` in a process of its own, for this one; returns at once."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    owned_end, owner_end = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os.close(owner_end)
        _become_vmm(vmm, describe, write_end, owned_end)
    os.close(write_end)
    os.close(owned_end)
    return Owned(pid, os.pidfd_open(pid), owner_end, os.fdopen(read_end, "rb"))


def _become_vmm(
    vmm: Callable[[Detached], tuple[int, str]],
    describe: Callable[[Exception], str],
    write_end: int,
    owner_fd: int = -1,
) -> None:
    """In the child. Never returns: the caller's `finally` clauses belong to the parent."""
    code = EXIT_VMM
    try:
        os.setsid()
        if owner_fd < 0 and os.fork() > 0:
            os._exit(0)  # the VMM is nobody's child, and, not leading its session, gets no terminal ever
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in range(3):
            os.dup2(null, fd)
        os.close(null)
        starter = Detached(write_end, owner_fd)
        try:
            code, reason = vmm(starter)
        except Exception as error:
            code, reason = error.code if isinstance(error, UserError) else EXIT_VMM, describe(error)
        starter.tell({"code": code, "reason": reason})
        print(f"vmrun: {reason}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)
