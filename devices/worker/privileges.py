"""The steps by which a process gives up what it could do: namespaces, root directory, ids, capabilities,
files. Worker processes, and the VMM that confines itself.

Each step is for good and raises OSError where the host refuses it. `give_up` is their order; who calls it,
`devices.worker.sandbox` or the VMM, says what is its own. See namespaces(7), capabilities(7), landlock(7).
"""

from __future__ import annotations

import ctypes
import os
import resource

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

PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

SYS_CAPSET = 126
SYS_PIVOT_ROOT = 155
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1
LANDLOCK_SCOPE_SIGNAL = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522

OVERFLOW_ID = 65534
# An own id for each process, so that two of them have no hold on each other (signals, ptrace, RLIMIT_NPROC).
# The range from 0x70000000 is one that neither distributions, systemd nor container managers give out;
# process ids are at most 22 bits long.
FIRST_ID = 0x70000000


def give_up(
    *,
    namespaces: Callable[[], None],
    ids: Callable[[], None],
    last: Callable[[], None],
    files: Callable[[], None],
    calls: Callable[[], None],
) -> list[tuple[str, str]]:
    """Give up everything, in the order that works: `namespaces`, the root directory, as root the `ids`,
    capabilities, what `last` wants done before nothing can be gained any more, `files` (Landlock), system
    `calls` (seccomp). Returns (layer, why not) for the optional layers this host refuses; raises OSError when
    one of the others cannot be had.
    """
    refused: list[tuple[str, str]] = []

    def attempt(layer: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except OSError as error:
            refused.append((layer, error.strerror or str(error)))
            return False
        return True

    was_root = os.geteuid() == 0
    # An empty root without a mount namespace of its own would be mounted over the host's.
    if attempt("namespaces", namespaces):
        attempt("empty root", empty_root)
    else:
        refused.append(("empty root", "needs a mount namespace"))
    os.chdir("/")
    drop_capability_bounds()
    if was_root:
        attempt("user id", ids)
    else:
        refused.append(("user id", "only root can take another one"))
    drop_capabilities()
    last()
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    attempt("landlock", files)
    calls()
    return refused


def lower_limit(number: int, limit: int) -> None:
    """setrlimit(2): `limit`, soft and hard, or what is lower already."""
    _, hard = resource.getrlimit(number)
    limit = limit if hard == resource.RLIM_INFINITY else min(hard, limit)
    resource.setrlimit(number, (limit, limit))


def prctl(option: int, argument2: int = 0, argument3: int = 0) -> int:
    """prctl(2), of this thread. Raises OSError."""
    call = seccomp.LIBC["prctl"]
    call.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    result: int = call(option, argument2, argument3, 0, 0)
    if result < 0:
        _fail()
    return result


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Arguments are numbers, or bytes for a pointer to them. Raises OSError."""
    call = seccomp.LIBC["syscall"]
    call.restype = ctypes.c_long
    words = [
        ctypes.c_char_p(word) if isinstance(word, bytes) else ctypes.c_long(word or 0) for word in arguments
    ]
    result: int = call(ctypes.c_long(number), *words)
    if result < 0:
        _fail()
    return result


def _fail() -> None:
    error = ctypes.get_errno()
    raise OSError(error, os.strerror(error))


def unshare(flags: int) -> None:
    """Enter new namespaces, CLONE_NEW...: this thread, so do it before there is another."""
    if seccomp.LIBC["unshare"](flags) < 0:
        _fail()


def empty_root() -> None:
    """Make an empty tmpfs the root and let go of everything that was mounted (pivot_root(2),
    "pivot_root(".", ".")"). In a mount namespace of one's own: it would be mounted over the host's.
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
        syscall(SYS_PIVOT_ROOT, b".", b".")
    except OSError:
        os.chroot(".")  # the root is the initramfs, which cannot be pivoted away
    else:
        if seccomp.LIBC["umount2"](b".", MNT_DETACH) < 0:
            _fail()


def drop_ids(own: int, killer: int | None = None) -> bool:
    """Take the user and group id `own`, or, in a container that maps only the usual 65,536 ids, those of
    nobody: False then. All threads.

    `killer` is the user id of a process that can signal this one though it is no root; it stays as the saved
    user id (kill(2)), and gives this process no hold on that one.
    """
    os.setgroups([])
    try:
        os.setresgid(own, own, own)
        os.setresuid(own, own, own if killer is None else killer)
    except OSError:
        os.setresgid(OVERFLOW_ID, OVERFLOW_ID, OVERFLOW_ID)
        os.setresuid(OVERFLOW_ID, OVERFLOW_ID, OVERFLOW_ID)
        return False
    return True


def drop_capability_bounds() -> None:
    """Without CAP_SETPCAP the bounding set stays; no_new_privs and no exec make it meaningless then."""
    capability = 0
    while True:
        try:
            prctl(PR_CAPBSET_READ, capability)
        except OSError:
            return  # past the last capability this kernel knows
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return
        capability += 1


def drop_capabilities() -> None:
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = LINUX_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    syscall(SYS_CAPSET, header, bytes(24))


def landlock(*, signals: bool = False) -> None:
    """A ruleset that handles everything this kernel knows and allows none of it (landlock(7)); with
    `signals`, all but signals to processes outside, which is to say all others.
    """
    abi = syscall(SYS_LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    file_rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)
    attribute = ((1 << file_rights) - 1).to_bytes(8, "little")
    if abi >= 4:
        attribute += (3).to_bytes(8, "little")  # binding and connecting TCP ports
    if abi >= 6:
        scoped = LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | (0 if signals else LANDLOCK_SCOPE_SIGNAL)
        attribute += scoped.to_bytes(8, "little")
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, attribute, len(attribute), 0)
    try:
        syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
