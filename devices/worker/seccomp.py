"""The system calls a worker may make: one table with a reason for each, and its seccomp filter. Worker
process; the VMM's filter is assembled here too, from a table of its own.

The filter is classic BPF, assembled by hand because a worker sees no site-packages and the list is short
(seccomp(2), Documentation/userspace-api/seccomp_filter.rst). x86-64 only. Four verdicts:

- ALLOW: the call, with the argument values the table names.
- ABSENT: ENOENT or ENOSYS, for what CPython or glibc try by themselves and have an answer for when it fails.
- FATAL: the kernel kills the process. No code path of CPython, glibc or ours makes these calls; only code
  that somebody else put there does, and then the machine must stop with this worker's name.
- everything else: EPERM. The call is just as impossible, but a harmless probe that a newer CPython or glibc
  adds (they do, every few releases) does not take a running guest down.
"""

import ctypes
import struct

from devices.pager.userfaultfd import UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_WAKE, UFFDIO_ZEROPAGE

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_KILL_PROCESS = 0x80000000
SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_ALLOW = 0x7FFF0000
AUDIT_ARCH_X86_64 = 0xC000003E
X32_SYSCALL_BIT = 0x40000000

EPERM = 1
ENOENT = 2
ENOSYS = 38

# Offsets in struct seccomp_data.
DATA_NR = 0
DATA_ARCH = 4
DATA_ARGS = 16

BPF_LD_W_ABS = 0x20
BPF_ALU_AND_K = 0x54
BPF_JMP_JEQ_K = 0x15
BPF_JMP_JSET_K = 0x45
BPF_RET_K = 0x06

PROT_EXEC = 4
AT_EMPTY_PATH = 0x1000
SOL_SOCKET = 1
F_GETFL = 3
F_GETFD = 1
F_SETFD = 2
F_DUPFD_CLOEXEC = 1030
# CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|SETTLS|PARENT_SETTID|CHILD_CLEARTID: what pthread_create asks for.
CLONE_THREAD_FLAGS = 0x003D0F00
CLONE_DETACHED = 0x00400000  # ignored by the kernel; musl still sets it


class Condition:
    """True when the low 32 bits of argument `argument`, without the bits of `ignore`, are one of `values`.

    The kernel itself looks at no more than 32 bits of every argument tested here.
    """

    __slots__ = ("argument", "ignore", "values")

    def __init__(self, argument: int, values: tuple[int, ...], ignore: int = 0) -> None:
        self.argument = argument
        self.values = values
        self.ignore = ignore


class Allow:
    """A system call a process needs, and what for. Without its `condition` it is EPERM."""

    __slots__ = ("condition", "name", "number", "reason")

    def __init__(self, name: str, number: int, reason: str, condition: Condition | None = None) -> None:
        self.name = name
        self.number = number
        self.reason = reason
        self.condition = condition


NOT_EXECUTABLE = Condition(2, (0,), ignore=0xFFFFFFFF & ~PROT_EXEC)

# The calls of the data path come first: the kernel caches verdicts that depend on the number alone, older
# ones do not.
ALLOWED = (
    Allow("epoll_wait", 232, "a ring waits for its kick, its stop and its source"),
    Allow("read", 0, "kick eventfds"),
    Allow("write", 1, "call and err eventfds; messages on stderr; frames to a stream"),
    Allow("preadv2", 327, "os.preadv: disk into guest memory"),
    Allow("pwritev2", 328, "os.pwritev: guest memory to disk"),
    Allow("preadv", 295, "os.preadv where the C library has no preadv2"),
    Allow("pwritev", 296, "os.pwritev where the C library has no pwritev2"),
    Allow("readv", 19, "tap frame into guest memory"),
    Allow("writev", 20, "guest memory to the tap"),
    Allow("pread64", 17, "image headers and tables"),
    Allow("fdatasync", 75, "VIRTIO_BLK_T_FLUSH"),
    Allow("fallocate", 285, "discard and write zeroes on a file or block device"),
    Allow("ftruncate", 77, "an image grows by whole clusters"),
    Allow("lseek", 8, "size of a block device, holes of a file"),
    Allow("fstat", 5, "size of an image or of guest memory before it is mapped"),
    Allow("newfstatat", 262, "how glibc 2.33 to 2.38 spell fstat", Condition(3, (AT_EMPTY_PATH,))),
    Allow("futex", 202, "locks between threads, the interpreter's own among them"),
    Allow("recvmsg", 47, "vhost-user messages; frames from a stream"),
    Allow("sendmsg", 46, "vhost-user replies"),
    Allow("poll", 7, "a vhost-user message with a timeout"),
    Allow("shutdown", 48, "SIGTERM ends the channel, and with it the worker, in good order"),
    Allow("getsockname", 51, "CPython learns the family of the socket SET_BACKEND_REQ_FD brought"),
    Allow("getsockopt", 55, "and its type and protocol", Condition(1, (SOL_SOCKET,))),
    Allow("close", 3, "descriptors the front end sent or replaced"),
    # Not F_SETFL, nor the ioctl FIONBIO: kick, call and err eventfds are the VMM's own open files, and one
    # that lost O_NONBLOCK would stop its main loop for ever.
    Allow(
        "fcntl",
        72,
        "mmap.mmap duplicates the memory descriptor; CPython asks for modes",
        Condition(1, (F_DUPFD_CLOEXEC, F_GETFL, F_GETFD, F_SETFD)),
    ),
    Allow("memfd_create", 319, "the buffer that remembers requests in flight (GET_INFLIGHT_FD)"),
    Allow("eventfd2", 290, "each ring has a stop eventfd, and a local card a bell"),
    Allow("epoll_create1", 291, "each ring has an epoll instance, a local card one, and a stream two"),
    Allow("epoll_ctl", 233, "each ring chooses what it waits for"),
    Allow("mmap", 9, "guest memory, thread stacks and the heap: never executable", NOT_EXECUTABLE),
    Allow("munmap", 11, "guest memory is unmapped, the heap shrinks"),
    Allow("mremap", 25, "realloc of a large block"),
    Allow("mprotect", 10, "glibc opens a new heap or stack piece by piece: never executable", NOT_EXECUTABLE),
    Allow("madvise", 28, "the stack of a thread that ended is given back"),
    Allow("brk", 12, "the heap"),
    Allow(
        "clone",
        56,
        "a thread for each ring: nothing but a thread",
        Condition(0, (CLONE_THREAD_FLAGS,), ignore=CLONE_DETACHED),
    ),
    Allow("set_robust_list", 273, "glibc, in a new thread"),
    Allow("rseq", 334, "glibc, in a new thread"),
    Allow("gettid", 186, "CPython, in a new thread"),
    Allow("getpid", 39, "cannot fail, so nobody checks: CPython would take -1 for the answer"),
    Allow("rt_sigprocmask", 14, "glibc, around the start of a thread"),
    Allow("rt_sigreturn", 15, "SIGTERM's handler returns"),
    Allow("rt_sigaction", 13, "glibc, before the first thread; abort() resets SIGABRT's"),
    Allow("restart_syscall", 219, "the kernel, when a stopped process goes on"),
    Allow("clock_gettime", 228, "the clock on hosts whose vDSO cannot tell it"),
    # Of its own address space, which is all that the worker's userfaultfd can reach.
    Allow("ioctl", 16, "guest memory that is not filled yet is registered", Condition(1, (UFFDIO_REGISTER,))),
    Allow("exit", 60, "a thread ends"),
    Allow("exit_group", 231, "the worker ends"),
)

# The pager (devices.pager.main) serves no ring and writes no file: what it shares with workers, and what it
# is for.
_PAGER_SHARES = (
    *("epoll_wait", "read", "write", "preadv2", "preadv", "futex", "recvmsg", "sendmsg", "poll", "close"),
    *("shutdown", "fcntl", "epoll_ctl", "mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "getpid"),
    *("rt_sigreturn", "rt_sigaction", "restart_syscall", "clock_gettime", "exit", "exit_group"),
)
PAGER_ALLOWED = (
    *(entry for entry in ALLOWED if entry.name in _PAGER_SHARES),
    Allow("ioctl", 16, "missing pages are filled", Condition(1, (UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_WAKE))),
)

# (name, number, errno): calls that fail softly, with the error their callers have an answer for.
ABSENT = (
    ("open", 2, ENOENT),
    ("openat", 257, ENOENT),
    ("openat2", 437, ENOENT),
    ("stat", 4, ENOENT),
    ("lstat", 6, ENOENT),
    ("statx", 332, ENOENT),
    ("access", 21, ENOENT),
    ("faccessat", 269, ENOENT),
    ("faccessat2", 439, ENOENT),
    ("readlink", 89, ENOENT),
    ("readlinkat", 267, ENOENT),
    # Its flags are behind a pointer the filter cannot follow; glibc falls back to clone.
    ("clone3", 435, ENOSYS),
)

# Only an intruder makes these.
FATAL = (
    ("execve", 59),
    ("execveat", 322),
    ("fork", 57),
    ("vfork", 58),
    ("ptrace", 101),
    ("process_vm_readv", 310),
    ("process_vm_writev", 311),
    ("pidfd_getfd", 438),
    ("kcmp", 312),
    ("setuid", 105),
    ("setgid", 106),
    ("setreuid", 113),
    ("setregid", 114),
    ("setresuid", 117),
    ("setresgid", 119),
    ("setgroups", 116),
    ("capset", 126),
    ("unshare", 272),
    ("setns", 308),
    ("mount", 165),
    ("umount2", 166),
    ("pivot_root", 155),
    ("chroot", 161),
    ("open_tree", 428),
    ("move_mount", 429),
    ("fsopen", 430),
    ("mount_setattr", 442),
    ("open_by_handle_at", 304),
    ("bpf", 321),
    ("perf_event_open", 298),
    ("userfaultfd", 323),
    ("io_uring_setup", 425),
    ("add_key", 248),
    ("request_key", 249),
    ("keyctl", 250),
    ("init_module", 175),
    ("finit_module", 313),
    ("kexec_load", 246),
    ("kexec_file_load", 320),
    ("modify_ldt", 154),
    ("personality", 135),
)

_sock_filter = struct.Struct("=HBBI")


def _instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return _sock_filter.pack(code, jump_true, jump_false, k)


def _verdict(number: int, verdict: int) -> bytes:
    return _instruction(BPF_JMP_JEQ_K, number, 0, 1) + _instruction(BPF_RET_K, verdict)


def _allow(entry: Allow) -> bytes:
    """The accumulator holds the call's number, and still does when this block is not the one that returns."""
    if entry.condition is None:
        return _verdict(entry.number, SECCOMP_RET_ALLOW)
    condition = entry.condition
    test = _instruction(BPF_LD_W_ABS, DATA_ARGS + 8 * condition.argument)
    test += _instruction(BPF_ALU_AND_K, 0xFFFFFFFF & ~condition.ignore)
    remaining = len(condition.values)
    for value in condition.values:
        remaining -= 1
        test += _instruction(BPF_JMP_JEQ_K, value, remaining + 1, 0)
    test += _instruction(BPF_RET_K, SECCOMP_RET_ERRNO | EPERM)
    test += _instruction(BPF_RET_K, SECCOMP_RET_ALLOW)
    return _instruction(BPF_JMP_JEQ_K, entry.number, 0, len(test) // _sock_filter.size) + test


def assemble(
    allowed: tuple[Allow, ...] = ALLOWED, absent: tuple[tuple[str, int, int], ...] = ABSENT
) -> bytes:
    """The filter as an array of struct sock_filter."""
    kill = _instruction(BPF_RET_K, SECCOMP_RET_KILL_PROCESS)
    program = [
        _instruction(BPF_LD_W_ABS, DATA_ARCH),
        _instruction(BPF_JMP_JEQ_K, AUDIT_ARCH_X86_64, 1, 0),
        kill,  # 32-bit calls (int 0x80) have other numbers
        _instruction(BPF_LD_W_ABS, DATA_NR),
        _instruction(BPF_JMP_JSET_K, X32_SYSCALL_BIT, 0, 1),
        kill,  # and so have the x32 calls
    ]
    program += [_allow(entry) for entry in allowed]
    program += [_verdict(number, SECCOMP_RET_ERRNO | error) for _, number, error in absent]
    program += [_verdict(number, SECCOMP_RET_KILL_PROCESS) for _, number in FATAL]
    program.append(_instruction(BPF_RET_K, SECCOMP_RET_ERRNO | EPERM))
    return b"".join(program)


class sock_fprog(ctypes.Structure):
    __slots__ = ()
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(program: bytes) -> None:
    """Put this thread, and every thread it starts, under `program`, for good. Needs no_new_privs. Raises
    OSError.
    """
    prctl = LIBC["prctl"]
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    arguments = sock_fprog(len(program) // _sock_filter.size, program)
    if prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(arguments), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses the seccomp filter")
