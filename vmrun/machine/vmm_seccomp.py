"""The system calls a confined VMM may make: one table with a reason for each. VMM process.

What is here was found by tracing machines at work (consoles, disks, a disc, agents, pauses, restores from a
snapshot, ends of every kind), and a test takes out each entry and sees something fail
(tests/kvm/test_vmm_syscalls.py). It is longer than a worker's list, for this process has vCPUs, clients and
children. It has none of what opens, makes or names a thing: no file, no socket, no process, no executable
memory. `devices.worker.seccomp` assembles the filter and says what happens to the rest.
"""

import socket
import termios

from devices.pager.userfaultfd import UFFDIO_UNREGISTER
from devices.worker.seccomp import (
    ABSENT as ABSENT_FOR_WORKERS,
)
from devices.worker.seccomp import (
    CLONE_DETACHED,
    CLONE_THREAD_FLAGS,
    ENOENT,
    NOT_EXECUTABLE,
    Allow,
    Condition,
)
from vmrun.kvm import abi

# (name, request, reason), of ioctl(2). KVM's own have their names from linux/kvm.h.
IOCTLS = (
    ("KVM_RUN", abi.KVM_RUN, "the guest runs"),
    ("KVM_GET_REGS", abi.KVM_GET_REGS, "where the guest is, when it fails"),
    ("KVM_GET_VCPU_EVENTS", abi.KVM_GET_VCPU_EVENTS, "an exception is pushed, on a KVM without VMX or SVM"),
    ("KVM_SET_VCPU_EVENTS", abi.KVM_SET_VCPU_EVENTS, "an exception is pushed, on a KVM without VMX or SVM"),
    ("KVM_GET_XSAVE", abi.KVM_GET_XSAVE, "XSAVE is carried out, on a KVM without VMX or SVM"),
    ("KVM_SET_XSAVE", abi.KVM_SET_XSAVE, "XRSTOR is carried out, on a KVM without VMX or SVM"),
    ("KVM_GET_XCRS", abi.KVM_GET_XCRS, "what of it the guest has enabled, on a KVM without VMX or SVM"),
    ("KVM_GET_MSRS", abi.KVM_GET_MSRS, "SYSCALL's registers are read, on a KVM without VMX or SVM"),
    ("KVM_SET_MSRS", abi.KVM_SET_MSRS, "a filtered WRMSR is carried out, on a KVM without VMX or SVM"),
    ("KVM_SET_GUEST_DEBUG", abi.KVM_SET_GUEST_DEBUG, "SYSCALL is finished, on a KVM without VMX or SVM"),
    ("KVM_KVMCLOCK_CTRL", abi.KVM_KVMCLOCK_CTRL, "a pause is not the guest's fault, its watchdogs are told"),
    ("KVM_IRQ_LINE", abi.KVM_IRQ_LINE, "a device raises its interrupt input"),
    ("KVM_IRQFD", abi.KVM_IRQFD, "a vector is bound to its eventfd"),
    ("KVM_SET_GSI_ROUTING", abi.KVM_SET_GSI_ROUTING, "the guest sets up a vector"),
    ("KVM_IOEVENTFD", abi.KVM_IOEVENTFD, "the guest starts a queue, or moves a BAR"),
    ("UFFDIO_UNREGISTER", UFFDIO_UNREGISTER, "all of a snapshot's memory is in"),
    ("FIONBIO", termios.FIONBIO, "a client's socket becomes non-blocking"),
    ("FIONREAD", termios.FIONREAD, "whether a client that went left something unread"),
    ("TCGETS", termios.TCGETS, "the terminal's mode is read, before it is put back at the end"),
    ("TCSETS", termios.TCSETS, "the terminal's mode is put back at the end"),
)


def allowed(pid: int) -> tuple[Allow, ...]:
    """The table, for the process `pid`. The vCPUs' calls come first; see `devices.worker.seccomp.ALLOWED`."""
    return (
        Allow(
            "ioctl",
            16,
            "KVM, and the few that `IOCTLS` lists",
            Condition(1, tuple(request & 0xFFFFFFFF for _, request, _ in IOCTLS)),
        ),
        Allow("futex", 202, "locks between threads, the interpreter's own among them"),
        Allow("read", 0, "eventfds, a terminal, worker's last words, the owner's pipe"),
        Allow("write", 1, "eventfds, the console, its log, messages on stderr"),
        Allow("epoll_wait", 232, "the main loop"),
        Allow("epoll_ctl", 233, "the main loop chooses what it waits for"),
        Allow("poll", 7, "whether a client is gone, a worker ended, a vector pending"),
        Allow("recvmsg", 47, "vhost-user replies; an agent's client"),
        Allow("sendmsg", 46, "vhost-user requests; an agent's client"),
        Allow("recvfrom", 45, "a client of the control socket"),
        Allow("sendto", 44, "a client of the control socket"),
        Allow("accept4", 288, "clients come"),
        Allow("getsockname", 51, "CPython learns the family of a socket"),
        Allow(
            "getsockopt",
            55,
            "who a client is; CPython learns a socket's type and protocol",
            Condition(1, (socket.SOL_SOCKET,)),
        ),
        Allow("shutdown", 48, "a worker's channel, and a client the guest has closed"),
        Allow("close", 3, "clients, eventfds of queues and vectors"),
        Allow("eventfd2", 290, "a queue that starts has its kick and call eventfds"),
        Allow("fstat", 5, "how much memory is used"),
        Allow("newfstatat", 262, "how glibc 2.33 to 2.38 spell fstat", Condition(3, (0x1000,))),
        Allow("pread64", 17, "the console's log is read, for who attaches"),
        Allow("ftruncate", 77, "the console's log begins anew"),
        Allow("lseek", 8, "CPython's buffered files"),
        Allow("getrandom", 318, "virtio-rng"),
        Allow("clock_gettime", 228, "the clock on hosts whose vDSO cannot tell it"),
        Allow("mmap", 9, "thread stacks and the heap: never executable", NOT_EXECUTABLE),
        Allow("munmap", 11, "the heap shrinks, guest memory goes"),
        Allow("mremap", 25, "realloc of a large block"),
        Allow("mprotect", 10, "glibc opens a new heap piece by piece: never executable", NOT_EXECUTABLE),
        Allow("madvise", 28, "a thread's stack is given back; a page of a snapshot is brought in"),
        Allow("brk", 12, "the heap"),
        Allow(
            "clone",
            56,
            "a thread for each vCPU: nothing but a thread",
            Condition(0, (CLONE_THREAD_FLAGS,), ignore=CLONE_DETACHED),
        ),
        Allow("set_robust_list", 273, "glibc, in a new thread"),
        Allow("rseq", 334, "glibc, in a new thread"),
        Allow("gettid", 186, "CPython, in a new thread"),
        Allow("getpid", 39, "status tells it; cannot fail, so nobody checks"),
        Allow("geteuid", 107, "whose clients are let in; cannot fail, so nobody checks"),
        Allow("tgkill", 234, "a vCPU is kicked out of the guest", Condition(0, (pid,))),
        Allow("pidfd_send_signal", 424, "a worker is ended: it holds the pidfds of no others"),
        Allow("waitid", 247, "a worker has ended"),
        Allow("rt_sigprocmask", 14, "glibc, around the start of a thread"),
        Allow("rt_sigreturn", 15, "the handlers of kicks, SIGTERM and SIGINT return"),
        Allow("rt_sigaction", 13, "handlers are put back at the end; CPython's own at exit"),
        Allow("restart_syscall", 219, "the kernel, when a stopped process goes on"),
        Allow("exit", 60, "a thread ends"),
        Allow("exit_group", 231, "the machine has ended"),
    )


# Names of files that the end of a machine removes, if they are there. Its owner removes them.
ABSENT = (*ABSENT_FOR_WORKERS, ("unlink", 87, ENOENT), ("unlinkat", 263, ENOENT))
