"""What a process does before it becomes virtiofsd: namespaces, a read-only view of the directory, limits.
Runs in that process, started by `vmrun.host.virtiofsd`.

Follows user_namespaces(7), mount_namespaces(7) and mount_setattr(2). The namespaces here are for what
virtiofsd cannot do itself: run for who is not root, and keep a guest from writing. It makes more of its own,
with the directory as the root of all there is.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

CAP_SYS_CHROOT = 18
CAP_SYS_ADMIN = 21

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/fcntl.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
SYS_MOUNT_SETATTR = 442  # on every architecture; Linux 5.12
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR = struct.Struct("=QQQQ")  # attr_set, attr_clr, propagation, userns_fd
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
PR_SET_PDEATHSIG = 1

SANDBOX = "{sandbox}"  # a word of the command has it: only here is known which one can be

LISTENER = 3  # the descriptor of virtiofsd's listening socket
MAX_FD = 1 << 31 - 1

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Arguments: the parent's process id, "ro" or "rw" or "ro-itself" (virtiofsd refuses writes), the
    directory, the command.
    """
    parent, mode, directory, *command = sys.argv[1:]
    os.closerange(LISTENER + 1, MAX_FD)  # what vmrun itself was given by whoever started it
    try:
        sandbox = _prepare(directory, mode)
        # The last step, since a change of credentials takes it back.
        _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
        if os.getppid() != int(parent):
            sys.exit(1)  # it died before it could be told to us
        os.execve(command[0], [word.replace(SANDBOX, sandbox) for word in command], {})
    except OSError as error:
        sys.exit(f"{error.filename or 'virtiofsd'}: {error.strerror or error}")


def _prepare(directory: str, mode: str) -> str:
    """Which of virtiofsd's sandboxes is to be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # It holds a descriptor for each file that the guest knows of.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sandbox = "namespace"
    if not _has_capability(CAP_SYS_ADMIN):
        try:
            _enter_user_namespace()
        except OSError:
            # In most containers root has neither the right to mount nor namespaces, but it may chroot(2).
            if mode == "ro" or not _has_capability(CAP_SYS_CHROOT):
                raise
            return "chroot"
    if mode != "rw":
        _make_read_only(directory)
    return sandbox


def _has_capability(number: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def _enter_user_namespace() -> None:
    """Be root there, and nobody else: what the guest's root makes is the user's own."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "a user namespace")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _make_read_only(directory: str) -> None:
    """In this process's sight only, with all that is mounted below."""
    path = os.fsencode(directory)
    _check(_libc.unshare(CLONE_NEWNS), "a mount namespace")
    _check(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount")
    _check(_libc.mount(path, path, None, MS_BIND | MS_REC, None), directory)
    attributes = MOUNT_ATTR.pack(MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(
        _libc.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
        ),
        f"{directory} read-only",
    )


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()
