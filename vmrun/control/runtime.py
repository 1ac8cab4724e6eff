"""Runtime directories: which machines run on this host, under which names. VMM process and every command.

A machine is a process with a directory named like it in `base_directory()`:

    lock          held (flock) by the VMM as long as it lives; inside is its process id
    control       its control socket (docs/control.md)
    agent         leads to the agent in the guest (docs/agent.md)
    config.json   what it is made of
    console.log   what its guest printed lately, and console.log.1 before that
    vmm.log       what a detached VMM says itself

The kernel drops the lock with the process, whatever ends it, so a directory whose lock is free is stale, and
the next command clears it away. No process id is trusted for that: they are used again. Whoever claims a name
or removes a directory holds `.lock` of the base directory meanwhile, so that no two do so at once.

What a detached machine leaves is moved to `.ended/NAME`, so that `wait` and `log` still find it, and likewise
what is stale; the newest MAX_ENDED are kept.
"""

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmrun.errors import EXIT_VMM, UserError

LOCK = "lock"
SOCKET = "control"
AGENT = "agent"
CONFIG = "config.json"
CONSOLE_LOG = "console.log"
VMM_LOG = "vmm.log"
OUTCOME = "outcome.json"

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
NAME_RULE = "1 to 63 letters, digits, '-', '_' and '.', and the first a letter or digit"

BASE_LOCK = ".lock"
ENDED = ".ended"
MAX_ENDED = 16
KILLED = {"code": EXIT_VMM, "reason": "the machine's process was killed"}

MAX_SOCKET_PATH = 107  # sizeof sockaddr_un.sun_path less the terminating zero, unix(7)

FIRST_WORDS = (
    "amber bold brisk calm clear coral dry early fair fresh gold jade keen kind lunar mild neat noble"
)
SECOND_WORDS = (
    "ant bee cod crow deer dove elk finch fox gull hare hawk ibis jay kite lark lynx mole moth newt"
)


def check_name(name: str) -> str:
    """`name`, if machines may be called so. Raises UserError."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise UserError(f"--name {name!r}: a machine's name is {NAME_RULE}")
    return name


def base_directory() -> Path:
    """$VMRUN_RUNTIME, else /run/vmrun for root and $XDG_RUNTIME_DIR/vmrun for others; where that is not set,
    /tmp/vmrun-UID.
    """
    stated = os.environ.get("VMRUN_RUNTIME")
    if stated:
        return Path(stated)
    if os.geteuid() == 0:
        return Path("/run/vmrun")
    session = os.environ.get("XDG_RUNTIME_DIR")
    return Path(session) / "vmrun" if session else Path(f"/tmp/vmrun-{os.geteuid()}")


class RuntimeDirectory:
    """The directory of a machine of ours, from `claim` to `release`. Owns the lock's descriptor."""

    def __init__(self, name: str, path: Path, lock_fd: int) -> None:
        self.name = name
        self.path = path
        self._lock_fd = lock_fd

    @property
    def socket_path(self) -> Path:
        return self.path / SOCKET

    def abandon(self) -> None:
        """Give the name back, and leave it to the next command, or to the owner's `running`, to remove the
        directory: a VMM that has confined itself cannot reach it.
        """
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def release(self, outcome: dict[str, Any] | None = None) -> None:
        """Give the name back and remove the directory. With `outcome` the logs are kept for those who
        ask later. A second call does nothing.
        """
        if self._lock_fd < 0:
            return
        try:
            with _locked_base() as base:
                if outcome is not None:
                    _keep(base, self.path, outcome)
                _remove(self.path)
        finally:
            self.abandon()


def claim(name: str | None) -> RuntimeDirectory:
    """The directory for a machine that is about to start as `name`, or as a name made up here. UserError when
    one of that name runs, or when there can be no directory.
    """
    if name is not None:
        check_name(name)
    try:
        with _locked_base() as base:
            _clean(base)
            if name is None:
                name = _invent(base)
            path = base / name
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                pid = _pid(path)
                raise UserError(
                    f"--name {name}: a machine of that name runs already"
                    + (f" (process {pid})" if pid else "")
                ) from None
            lock_fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(lock_fd, f"{os.getpid()}\n".encode())
            except BaseException:
                os.close(lock_fd)
                raise
            _remove(base / ENDED / name)
            return RuntimeDirectory(name, path, lock_fd)
    except OSError as error:
        raise _no_directory(error) from None


def running() -> dict[str, int]:
    """The names of the machines that run, and the process ids of their VMMs (0 when not yet written). Removes
    what dead ones left.
    """
    if not base_directory().is_dir():
        return {}
    try:
        with _locked_base() as base:
            return {path.name: _pid(path) for path in _clean(base)}
    except OSError as error:
        raise _no_directory(error) from None


def find(name: str) -> Path:
    """The directory of the running machine `name`. UserError, with the nearest name, if none runs."""
    names = running()
    if name in names:
        return base_directory() / name
    raise not_found(name, list(names))


def settle(name: str, outcome: dict[str, Any] | None) -> None:
    """Remove what the machine `name`, which has ended, left because it could not do so itself, or what
    somebody kept of it who did not know why it ended; with `outcome` its logs are kept.
    """
    with _locked_base() as base:
        path = base / name
        if path.is_dir() and not _is_held(path / LOCK):
            if outcome is not None:
                _keep(base, path, outcome)
            _remove(path)
        kept = base / ENDED / name
        if outcome is not None and kept.is_dir():
            (kept / OUTCOME).write_text(json.dumps(outcome))
        elif outcome is None:
            _remove(kept)


def not_found(name: str, names: list[str]) -> UserError:
    from difflib import get_close_matches

    text = f"there is no machine {name!r}"
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return UserError(f"{text}: did you mean {' or '.join(close)}?")
    if names:
        return UserError(f"{text}: `vmrun ps` lists those that run")
    return UserError(f"{text}: none runs")


def ended(name: str) -> Path | None:
    """What a detached machine that has ended left, if it is still there and none of its name runs."""
    path = base_directory() / ENDED / name
    return path if NAME_PATTERN.fullmatch(name) and path.is_dir() else None


def bounded_socket_path(path: Path, directory_fd: int) -> str:
    """A name for the socket `path` that fits into a sockaddr_un: long ones go by its open directory."""
    text = os.fspath(path)
    return text if len(os.fsencode(text)) <= MAX_SOCKET_PATH else f"/proc/self/fd/{directory_fd}/{path.name}"


@contextmanager
def _locked_base() -> Iterator[Path]:
    """The base directory, ours alone meanwhile. Everything done under it is short."""
    base = base_directory()
    # Parents too: /run/vmrun has one for sure, a directory the user named perhaps not.
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    # In /tmp anybody may have been there before us, and would own our sockets.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UserError(
            f"{base}: must be a directory of your own that nobody else may write to; set XDG_RUNTIME_DIR"
        )
    fd = os.open(base / BASE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield base
    finally:
        os.close(fd)


def _clean(base: Path) -> list[Path]:
    """With the base locked: clear stale directories away, return those of running machines in order."""
    living = []
    for path in sorted(base.iterdir()):
        if path.name.startswith("."):
            continue
        if _is_held(path / LOCK):
            living.append(path)
        else:
            # What cannot be kept, on a full file system say, must keep nobody from any machine.
            with suppress(OSError):
                if (path / CONSOLE_LOG).exists():
                    _keep(base, path, KILLED | {"time": time.time()})
            _remove(path)
    return living


def _is_held(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Whoever claims a name holds the base lock, as we do: nobody can be kept from its lock by this.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return True
    finally:
        os.close(fd)
    return False


def _pid(path: Path) -> int:
    try:
        return int((path / LOCK).read_text() or 0)
    except (OSError, ValueError):
        return 0


def _invent(base: Path) -> str:
    first, second = FIRST_WORDS.split(), SECOND_WORDS.split()
    for _ in range(100):
        one, other = os.urandom(2)
        name = f"{first[one % len(first)]}-{second[other % len(second)]}"
        if not (base / name).exists():
            return name
    return f"vm-{os.urandom(4).hex()}"


def _keep(base: Path, path: Path, outcome: dict[str, Any]) -> None:
    kept = base / ENDED
    kept.mkdir(mode=0o700, exist_ok=True)
    (path / OUTCOME).write_text(json.dumps(outcome))
    for unneeded in (SOCKET, AGENT, LOCK):
        (path / unneeded).unlink(missing_ok=True)
    _remove(kept / path.name)
    path.rename(kept / path.name)
    os.utime(kept / path.name)
    for old in sorted(kept.iterdir(), key=lambda each: each.stat().st_mtime_ns)[:-MAX_ENDED]:
        _remove(old)


def _remove(directory: Path) -> None:
    """Remove a machine's directory, if it is there, as far as that goes. There are files in it only."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for name in os.listdir(fd):
            os.unlink(name, dir_fd=fd)
        os.rmdir(directory)
    except OSError:
        import shutil  # whatever somebody put there

        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(fd)


def _no_directory(error: OSError) -> UserError:
    where = os.fsdecode(error.filename) if error.filename is not None else str(base_directory())
    return UserError(
        f"{where}: {error.strerror}: no place for the machine's socket; "
        "set XDG_RUNTIME_DIR or VMRUN_RUNTIME to a directory of your own"
    )
