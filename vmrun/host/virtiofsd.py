"""virtiofsd, which serves a directory of the host's to a guest: found, started and ended, one for each mount.
VMM process.

There are two programs of that name: QEMU's in C (up to 7.2; docs/tools/virtiofsd.rst there) and the one in
Rust that came after it (gitlab.com/virtio-fs/virtiofsd). Both take a listening socket, serve one connection,
and end with it, so one that is left alone ends by itself. Both put themselves in a sandbox in which the
directory is all there is: a symbolic link in it that leads out leads nowhere, whoever made it.

As root, the guest's users are the host's of the same numbers, its root included, but it makes no device
files. As anybody else, the guest's root is the user, and the guest's other users make no files.
"""

import errno
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from devices.worker.launcher import Worker
from devices.worker.sandbox import package_root
from vmrun.errors import EXIT_VMM, UserError
from vmrun.host.virtiofsd_child import LISTENER, SANDBOX

# Where it is when it is not in PATH: what the files say that packages have there for this
# (docs/interop/vhost-user.json of QEMU), then where distributions have put it.
BACKENDS = (Path("/etc/qemu/vhost-user"), Path("/usr/share/qemu/vhost-user"))
PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")

PROBE_SECONDS = 10.0
STUB = "import sys; sys.path[0:0] = [{root!r}]\nfrom vmrun.host.virtiofsd_child import main; main()"

INSTEAD = "--copy-in HOST:GUEST copies instead"


@dataclass(frozen=True, slots=True)
class Program:
    """A virtiofsd that is there. `rust`: the one that came after QEMU's."""

    path: Path
    rust: bool
    modcaps: bool  # can do without some capabilities
    readonly: bool  # can refuse writes itself

    def command(self, directory: Path, *, read_only: bool) -> list[str]:
        """How it is called to serve `directory` on the listening socket `LISTENER`."""
        # The limit is inherited: it would raise it as far as only root may.
        words = [os.fspath(self.path), f"--fd={LISTENER}", "--rlimit-nofile=0"]
        if self.rust:
            words += [f"--shared-dir={directory}", f"--sandbox={SANDBOX}", "--announce-submounts"]
            words += ["--modcaps=-mknod"] if self.modcaps else []
            words += ["--readonly"] if read_only and self.readonly else []
            return words
        escaped = os.fspath(directory).replace("\\", "\\\\").replace(",", "\\,")
        words += ["-o", f"source={escaped}", "-o", f"sandbox={SANDBOX},announce_submounts,log_level=warn"]
        words += ["-o", "modcaps=-mknod"] if self.modcaps else []
        return words


def find() -> Path | None:
    """The virtiofsd of this host."""
    found = shutil.which("virtiofsd")
    candidates = [found] if found else []
    for directory in BACKENDS:
        for path in sorted(directory.glob("*.json")):
            candidates += _named_in(path)
    for candidate in (*candidates, *PLACES):
        if os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return Path(candidate)
    return None


def _named_in(path: Path) -> list[str]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(described, dict) or described.get("type") != "fs":
        return []
    binary = described.get("binary")
    return [binary] if isinstance(binary, str) else []


@functools.cache
def probe(path: Path) -> Program:
    """Which one it is. UserError when it is none."""
    try:
        done = subprocess.run(
            [path, "--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROBE_SECONDS,
            check=False,
        )
        said = done.stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--mount: {path} cannot be run: {error}: {INSTEAD}", EXIT_VMM) from None
    if "setgroups() failed" in said:
        # QEMU's gives them up first of all, which takes a right that only root has.
        raise UserError(
            f"--mount: {path} works for root, or for who is in one group only: install the virtiofsd that is "
            f"written in Rust; {INSTEAD}",
            EXIT_VMM,
        )
    rust = "--shared-dir" in said
    if not rust and "source=PATH" not in said:
        raise UserError(f"--mount: {path} is no virtiofsd that vmrun knows: {INSTEAD}", EXIT_VMM)
    return Program(path, rust, "modcaps" in said, "--readonly" in said)


def installed() -> Program:
    """UserError when there is none, or none that can be used."""
    path = find()
    if path is None:
        raise UserError(
            "--mount needs virtiofsd, which is not installed here (Debian packages virtiofsd, or "
            f"qemu-system-common up to Debian 12): {INSTEAD}"
        )
    return probe(path)


class Virtiofsd(Worker):
    """The virtiofsd of one directory: a context manager, at whose end it is gone. `channel` is its
    connection, which is there from the start; whoever takes it owns it.

    It ends with the thread that started it (`devices.worker.launcher.launch`), too.
    """

    def __init__(self, directory: Path, *, read_only: bool = False, program: Program | None = None) -> None:
        """UserError when the directory cannot be shared. `program` is `installed()`."""
        try:
            resolved = directory.resolve(strict=True)
            if not resolved.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except (OSError, RuntimeError) as error:
            raise UserError(f"--mount {directory}: {_reason(error)}: give a directory") from None
        program = program or installed()
        mode = "rw" if not read_only else "ro-itself" if program.readonly else "ro"
        words = [str(os.getpid()), mode, os.fspath(resolved)]
        words += program.command(resolved, read_only=read_only)
        try:
            channel, listener = _socket_pair()
            try:
                with listener:
                    pid, pidfd, stderr_fd = _spawn(words, listener.fileno())
            except BaseException:
                channel.close()
                raise
        except OSError as error:
            raise UserError(f"--mount {directory}: virtiofsd cannot be started: {_reason(error)}") from None
        super().__init__("virtiofsd", pid, pidfd, channel, stderr_fd)
        self.directory = directory
        self.title = f"the virtiofsd of {directory}"

    def poll(self) -> bool:
        """As any worker's. In its sandbox it has a child that does the work, which ends with it as a rule,
        but not while it waits for a file system that does not answer.
        """
        if self._end is None and os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            try:
                # Not reaped, so its number is nobody else's, and its group's too (it began a session).
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # gone with it; or not ours to end, once the VMM has confined itself
        return super().poll()


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """A connected socket, and the listening one with whom it is connected: virtiofsd accepts nothing else.

    Nobody else comes first: the name is in a directory of our own, and gone when this returns.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with tempfile.TemporaryDirectory(prefix="vmrun-") as directory:
            path = os.path.join(directory, "fs")
            listener.bind(path)
            listener.listen(1)
            channel.connect(path)
    except BaseException:
        listener.close()
        channel.close()
        raise
    return channel, listener


def _spawn(words: list[str], listener: int) -> tuple[int, int, int]:
    """The process, its pidfd, and the read end of what it says."""
    stderr_read, stderr_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    pid = -1
    try:
        stub = STUB.format(root=package_root())
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_DUP2, stderr_write, 1),
            (os.POSIX_SPAWN_DUP2, stderr_write, 2),
            (os.POSIX_SPAWN_DUP2, listener, LISTENER),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        ]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", stub, *words],
            {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=[signal.SIGTERM, signal.SIGINT],
        )
        return pid, os.pidfd_open(pid), stderr_read
    except BaseException:
        os.close(stderr_read)
        if pid > 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        os.close(stderr_write)
