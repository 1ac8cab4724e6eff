"""A VMM that has confined itself: what it can still do, and what it cannot."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devices.block.qcow2_create import create_qcow2
from devices.worker.privileges import FIRST_ID
from tests.unit.test_worker_sandbox import interpreter
from vmrun.control import runtime
from vmrun.control.client import MachineClient
from vmrun.errors import EXIT_VMM, UserError
from vmrun.machine import confine
from vmrun.machine.config import MachineConfig, NicConfig

pytestmark = pytest.mark.usefixtures("base")

Kernel = Callable[[str], Path]
Vmm = subprocess.Popen[str]

VMM = Path(__file__).with_name("confined_vmm.py")
NAME = "web"
# Says that it is there, and then back what it is told.
ECHO = """
    mov dx, 0x3f8
    mov al, '>'
    out dx, al
    echo: mov dx, 0x3fd
    in al, dx
    test al, 1
    jz echo
    mov dx, 0x3f8
    in al, dx
    out dx, al
    jmp echo
"""


@contextmanager
def running(**words: Any) -> Iterator[Vmm]:
    """A confined VMM whose guest has begun."""
    words = {"name": NAME, **words}
    with subprocess.Popen(
        [sys.executable, VMM, json.dumps(words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            read = [b""]
            deadline = time.monotonic() + 60
            while not read[0].startswith(b">"):
                if process.poll() is not None:
                    raise AssertionError(process.communicate()[1])
                assert time.monotonic() < deadline
                path = runtime.base_directory() / NAME / runtime.CONSOLE_LOG
                read[0] = path.read_bytes() if path.exists() else b""
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def result(process: Vmm) -> dict[str, Any]:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    answer: dict[str, Any] = json.loads(errors.splitlines()[-1])
    return answer


def disk(tmp_path: Path) -> str:
    path = tmp_path / "x.qcow2"
    with open(path, "w+b") as file:
        create_qcow2(file.fileno(), 1 << 30)
    return f"{path},throwaway"


def worker_pid() -> int:
    with MachineClient(NAME) as client:
        return client.status().workers["blk0"]


def ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(30_000))


def expect(sock: socket.socket, text: bytes) -> None:
    sock.settimeout(30)
    data = b""
    while text not in data:
        piece = sock.recv(4096)
        assert piece, f"the end after {data!r}"
        data += piece


def test_it_lives(bare_kernel: Kernel, tmp_path: Path) -> None:
    """Status, pause, console, an agent's client, the end: all that a machine's life is."""
    with running(config={"kernel": str(bare_kernel(ECHO)), "disks": [disk(tmp_path)]}) as process:
        with MachineClient(NAME) as client:
            assert client.status().pid == process.pid
            client.pause()
            assert client.status().state == "paused"
            client.resume()
            assert client.inspect()["restarts"] == {"blk0": 0}
        with MachineClient(NAME) as client, client.console(replay=100) as console:
            expect(console, b">")
            console.send(b"hello")
            expect(console, b"hello")
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(os.fspath(runtime.base_directory() / NAME / runtime.AGENT))
            agent.send(b"nobody listens")
        with MachineClient(NAME) as client:
            client.stop(force=True)
        assert result(process) == {"refused": [], "code": 143, "reason": "stopped by force"}
    # Its directory is somebody else's to remove.
    assert (runtime.base_directory() / NAME).exists()
    assert runtime.running() == {}
    assert not (runtime.base_directory() / NAME).exists()


@pytest.mark.root
def test_every_thread_is_nobody_in_an_empty_place(bare_kernel: Kernel, tmp_path: Path) -> None:
    config = {"kernel": str(bare_kernel(ECHO)), "disks": [disk(tmp_path)], "cpus": 2}
    with running(config=config) as process:
        threads = sorted(Path(f"/proc/{process.pid}/task").iterdir())
        assert len(threads) >= 3
        for thread in threads:
            text = (thread / "status").read_text()
            status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            own = [str(FIRST_ID + process.pid)] * 4
            assert status["Uid"].split() == status["Gid"].split() == own
            assert status["Groups"].split() == []
            for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[capabilities], 16) == 0, capabilities
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            assert os.listdir(thread / "root") == []
            for namespace in ("net", "mnt", "ipc", "uts", "cgroup"):
                assert os.readlink(thread / "ns" / namespace) != os.readlink(f"/proc/self/ns/{namespace}")
            (mount,) = (thread / "mounts").read_text().splitlines()
            assert mount.startswith("none / tmpfs ro,nosuid,nodev,noexec")
        limits = (Path("/proc") / str(process.pid) / "limits").read_text()
        for limit in (
            *("Max address space", "Max data size", "Max open files", "Max core file size"),
            "Max file size",
        ):
            (line,) = [line for line in limits.splitlines() if line.startswith(limit)]
            assert line[26:].split()[0] != "unlimited", line


AS_USER = """
mknod {place}/kvm c 10 232 && chmod 666 {place}/kvm && mount --bind {place}/kvm /dev/kvm || exit 9
exec setpriv --reuid {user} --regid {user} --clear-groups {python} -B -c "$0" "$1"
"""
# The user's own client asks and stops it, when it has looked at itself.
USER_PROGRAM = """
import json, os, subprocess, sys, time
sys.path[0:0] = {path!r}
from vmrun.control import runtime
from vmrun.control.client import MachineClient
vmm = subprocess.Popen([sys.executable, "-B", "-c", {start!r}, {vmm!r}, sys.argv[1]])
while "web" not in runtime.running() or not (runtime.base_directory() / "web" / "console.log").stat().st_size:
    assert vmm.poll() is None
    time.sleep(0.02)
with MachineClient("web") as client:
    pid = client.status().pid
    print(open(f"/proc/{{pid}}/status").read())
    try:
        os.listdir(f"/proc/{{pid}}/root/")
    except PermissionError:
        print("nobody looks into it")
    client.stop(force=True)
sys.exit(vmm.wait())
"""


@pytest.mark.root
def test_a_user_is_confined_by_a_user_namespace(bare_kernel: Kernel) -> None:
    """All but the user id, and the user's own clients are let in."""
    user = 54321
    paths = [os.fspath(VMM.parent.parent.parent), *[path for path in sys.path if "site-packages" in path]]
    start = (
        f"import runpy, sys; sys.path[0:0] = {paths!r}; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with tempfile.TemporaryDirectory(prefix="vmrun-test-") as place:
        shutil.copy(bare_kernel(ECHO), f"{place}/guest.elf")
        os.chmod(f"{place}/guest.elf", 0o644)
        os.chown(place, user, user)
        program = USER_PROGRAM.format(path=paths, start=start, vmm=os.fspath(VMM))
        words = {"name": NAME, "config": {"kernel": f"{place}/guest.elf"}}
        script = AS_USER.format(place=place, user=user, python=interpreter(user))
        run = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, program, json.dumps(words)],
            env={"VMRUN_RUNTIME": f"{place}/run", "TMPDIR": place, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stderr.splitlines()[-1])
    assert answer["reason"] == "stopped by force"
    refused = {layer for layer, _ in answer["refused"]}
    assert "user id" in refused
    assert "NoNewPrivs:\t1\n" in run.stdout and "Seccomp:\t2\n" in run.stdout
    assert f"Uid:\t{user}\t{user}" in run.stdout and "CapEff:\t0000000000000000" in run.stdout
    assert "nobody looks into it" in run.stdout
    if "namespaces" not in refused:
        assert refused == {"user id"}


def test_a_dead_worker_is_the_end(bare_kernel: Kernel, tmp_path: Path) -> None:
    """Nobody can be started in its place."""
    with running(config={"kernel": str(bare_kernel(ECHO)), "disks": [disk(tmp_path)]}) as process:
        os.kill(worker_pid(), signal.SIGKILL)
        assert result(process) == {
            "refused": [],
            "code": EXIT_VMM,
            "reason": "worker blk0 was killed by signal 9",
        }


@pytest.mark.root
def test_its_workers_die_with_it(bare_kernel: Kernel, tmp_path: Path) -> None:
    """Even one that does nothing any more and has another user id: the signal obeys kill(2)'s rules."""
    with running(config={"kernel": str(bare_kernel(ECHO)), "disks": [disk(tmp_path)]}) as process:
        pid = worker_pid()
        pidfd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGSTOP)
            process.kill()
            assert ended(pidfd), "the worker outlived its VMM"
        finally:
            os.close(pidfd)


def test_a_snapshot_goes_on_confined(bare_kernel: Kernel, tmp_path: Path) -> None:
    """Its memory is brought in by a pager, whose supervisor is a thread of the VMM."""
    vmrun = [sys.executable, "-m", "vmrun"]
    boot = [*vmrun, "boot", "-d", "--name", "first", "--mem", "64M", "--kernel", str(bare_kernel(ECHO))]
    subprocess.run(boot, check=True, timeout=60, stdout=subprocess.DEVNULL)
    with MachineClient("first") as client, client.console(replay=10) as console:
        expect(console, b">")
    subprocess.run(
        [*vmrun, "snapshot", "first", tmp_path / "saved", "--stop"],
        check=True,
        timeout=60,
        capture_output=True,
    )
    with subprocess.Popen(
        [sys.executable, VMM, json.dumps({"name": NAME, "restore": str(tmp_path / "saved")})],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while NAME not in runtime.running():
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                time.sleep(0.02)
            with MachineClient(NAME) as client, client.console() as console:
                console.send(b"again")
                expect(console, b"again")
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                assert "Seccomp:\t2" in (thread / "status").read_text()
            with MachineClient(NAME) as client:
                client.stop(force=True)
            assert result(process)["refused"] == []
        finally:
            process.kill()


def test_a_bridge_is_not_for_a_confined_machine() -> None:
    config = MachineConfig(nics=(NicConfig("tap0", bridge="br0"),))
    with pytest.raises(UserError, match="put the tap on br0 yourself"):
        confine.check_confinable(config)


def test_a_tap_that_stays_is_lent_no_address() -> None:
    """One that is made for the machine is: it vanishes with its address. "lo" is there everywhere."""
    confine.check_confinable(MachineConfig(nics=(NicConfig("new0", address="172.16.0.1/24"),)))
    confine.check_confinable(MachineConfig(nics=(NicConfig("lo"),)))
    for lent in (NicConfig("lo", address="172.16.0.1/24"), NicConfig("lo", local=True)):
        with pytest.raises(UserError, match="give lo its address yourself"):
            confine.check_confinable(MachineConfig(nics=(lent,)))


INTRUDER = """
import ctypes, errno, fcntl, json, mmap, os, signal, socket, sys
sys.path[0:0] = [{root!r}]
from devices.worker import privileges
from vmrun.kvm import abi
from vmrun.machine import confine
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, abi.KVM_CREATE_VM, 0)
parent = os.getppid()
ATTEMPTS = {{
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "socket": lambda: socket.socket(socket.AF_INET),
    "socketpair": lambda: socket.socketpair(),
    "fork": lambda: os.fork(),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close(),
    "memfd": lambda: os.memfd_create("x"),
    "kill": lambda: os.kill(parent, 0),
    "pidfd": lambda: os.pidfd_open(parent),
    "another's thread": lambda: privileges.syscall(234, parent, parent, 0),
    "another VM": lambda: fcntl.ioctl(kvm, abi.KVM_CREATE_VM, 0),
    "another vCPU": lambda: fcntl.ioctl(vm, abi.KVM_CREATE_VCPU, 1),
    "memory": lambda: fcntl.ioctl(vm, abi.KVM_SET_USER_MEMORY_REGION, bytes(32)),
}}
def attempt(what):
    try:
        what()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
if {confined}:
    confine._enter(1)
answer = {{name: attempt(what) for name, what in ATTEMPTS.items() if {confined} or name != "fork"}}
os.write(1, json.dumps(answer).encode())
if {confined}:
    os.execv("/bin/true", ["true"])
"""


@pytest.mark.parametrize("confined", [True, False])
def test_what_an_intruder_tries_fails(confined: bool) -> None:
    """And succeeds where nothing is confined, or this would prove nothing."""
    program = INTRUDER.format(root=os.fspath(VMM.parent.parent.parent), confined=confined)
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=60)
    answer = json.loads(run.stdout)
    if confined:
        assert answer.pop("open") == "ENOENT"
        assert set(answer.values()) == {"EPERM"}, answer
        assert run.returncode == -signal.SIGSYS
    else:
        assert "EPERM" not in answer.values(), answer


def test_a_thread_would_stay_outside(bare_kernel: Kernel) -> None:
    """Nothing was given up when it raises: this very process goes on."""
    import threading

    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        with pytest.raises(OSError, match="has threads already"):
            confine._enter(1)
    finally:
        release.set()
        thread.join()
    assert os.listdir("/")
