"""The VMM confines itself: once the board is built it gives up all that a machine's life does not take. VMM
process, main thread.

It interprets what the guest does to registers and to the queues of small devices, and what workers and
clients say. Whoever finds a mistake there and takes it over is in the position of a worker: in an empty root
without network, with a user id of its own, without capabilities, with the system calls of
`vmrun.machine.vmm_seccomp`, the descriptors that are open and the guest's memory.

The price: a worker that dies cannot be started again, and so ends the machine; nothing can be opened, so
there are no snapshots and no reset; what would be undone on the host at the end (a bridge left, the runtime
directory removed) is left to the owner. So it is for machines that are thrown away.

Each layer stands by itself, as in `devices.worker.sandbox`; those the host refuses are returned. There is no
PID namespace, for the reason told there. Without root there is no user id of its own, and the namespaces come
with a user namespace, in which the user's own id is all there is.
"""

import importlib
import logging
import os
import resource
import threading
from typing import TYPE_CHECKING

from devices.worker import privileges, sandbox, seccomp
from vmrun.errors import EXIT_VMM, UserError
from vmrun.host.console_log import LOG_LIMIT
from vmrun.machine import vmm_seccomp

if TYPE_CHECKING:
    from vmrun.machine.config import MachineConfig
    from vmrun.machine.machine import Machine

logger = logging.getLogger(__name__)

# Descriptors beside those open already: clients, and five for each queue and vector the guest may start.
MORE_DESCRIPTORS = 1024
# Threads beside the vCPUs': the pager's supervisor and what CPython may start.
MORE_THREADS = 8
# Of address space and private memory. A machine at work takes some 30 MiB more than when it starts; each
# thread has a stack of 8 MiB and a heap for which glibc reserves 128 MiB for a moment.
MORE_MEMORY = 256 << 20
THREAD_STACK = 8 << 20
THREAD_HEAP = 128 << 20

# What is imported when it is needed, and could not be then.
IMPORTED_LATER = (
    "calendar",
    "encodings.ascii",
    "encodings.latin_1",
    "linecache",
    "socket",
    "struct",
    "traceback",
    "vmrun.machine.saving",
)

LAYERS = (
    ("limits", "no core dumps; descriptors, threads, memory and logs have a bound", True),
    ("namespaces", "empty network, IPC, UTS, cgroup and mount namespaces", False),
    ("empty root", "the root directory is an empty read-only file system", False),
    ("user id", "a user and group id of its own, no supplementary groups", False),
    ("capabilities", "none, and none to be had", True),
    ("no_new_privs", "nothing it runs can gain privileges; nobody can attach to it", True),
    ("landlock", "no file, no TCP port and no abstract socket can be opened", False),
    ("seccomp", "system calls outside a short list fail or end the machine", True),
)


def check_confinable(config: "MachineConfig") -> None:
    """UserError when the end of such a machine would need what a confined VMM has given up. Before anything
    is done on the host.
    """
    for nic in config.nics:
        if nic.bridge is not None:
            raise UserError(
                f"--nic {nic.tap}: a confined machine cannot leave a bridge when it ends: "
                f"put the tap on {nic.bridge} yourself, and leave out bridge="
            )
        # A tap made for the machine vanishes with its last descriptor, and its addresses with it.
        lent = nic.address is not None or nic.local
        if lent and not nic.user and _is_there(nic.tap):
            raise UserError(
                f"--nic {nic.tap}: a confined machine cannot take an address from a tap that stays: "
                f"give {nic.tap} its address yourself, or name a tap that does not exist yet"
            )


def _is_there(interface: str) -> bool:
    import socket

    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def layers() -> list[tuple[str, str, bool]]:
    """Every layer of a VMM: see `devices.worker.sandbox.granted`."""
    return sandbox.granted("vmrun.machine.confine", "_enter(1)", LAYERS)


def confine(machine: "Machine") -> list[tuple[str, str]]:
    """Give up everything that `machine`'s life does not take, for good. After the board is built and all that
    listens is there, and before any vCPU's thread starts; main thread.

    Returns (layer, why not) for optional layers this host refuses, and logs them. Raises OSError when a
    required layer cannot be had: the machine must not run then.
    """
    for name in IMPORTED_LATER:
        importlib.import_module(name)
    _rehearse()
    for worker in machine.workers.values():
        worker.replaceable = False
    if machine.lazy is not None:
        # Its supervisor is a thread, and what is given up here is given up by threads.
        with machine.lazy.unsupervised():
            refused = _enter(machine.config.cpus)
    else:
        refused = _enter(machine.config.cpus)
    for layer, why in refused:
        logger.info("the VMM is confined without %s: %s", layer, why)
    return refused


def _enter(cpus: int) -> list[tuple[str, str]]:
    if threading.active_count() > 1 or threading.current_thread() is not threading.main_thread():
        raise OSError(0, "the VMM has threads already: they would stay outside its confinement")
    program = seccomp.assemble(vmm_seccomp.allowed(os.getpid()), vmm_seccomp.ABSENT)
    was_root = os.geteuid() == 0
    _limit(cpus)
    return privileges.give_up(
        namespaces=_enter_namespaces if was_root else _enter_user_namespace,
        ids=lambda: _drop_ids(cpus),
        last=_hide,
        files=_landlock,
        calls=lambda: seccomp.install(program),
    )


def _hide() -> None:
    """From debuggers, and so from other processes of the id it has taken."""
    privileges.prctl(privileges.PR_SET_DUMPABLE, 0)


def _landlock() -> None:
    # Its workers are processes outside, whom it must be able to end; whom else, seccomp and its id say.
    privileges.landlock(signals=True)


def _enter_namespaces() -> None:
    privileges.unshare(privileges.NAMESPACES)


def _enter_user_namespace() -> None:
    """With the user's own id in it: otherwise all clients of the control socket would look alike."""
    uid, gid = os.geteuid(), os.getegid()
    privileges.unshare(privileges.NAMESPACES | privileges.CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "wb", buffering=0) as opened:
            opened.write(text.encode())


def _drop_ids(cpus: int) -> None:
    # The very id by which its workers know it (`devices.worker.sandbox`).
    if privileges.drop_ids(privileges.FIRST_ID + os.getpid()):
        privileges.lower_limit(resource.RLIMIT_NPROC, cpus + MORE_THREADS)


def _limit(cpus: int) -> None:
    with open("/proc/self/statm", "rb", buffering=0) as file:
        words = file.read(128).split()
    page = resource.getpagesize()
    mapped, private = int(words[0]) * page, int(words[5]) * page
    threads = cpus + MORE_THREADS
    privileges.lower_limit(resource.RLIMIT_CORE, 0)  # a core file would be a copy of guest memory
    privileges.lower_limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + MORE_DESCRIPTORS)
    privileges.lower_limit(resource.RLIMIT_AS, mapped + MORE_MEMORY + threads * (THREAD_STACK + THREAD_HEAP))
    privileges.lower_limit(resource.RLIMIT_DATA, private + MORE_MEMORY + threads * THREAD_STACK)
    # What it has open to write: its own log and the console's two, whose room is the host's, and disks, to
    # which only workers write. CPython ignores SIGXFSZ: what goes beyond is EFBIG.
    privileges.lower_limit(resource.RLIMIT_FSIZE, LOG_LIMIT)


def _rehearse() -> None:
    """Fail once while modules and codecs can still be loaded: later a lazy import is a second failure."""
    import traceback

    try:
        raise UserError("rehearsal", EXIT_VMM)
    except UserError as error:
        traceback.format_exception(error)
        logger.makeRecord(logger.name, logging.INFO, "", 0, "%s", (str(error),), None).getMessage()
