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
import ctypes
import os
import resource
import sys

from devices.worker import seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SIGKILL = 9

SYS_CAPSET = 126
SYS_PIVOT_ROOT = 155
SYS_CLOSE_RANGE = 436
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# Room for 32 memory regions, the five descriptors of each ring and what one message brings, many times over.
MAX_DESCRIPTORS = 128
MAX_THREADS = 64
OVERFLOW_ID = 65534
# An own id for each worker, so that two of them have no hold on each other (signals, ptrace, RLIMIT_NPROC).
# The range from 0x70000000 is one that neither distributions, systemd nor container managers give out;
# process ids are at most 22 bits long.
FIRST_WORKER_ID = 0x70000000

LAYERS = (
    ("descriptors", "every descriptor but the worker's own is closed", True),
    ("limits", f"no core dumps, at most {MAX_DESCRIPTORS} descriptors", True),
    ("namespaces", "empty network, IPC, UTS, cgroup and mount namespaces", False),
    ("empty root", "the root directory is an empty read-only file system", False),
    ("user id", "a user and group id of its own, no supplementary groups", False),
    ("capabilities", "none, and none to be had", True),
    ("lifeline", "dies with the process that started it; nobody can attach to it", True),
    ("no_new_privs", "nothing it runs can gain privileges", True),
    ("landlock", "no file, no TCP port and no abstract socket can be opened", False),
    ("seccomp", "system calls outside a short list fail or kill the worker", True),
)


def _prctl(option: int, argument2: int = 0, argument3: int = 0) -> int:
    prctl = seccomp.LIBC["prctl"]
    prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    result: int = prctl(option, argument2, argument3, 0, 0)
    if result < 0:
        _fail()
    return result


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """Arguments are numbers, or bytes for a pointer to them."""
    syscall = seccomp.LIBC["syscall"]
    syscall.restype = ctypes.c_long
    words = [
        ctypes.c_char_p(word) if isinstance(word, bytes) else ctypes.c_long(word or 0) for word in arguments
    ]
    result: int = syscall(ctypes.c_long(number), *words)
    if result < 0:
        _fail()
    return result


def _fail() -> None:
    error = ctypes.get_errno()
    raise OSError(error, os.strerror(error))


def enter(
    keep: tuple[int, ...], parent: int | None = None, allowed: tuple[seccomp.Allow, ...] = seccomp.ALLOWED
) -> list[tuple[str, str]]:
    """Give up everything but the descriptors `keep`. Returns (layer, why not) for optional layers this host
    refuses.

    `parent` is the process to die with, `allowed` are the system calls left. Everything that will ever be
    imported must be imported by now. Raises OSError when a required layer cannot be had, and then the process
    must end.
    """
    if _thread._count():
        raise OSError(0, "a thread was started before the sandbox: it would stay outside")
    program = seccomp.assemble(allowed)
    refused: list[tuple[str, str]] = []

    def attempt(layer: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except OSError as error:
            refused.append((layer, error.strerror or str(error)))
            return False
        return True

    was_root = os.geteuid() == 0
    _close_all_but(keep)
    _limit()
    # An empty root without a mount namespace of its own would be mounted over the host's.
    if attempt("namespaces", lambda: _unshare(NAMESPACES if was_root else NAMESPACES | CLONE_NEWUSER)):
        attempt("empty root", _empty_root)
    else:
        refused.append(("empty root", "needs a mount namespace"))
    os.chdir("/")
    _drop_capability_bounds()
    if was_root:
        attempt("user id", _drop_ids)
    else:
        refused.append(("user id", "only root can take another one"))
    _drop_capabilities()
    _lifeline(parent)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    attempt("landlock", _landlock)
    seccomp.install(program)
    return refused


def _close_all_but(keep: tuple[int, ...]) -> None:
    first = 0
    for fd in sorted(set(keep)):
        os.fstat(fd)  # an expected descriptor that is not there must not become the number of a later one
        if fd > first:
            _syscall(SYS_CLOSE_RANGE, first, fd - 1, 0)
        first = fd + 1
    _syscall(SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would be a copy of guest memory
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    # RLIMIT_FSIZE stays: SIGXFSZ must not meet a disk image that grows.


def _unshare(flags: int) -> None:
    unshare = seccomp.LIBC["unshare"]
    if unshare(flags) < 0:
        _fail()


def _empty_root() -> None:
    """Make an empty tmpfs the root and let go of everything that was mounted (pivot_root(2),
    "pivot_root(".", ".")").
    """
    mount = seccomp.LIBC["mount"]
    mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
    if mount(None, b"/", None, MS_REC | MS_PRIVATE, None) < 0:
        _fail()
    # /proc is the one directory every Linux has; the new root only needs some place to be mounted on.
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    if mount(b"none", b"/proc", b"tmpfs", flags, b"size=4k,nr_inodes=1,mode=0555") < 0:
        _fail()
    os.chdir("/proc")
    try:
        _syscall(SYS_PIVOT_ROOT, b".", b".")
    except OSError:
        os.chroot(".")  # the root is the initramfs, which cannot be pivoted away
    else:
        if seccomp.LIBC["umount2"](b".", MNT_DETACH) < 0:
            _fail()


def _drop_ids() -> None:
    own = FIRST_WORKER_ID + os.getpid()
    os.setgroups([])
    try:
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    except OSError:
        # A container may map only the usual 65,536 ids.
        os.setresgid(OVERFLOW_ID, OVERFLOW_ID, OVERFLOW_ID)
        os.setresuid(OVERFLOW_ID, OVERFLOW_ID, OVERFLOW_ID)
    else:
        # It counts all threads of a user id, so it means something only for an own id.
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))


def _drop_capability_bounds() -> None:
    """Without CAP_SETPCAP the bounding set stays; no_new_privs and no exec make it meaningless then."""
    capability = 0
    while True:
        try:
            _prctl(PR_CAPBSET_READ, capability)
        except OSError:
            return  # past the last capability this kernel knows
        try:
            _prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return
        capability += 1


def _drop_capabilities() -> None:
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = LINUX_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    _syscall(SYS_CAPSET, header, bytes(24))


def _lifeline(parent: int | None) -> None:
    """After the ids: a change of ids clears the death signal and sets dumpable anew (prctl(2))."""
    _prctl(PR_SET_DUMPABLE, 0)
    if parent is not None:
        _prctl(PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != parent:
            raise OSError(0, "the process that started this worker is gone")


def _landlock() -> None:
    """A ruleset that handles everything this kernel knows and allows none of it (landlock(7))."""
    abi = _syscall(SYS_LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    file_rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)
    attribute = ((1 << file_rights) - 1).to_bytes(8, "little")
    if abi >= 4:
        attribute += (3).to_bytes(8, "little")  # binding and connecting TCP ports
    if abi >= 6:
        attribute += (3).to_bytes(8, "little")  # abstract UNIX sockets and signals to processes outside
    ruleset = _syscall(SYS_LANDLOCK_CREATE_RULESET, attribute, len(attribute), 0)
    try:
        _syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def layers() -> list[tuple[str, str, bool]]:
    """Every layer: (name, what it does, whether this host grants it), found by a process that enters the
    sandbox.

    For people who ask (the doctor command), in the VMM process. Takes the time of a worker's start.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        program = (
            f"import sys, os; sys.path[0:0] = [{package_root()!r}]\n"
            "from devices.worker import sandbox\n"
            "for name, why in sandbox.enter((1,)): os.write(1, (name + '\\n').encode())\n"
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
    return [(name, what, entered and name not in lines) for name, what, _ in LAYERS]


def package_root() -> str:
    """The directory `devices` is imported from."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
