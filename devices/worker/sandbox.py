"""What a worker gives up before it looks at the first byte a guest or a disk image controls. Worker process.

`enter` is one way and one call: when it returns, the process has its listed descriptors, its memory and the
system calls of `devices.worker.seccomp`, and nothing else. Each layer stands by itself, so that one the host
refuses (no root, no user namespaces, an old kernel) leaves the others. Required layers raise; the optional
ones that are missing are returned, and `layers` tells them to a person who asks.

There is no PID namespace: only a child would be in it, and unshare(2) forbids threads to a process that waits
for one. A worker cannot signal anybody anyway, neither by its user id nor by its filter.
"""

from __future__ import annotations

import _thread
import os
import resource
import sys

from devices.worker import privileges, seccomp

PR_SET_PDEATHSIG = 1
SIGKILL = 9

SYS_CLOSE_RANGE = 436

# Room for 32 memory regions, the five descriptors of each ring and what one message brings, many times over.
MAX_DESCRIPTORS = 128
MAX_THREADS = 64
# Private memory: a worker at work has some 20 MiB, and as much again for each thread's stack and heap.
MAX_DATA = 256 << 20
# Address space beside the guest's memory and what is mapped before: glibc reserves 64 MiB (for a moment 128)
# for each thread's heap. With it what `MAX_DATA` does not count, shared memory, has a bound too.
MAX_ADDRESS_SPACE = 1 << 30
FIRST_WORKER_ID = privileges.FIRST_ID

LAYERS = (
    ("descriptors", "every descriptor but the worker's own is closed", True),
    ("limits", f"no core dumps, {MAX_DESCRIPTORS} descriptors, {MAX_DATA >> 20} MiB of its own", True),
    ("namespaces", "empty network, IPC, UTS, cgroup and mount namespaces", False),
    ("empty root", "the root directory is an empty read-only file system", False),
    ("user id", "a user and group id of its own, no supplementary groups", False),
    ("capabilities", "none, and none to be had", True),
    ("lifeline", "dies with the process that started it; nobody can attach to it", True),
    ("no_new_privs", "nothing it runs can gain privileges", True),
    ("landlock", "no file, no TCP port and no abstract socket can be opened", False),
    ("seccomp", "system calls outside a short list fail or kill the worker", True),
)


def enter(
    keep: tuple[int, ...],
    parent: int | None = None,
    allowed: tuple[seccomp.Allow, ...] = seccomp.ALLOWED,
    *,
    memory: int | None = None,
    quota: int | None = None,
) -> list[tuple[str, str]]:
    """Give up everything but the descriptors `keep`. Returns (layer, why not) for optional layers this host
    refuses.

    `parent` is the process to die with, `allowed` are the system calls left. `memory` is how many bytes of
    guest memory it will map, if that is known; no file it writes may grow beyond `quota` bytes. Everything
    that will ever be imported must be imported by now. Raises OSError when a required layer cannot be had,
    and then the process must end.
    """
    if _thread._count():
        raise OSError(0, "a thread was started before the sandbox: it would stay outside")
    program = seccomp.assemble(allowed)
    namespaces = privileges.NAMESPACES | (0 if os.geteuid() == 0 else privileges.CLONE_NEWUSER)
    _close_all_but(keep)
    _limit(memory, quota)
    return privileges.give_up(
        namespaces=lambda: privileges.unshare(namespaces),
        ids=lambda: _drop_ids(parent),
        last=lambda: _lifeline(parent),
        files=privileges.landlock,
        calls=lambda: seccomp.install(program),
    )


def _close_all_but(keep: tuple[int, ...]) -> None:
    first = 0
    for fd in sorted(set(keep)):
        os.fstat(fd)  # an expected descriptor that is not there must not become the number of a later one
        if fd > first:
            privileges.syscall(SYS_CLOSE_RANGE, first, fd - 1, 0)
        first = fd + 1
    privileges.syscall(SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0)


def _limit(memory: int | None, quota: int | None) -> None:
    limits = [
        (resource.RLIMIT_CORE, 0),  # a core file would be a copy of guest memory
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
        (resource.RLIMIT_DATA, MAX_DATA),
    ]
    if memory is not None:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            mapped = int(file.read(64).split()[0]) * resource.getpagesize()
        limits.append((resource.RLIMIT_AS, mapped + memory + MAX_ADDRESS_SPACE))
    if quota is not None:
        # CPython ignores SIGXFSZ: what goes beyond is EFBIG, and an I/O error for the guest.
        limits.append((resource.RLIMIT_FSIZE, quota))
    for number, limit in limits:
        privileges.lower_limit(number, limit)


def _drop_ids(parent: int | None) -> None:
    """A VMM that has confined itself, and then has the user id made of its process id, can still end its
    workers, and so does its own end: PR_SET_PDEATHSIG is subject to kill(2)'s rules. They have no hold on it.
    """
    killer = FIRST_WORKER_ID + parent if parent is not None else None
    if privileges.drop_ids(FIRST_WORKER_ID + os.getpid(), killer):
        # It counts all threads of a user id, so it means something only for an own id.
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))


def _lifeline(parent: int | None) -> None:
    """After the ids: a change of ids clears the death signal and sets dumpable anew (prctl(2))."""
    privileges.prctl(privileges.PR_SET_DUMPABLE, 0)
    if parent is not None:
        privileges.prctl(PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != parent:
            raise OSError(0, "the process that started this worker is gone")


def layers() -> list[tuple[str, str, bool]]:
    """Every layer of a worker: see `granted`."""
    return granted("devices.worker.sandbox", "enter((1,))", LAYERS)


def granted(module: str, call: str, layers: tuple[tuple[str, str, bool], ...]) -> list[tuple[str, str, bool]]:
    """Each of `layers` as (name, what it does, whether this host grants it), found by a process that makes
    `call` in `module`, which returns those refused.

    For people who ask (the doctor command), in the VMM process. Takes the time of a worker's start.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        program = (
            f"import sys, os; sys.path[0:0] = [{package_root()!r}]\n"
            f"from {module} import {call.partition('(')[0]}\n"
            f"for name, why in {call}: os.write(1, (name + '\\n').encode())\n"
            "os.write(1, b'entered\\n'); os._exit(0)"
        )
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", program],
            {},
            file_actions=[(os.POSIX_SPAWN_DUP2, write_end, 1)],
        )
        os.close(write_end)
        write_end = -1
        answer = b""
        while piece := os.read(read_end, 4096):
            answer += piece
        os.waitpid(pid, 0)
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)
    lines = answer.decode().splitlines()
    entered = "entered" in lines
    return [(name, what, entered and name not in lines) for name, what, _ in layers]


def package_root() -> str:
    """The directory `devices` is imported from."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
