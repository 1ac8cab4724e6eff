"""A cgroup for each machine: what its VMM and workers may take of the host's memory, processes and CPU time.
The process that starts the machine.

Version 2 only (Documentation/admin-guide/cgroup-v2.rst), and only where it is ours to use: below a directory
that this process may write to and that hands on the controllers. systemd gives every user such a place; root
has all of them. Where there is none a machine runs with rlimits alone, and `Group.missing` says so.

A group is called vmrun-NAME-PID. Who holds its directory's lock (flock(2)) owns it: the process that made
it, and the VMM it forks, which has the same open file. The kernel drops the lock with the last of them, so a
group whose lock is free is what a killed vmrun left: the next one ends what is still in it and removes it.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PREFIX = "vmrun-"
CONTROLLERS = ("memory", "pids", "cpu")
PERIOD = 100_000  # microseconds, of cpu.max
END_SECONDS = 5.0  # how long what was killed may take to be gone

# What a machine takes beside the guest's memory. Measured at work: a VMM has 15 to 30 MiB of its own and 3 to
# 6 threads, a pager 3 MiB, a worker 4 to 6 MiB and up to 3 threads, and all share 7 MiB. Three times that,
# since what the kernel has for them counts too: page tables, buffers of sockets. So does the page cache of
# the disks, but that goes when it is wanted.
VMM_MEMORY = 96 << 20
WORKER_MEMORY = 32 << 20
VMM_THREADS = 16
WORKER_THREADS = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory` in bytes, `pids` in processes and threads, `cpu` in processors. None: no limit."""

    memory: int | None = None
    pids: int | None = None
    cpu: float | None = None


def machine_limits(memory: int, cpus: int, workers: int, *, cpu: float | None = None) -> Limits:
    """What a machine with `memory` bytes, `cpus` vCPUs and `workers` worker processes may take. `cpu` is how
    many processors' time it may take if that is less than it could.
    """
    return Limits(
        memory=memory + VMM_MEMORY + workers * WORKER_MEMORY,
        pids=VMM_THREADS + cpus + workers * WORKER_THREADS,
        cpu=cpu,
    )


class Group:
    """The group of one machine: a context manager, in the process that started it. Has a lock's descriptor,
    which a forked VMM inherits, and no group where there can be none.

    `missing` are the limits that this host cannot keep, by name.
    """

    def __init__(self, name: str, limits: Limits, place: "Place | None") -> None:
        wanted = [controller for controller in CONTROLLERS if getattr(limits, controller) is not None]
        self.path: Path | None = None
        self.missing = wanted
        self._lock_fd = -1
        if place is None:
            return
        place.clean()
        path = place.directory / f"{PREFIX}{name}-{os.getpid()}"
        try:
            self._lock_fd = _make(path)
        except OSError:
            return  # gone, or not ours after all
        self.path = path
        try:
            self.missing = [each for each in wanted if not _set(path, each, limits)]
        except BaseException:
            self.close()
            raise

    def enter(self) -> None:
        """Move this process, and all it will start, into the group. Without a group nothing happens. Raises
        OSError.
        """
        if self.path is not None:
            (self.path / "cgroup.procs").write_text("0")

    @property
    def out_of_memory(self) -> bool:
        """Whether somebody in it was killed for want of memory."""
        return self.path is not None and _number(self.path / "memory.events", "oom_kill") > 0

    def close(self) -> None:
        """End whatever is in it, and remove it. This process must not be."""
        path, self.path = self.path, None
        if path is not None:
            _remove(path)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Place:
    """A directory below which groups can be made. `controllers` are those they will have."""

    def __init__(self, directory: Path, controllers: frozenset[str]) -> None:
        self.directory = directory
        self.controllers = controllers

    def clean(self) -> None:
        """Remove the groups that nobody owns any more."""
        for path in self.directory.glob(f"{PREFIX}*"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            except OSError:
                pass  # it is in use, or another one removes it
            finally:
                os.close(fd)


def find_place(
    mountinfo: str = "/proc/self/mountinfo", membership: str = "/proc/self/cgroup", *, look: bool = False
) -> Place | None:
    """Where this process can make groups: beside its own, in its own, or at the top; where most controllers
    are, of which those that are off are turned on. Who only wants to `look` changes nothing, and may hope for
    too much.
    """
    top = _mount_point(mountinfo)
    own = _membership(membership)
    if top is None or own is None:
        return None
    here = Path(top) / own.lstrip("/")
    found = [
        Place(directory, controllers)
        for directory in dict.fromkeys((here.parent if here != Path(top) else here, here, Path(top)))
        if (controllers := _controllers(directory, look)) is not None
    ]
    return max(found, key=lambda place: len(place.controllers), default=None)


def _mount_point(mountinfo: str) -> str | None:
    """Where the version 2 hierarchy is mounted; proc_pid_mountinfo(5)."""
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                if after.split()[:1] == ["cgroup2"]:
                    escaped = before.split()[4]
                    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped)
    except OSError:
        pass
    return None


def _membership(membership: str) -> str | None:
    try:
        with open(membership, encoding="utf-8", errors="surrogateescape") as file:
            return next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), None)
    except OSError:
        return None


def _controllers(directory: Path, look: bool) -> frozenset[str] | None:
    """Those that groups in `directory` have, once those that can be are turned on. None: there can be no
    groups of ours.
    """
    if not os.access(directory, os.W_OK) or not os.access(directory / "cgroup.procs", os.W_OK):
        return None
    try:
        on = set((directory / "cgroup.subtree_control").read_text().split())
        available = (directory / "cgroup.controllers").read_text().split()
    except OSError:
        return None
    for controller in CONTROLLERS:
        if controller in available and controller not in on:
            try:
                if not look:
                    (directory / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError:
                continue  # EBUSY: processes are in this very group, and it is not the top
            on.add(controller)
    return frozenset(on & set(CONTROLLERS))


def _make(path: Path) -> int:
    """Make the group and own its lock, whose descriptor is returned. Raises OSError."""
    deadline = time.monotonic() + END_SECONDS
    while True:
        path.mkdir(exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have taken it for a leftover between the two: then it is not there any more.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise
            time.sleep(0.01)  # somebody has, and is about to remove it
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _set(path: Path, controller: str, limits: Limits) -> bool:
    """Whether the group has the limit now."""
    settings: dict[str, Iterable[tuple[str, str]]] = {
        # All of a machine or none of it: a VMM without its worker is of no use.
        "memory": (("memory.max", str(limits.memory)), ("memory.oom.group", "1"), ("memory.swap.max", "0")),
        "pids": (("pids.max", str(limits.pids)),),
        "cpu": (("cpu.max", f"{round((limits.cpu or 0) * PERIOD)} {PERIOD}"),),
    }
    for number, (file, value) in enumerate(settings[controller]):
        try:
            # Not made if it is not there: in a plain directory it would be.
            fd = os.open(path / file, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            if number == 0:
                return False
            continue  # a kernel without swap has no limit for it
        try:
            os.write(fd, value.encode())
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        finally:
            os.close(fd)
    return True


def _remove(path: Path) -> None:
    """Raises OSError when somebody in it does not end."""
    try:
        (path / "cgroup.kill").write_text("1")  # since Linux 5.14
    except OSError:
        _kill_each(path)
    deadline = time.monotonic() + END_SECONDS
    while True:
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _kill_each(path: Path) -> None:
    try:
        for pid in (path / "cgroup.procs").read_text().split():
            os.kill(int(pid), 9)
    except OSError:
        pass  # gone


def _number(file: Path, key: str) -> int:
    try:
        words = dict(line.split() for line in file.read_text().splitlines())
        return int(words.get(key, 0))
    except (OSError, ValueError):
        return 0
