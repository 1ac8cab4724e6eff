"""The sandbox from the inside: real processes enter it and then try what an intruder would."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devices.worker import sandbox

STUB = """
import sys
sys.path[0:0] = [{root!r}]
import _thread, ctypes, errno, json, mmap, os, select, _socket
from devices.worker import sandbox
libc = ctypes.CDLL(None, use_errno=True)
report = {{}}
def attempt(name, action):
    try:
        report[name] = action()
    except OSError as error:
        report[name] = errno.errorcode.get(error.errno, str(error))
def call(number, *arguments):
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(word) for word in arguments]) < 0:
        raise OSError(ctypes.get_errno(), "")
    return "done"
{before}
report["refused"] = sandbox.enter({keep}, {parent}, {enter})
{after}
os.write(1, json.dumps(report, default=str).encode())
os._exit(0)
"""


Running = subprocess.Popen[bytes]


def interpreter(user: int | None) -> str:
    """This Python, or the system's when it lies where another user cannot get at it (in root's home, say)."""
    ours = os.path.realpath(sys.executable)
    reachable = all(parent.stat().st_mode & 0o1 for parent in (Path(ours), *Path(ours).parents))
    return ours if user is None or reachable else "/usr/bin/python3"


def start(
    after: str,
    before: str = "",
    keep: str = "(1, 2)",
    parent: str = "None",
    enter: str = "",
    **options: Any,
) -> Running:
    """`enter` are more arguments of `sandbox.enter`."""
    program = STUB.format(
        root=sandbox.package_root(), before=before, after=after, keep=keep, parent=parent, enter=enter
    )
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(
        [interpreter(options.get("user")), "-I", "-S", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def inside(after: str, before: str = "", keep: str = "(1, 2)", **options: Any) -> Any:
    """What `after`, run in the sandbox, put into `report`."""
    with start(after, before, keep, **options) as process:
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors.decode()
    return json.loads(output)


ATTEMPTS = """
attempt("open", lambda: os.open("/etc/passwd", os.O_RDONLY))
attempt("create", lambda: os.open("/tmp/x", os.O_RDWR | os.O_CREAT))
attempt("listdir", lambda: os.listdir("/"))
attempt("stat", lambda: os.stat("/"))
attempt("socket", lambda: _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM))
attempt("unix socket", lambda: _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM))
attempt("socketpair", lambda: _socket.socketpair())
attempt("fork", lambda: os.fork())
attempt("executable memory", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close())
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("kill itself", lambda: os.kill(os.getpid(), 0))
attempt("chmod", lambda: os.chmod("/", 0o777))
attempt("link", lambda: os.link("/a", "/b"))
attempt("prctl", lambda: call(157, 4, 1))
attempt("seccomp", lambda: call(317, 1, 0, 0))
attempt("prlimit", lambda: call(302, os.getppid(), 7, 0, 0))
attempt("blocking", lambda: os.set_blocking(os.eventfd(0, os.EFD_NONBLOCK), True))
attempt("tty", lambda: os.isatty(1))
"""


def test_what_an_intruder_tries_fails() -> None:
    report = inside(ATTEMPTS)
    absent = dict.fromkeys(("open", "create", "listdir"), "ENOENT")
    refused = dict.fromkeys(
        (
            "stat",
            "socket",
            "unix socket",
            "socketpair",
            "fork",
            "executable memory",
            "kill",
            "kill itself",
            "chmod",
            "link",
            "prctl",
            "seccomp",
            "prlimit",
            "blocking",
        ),
        "EPERM",
    )
    del report["refused"]
    assert report == absent | refused | {"tty": False}


def test_the_same_attempts_succeed_outside() -> None:
    """Otherwise the test above would prove nothing."""
    outside = "\n".join(
        line for line in ATTEMPTS.splitlines() if not re.search("fork|create|chmod|link|prctl|seccomp", line)
    )
    report = inside("", before=outside)
    for name in ("open", "socket", "unix socket", "executable memory", "kill", "prlimit"):
        assert report.get(name) not in ("ENOENT", "EPERM"), name


@pytest.mark.parametrize(
    "intrusion",
    [
        pytest.param('os.execv("/bin/true", ["true"])', id="execve"),
        pytest.param("call(101, 0, 0, 0, 0)", id="ptrace"),
        pytest.param("os.setresuid(0, 0, 0)", id="setresuid"),
        pytest.param("libc.unshare(0x10000000)", id="unshare"),
        pytest.param('os.chroot("/")', id="chroot"),
        pytest.param("call(425, 8, 0)", id="io_uring_setup"),
        pytest.param("call(323, 0)", id="userfaultfd"),
        pytest.param("call(310, os.getppid(), 0, 0, 0, 0, 0)", id="process_vm_readv"),
        pytest.param("call(39 | 0x40000000)", id="x32"),
    ],
)
def test_what_only_an_intruder_does_kills(intrusion: str) -> None:
    with start(f"os.write(1, b'in'); attempt('it', lambda: {intrusion})") as process:
        output, errors = process.communicate(timeout=30)
    assert (output, process.returncode) == (b"in", -signal.SIGSYS), errors.decode()


def test_only_the_kept_descriptors_are_open() -> None:
    report = inside(
        "report['open'] = [fd for fd in range(100) if not libc.fcntl(fd, 1) < 0]",
        before="for _ in range(9): os.dup(2)\nos.dup2(2, 70)\nos.dup2(2, 7)",
        keep="(1, 2, 7)",
    )
    assert report["open"] == [1, 2, 7]


def test_a_kept_descriptor_must_be_open() -> None:
    with start("", keep="(1, 2, 50)") as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"Bad file descriptor" in errors


def test_a_thread_outside_is_refused() -> None:
    thread = """
ready, forever = _thread.allocate_lock(), _thread.allocate_lock()
ready.acquire(), forever.acquire()
_thread.start_new_thread(lambda: (ready.release(), forever.acquire()), ())
ready.acquire()
"""
    with start("", before=thread) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"a thread was started before the sandbox" in errors


def test_what_a_worker_needs_works() -> None:
    report = inside(
        """
lock = _thread.allocate_lock(); lock.acquire()
_thread.start_new_thread(lock.release, ())
report["thread"] = lock.acquire(True, 10)
memory = mmap.mmap(ram, 4096, flags=mmap.MAP_SHARED)
view = memoryview(memory)
report["written"] = os.pwritev(image, [view[:512]], 512)
report["read"] = os.preadv(image, [view[512:1024]], 512)
os.fdatasync(image)
os.ftruncate(image, 1 << 20)
report["size"] = os.fstat(image).st_size
with select.epoll() as epoll:
    fd = os.eventfd(1)
    epoll.register(fd, select.EPOLLIN)
    report["event"] = epoll.poll(10) == [(fd, select.EPOLLIN)]
bytearray(100 << 20)
try:
    os.pread(-1, 1, 0)
except OSError as error:
    report["error"] = str(error)
""",
        before="""
ram = os.memfd_create("ram"); os.ftruncate(ram, 4096)
image = os.memfd_create("image")
""",
        keep="(1, 2, ram, image)",
    )
    del report["refused"]
    assert report == {
        "thread": True,
        "written": 512,
        "read": 512,
        "size": 1 << 20,
        "event": True,
        "error": "[Errno 9] Bad file descriptor",
    }


def status_of(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


@contextmanager
def waiting(user: int | None = None) -> Iterator[tuple[Running, list[list[str]]]]:
    """A process in the sandbox that waits for its input to end, and the layers it could not have."""
    with start(
        "os.write(1, json.dumps(report['refused']).encode() + b'\\n'); os.read(0, 1)",
        keep="(0, 1, 2)",
        parent=str(os.getpid()),
        stdin=subprocess.PIPE,
        user=user,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, errors = process.communicate(timeout=30)
            raise AssertionError(errors.decode())
        yield process, json.loads(line)
        _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()


def check_common_state(process: Running) -> None:
    status = status_of(process.pid)
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[capabilities], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    with open(f"/proc/{process.pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"] == [str(sandbox.MAX_DESCRIPTORS)] * 2


@pytest.mark.root
def test_root_becomes_nobody_in_an_empty_place() -> None:
    with waiting() as (process, refused):
        assert refused == []
        check_common_state(process)
        status = status_of(process.pid)
        own = str(sandbox.FIRST_WORKER_ID + process.pid)
        # The saved id is what a confined VMM has, whose signals are to arrive.
        killer = str(sandbox.FIRST_WORKER_ID + os.getpid())
        assert status["Uid"].split() == [own, own, killer, own]
        assert status["Gid"].split() == [own] * 4
        assert status["Groups"].split() == []
        assert int(status["CapBnd"], 16) == 0
        check_empty_place(process)


@pytest.mark.root
def test_without_root_the_place_is_as_empty() -> None:
    user = 54321
    with waiting(user=user) as (process, refused):
        # Everything but the id, if this host lets users have user namespaces.
        assert "user id" in dict(refused)
        check_common_state(process)
        assert status_of(process.pid)["Uid"].split() == [str(user)] * 4
        if "namespaces" not in dict(refused):
            check_empty_place(process)


def check_empty_place(process: Running) -> None:
    root = f"/proc/{process.pid}"
    assert os.listdir(f"{root}/root/") == []
    assert set(os.listdir(f"{root}/fd")) == {"0", "1", "2"}
    for namespace in ("net", "mnt", "ipc", "uts", "cgroup"):
        assert os.readlink(f"{root}/ns/{namespace}") != os.readlink(f"/proc/self/ns/{namespace}")
    with open(f"{root}/mounts") as file:
        (mount,) = file.read().splitlines()
    assert mount.startswith("none / tmpfs ro,nosuid,nodev,noexec")
    with open(f"{root}/net/dev") as file:
        interfaces = [line.split(":")[0].strip() for line in file.read().splitlines()[2:]]
    assert interfaces == ["lo"]


def test_it_dies_with_its_parent() -> None:
    """A parent that starts a sandboxed child, says so, and is killed."""
    child = STUB.format(
        root=sandbox.package_root(),
        before="",
        after="os.write(1, b'%d\\n' % os.getpid()); os.read(0, 1)",
        keep="(0, 1, 2)",
        parent="os.getppid()",
        enter="",
    )
    program = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-I', '-S', '-c', {child!r}]).wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            parent.wait(30)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(30_000), "the worker outlived its parent"
        finally:
            os.close(pidfd)


def test_an_orphan_does_not_even_start() -> None:
    with start("", parent="1 << 22") as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"the process that started this worker is gone" in errors


def test_layers_for_people() -> None:
    layers = sandbox.layers()
    assert [name for name, _, _ in layers] == [name for name, _, _ in sandbox.LAYERS]
    required = {name for name, _, required in sandbox.LAYERS if required}
    assert required <= {name for name, _, granted in layers if granted}
