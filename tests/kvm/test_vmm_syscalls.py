"""No entry of a confined VMM's table is there for nothing: each one, made fatal, kills a VMM at everyday
work.
"""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.conftest import conformance_guest, disks
from tests.conformance.machines import Devices
from tests.kvm.test_confined import ECHO, NAME, VMM, disk, expect
from vmrun.control import runtime
from vmrun.control.client import MachineClient
from vmrun.host.check import kvm_flavour
from vmrun.machine import vmm_seccomp

__all__ = ["conformance_guest", "disks"]

pytestmark = [pytest.mark.slow, pytest.mark.by_hand, pytest.mark.usefixtures("base")]

Kernel = Callable[[str], Path]
Work = Callable[[str | None], int]

# What a KVM without VMX or SVM leaves to us: the entry of system calls is set, and execution goes there, as
# if by one, where nothing is mapped; the handler of that page fault saves and loads vector state; and there
# is no handler for the breakpoint.
SOFTWARE = """
    mov rdi, 0x300000
    lea rax, handler[rip]
    mov [rdi + 16*14], ax
    mov cx, cs
    mov [rdi + 16*14 + 2], cx
    mov word ptr [rdi + 16*14 + 4], 0x8E00
    shr rax, 16
    mov [rdi + 16*14 + 6], ax
    mov word ptr [rdi + 0x1000], 0xFFF
    mov [rdi + 0x1002], rdi
    lidt [rdi + 0x1000]
    mov ecx, 0xC0000082; xor eax, eax; mov edx, 0x7F00; wrmsr
    mov rsp, 0x340000
    mov rax, 0x7F0000000000
    jmp rax
    handler:
    mov rax, cr4; or eax, 0x40600; mov cr4, rax
    xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv
    mov rdi, 0x310000
    mov eax, 3; xor edx, edx
    xsave64 [rdi]
    xrstor64 [rdi]
    int3
"""
# An instruction that no KVM without VMX or SVM carries out, nor we.
UNKNOWN = "mov rdi, 0x300000; .byte 0x66, 0x0f, 0x38, 0x00, 0x07"

# Which work shows what; all the rest shows in "clients".
WORK = {
    "devices": (
        *("KVM_IRQFD", "KVM_IOEVENTFD", "KVM_SET_GSI_ROUTING", "KVM_IRQ_LINE", "eventfd2", "getrandom"),
        *("recvmsg", "sendmsg"),
    ),
    "software": (
        *("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "KVM_GET_XSAVE", "KVM_SET_XSAVE", "KVM_GET_XCRS"),
        *("KVM_GET_MSRS", "KVM_SET_MSRS", "KVM_SET_GUEST_DEBUG"),
    ),
    "unknown": ("KVM_GET_REGS",),
    "terminal": ("TCGETS", "TCSETS"),
    "restore": ("UFFDIO_UNREGISTER",),
    "stuck": ("pidfd_send_signal",),
}
WORK_OF = {rule: work for work, rules in WORK.items() for rule in rules}

# What only other hosts or moments need: another C library (fstat), a clock the vDSO cannot tell, a stopped
# process that goes on in the middle of a timed wait, a heap that grew, standard output that is a file.
NOT_HERE = {"fstat", "clock_gettime", "restart_syscall", "mremap", "brk", "lseek"}
WORK_ON_SOFTWARE = ("software", "unknown")
ONLY_SOFTWARE = {rule for work in WORK_ON_SOFTWARE for rule in WORK[work]}

NAMES = [entry.name for entry in vmm_seccomp.allowed(0) if entry.name not in {"ioctl", *NOT_HERE}]
NAMES += [name for name, _, _ in vmm_seccomp.IOCTLS]


def start(words: dict[str, Any], fatal: str | None, **options: Any) -> subprocess.Popen[bytes]:
    words = {"name": NAME, **words, **({"fatal": fatal} if fatal is not None else {})}
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options}
    return subprocess.Popen([sys.executable, VMM, json.dumps(words)], stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen[bytes]) -> int:
    """How it ended; what it said is shown if the test fails."""
    try:
        _, errors = process.communicate(timeout=60)
        print(errors.decode())
    finally:
        process.kill()
    return process.returncode


def meet(process: subprocess.Popen[bytes]) -> MachineClient | None:
    """Its client, once it runs. None: it ended."""
    while process.poll() is None:
        if NAME in runtime.running():
            try:
                return MachineClient(NAME)
            except OSError:
                pass
            except Exception:
                if process.poll() is None and NAME not in runtime.running():
                    raise
        time.sleep(0.02)
    return None


def own_the_terminal() -> None:
    """In the child: stdin is its controlling terminal."""
    os.setsid()
    os.close(os.open(os.ttyname(0), os.O_RDWR))


@pytest.fixture
def works(
    bare_kernel: Kernel, tmp_path: Path, conformance_guest: Path, disks: Devices
) -> dict[str, Callable[[str | None], int]]:
    """Each does its work with a confined VMM in which one call is fatal, and returns how that ended."""

    def clients(fatal: str | None) -> int:
        config = {"kernel": str(bare_kernel(ECHO)), "disks": [disk(tmp_path)], "cpus": 2}
        process = start({"config": config}, fatal)
        try:
            serve_clients(process)
        except Exception as error:  # whatever a client says of a VMM that dies
            print(repr(error))
        return finish(process)

    def devices(fatal: str | None) -> int:
        config = {
            "kernel": str(conformance_guest),
            "cmdline": "rng blk",
            "disks": [f"{disks.disk},format=raw,throwaway", f"{disks.read_only_disk},format=raw,ro"],
            "cdrom": str(disks.cdrom),
        }
        return finish(start({"config": config}, fatal))

    def software(fatal: str | None) -> int:
        return finish(start({"config": {"kernel": str(bare_kernel(SOFTWARE))}}, fatal))

    def unknown(fatal: str | None) -> int:
        return finish(start({"config": {"kernel": str(bare_kernel(UNKNOWN))}}, fatal))

    def terminal(fatal: str | None) -> int:
        ours, theirs = pty.openpty()
        config = {"kernel": str(bare_kernel(ECHO))}
        words = {"config": config, "terminal": True}
        process = start(words, fatal, stdin=theirs, stdout=theirs, preexec_fn=own_the_terminal)
        os.close(theirs)
        try:
            read = b""
            while b">" not in read:
                read += os.read(ours, 100)
            os.write(ours, b"\x01x")
            while read:
                read = os.read(ours, 100)
        except OSError:
            pass  # the other end is closed
        code = finish(process)
        os.close(ours)
        return code

    def restore(fatal: str | None) -> int:
        vmrun = [sys.executable, "-m", "vmrun"]
        words = ["boot", "-d", "--name", "first", "--mem", "16M", "--kernel", str(bare_kernel(ECHO))]
        subprocess.run([*vmrun, *words], check=True, timeout=60, stdout=subprocess.DEVNULL)
        with MachineClient("first") as client:
            client.snapshot(tmp_path / "saved", end=True)
        return finish(start({"restore": str(tmp_path / "saved"), "complete": True}, fatal))

    def stuck(fatal: str | None) -> int:
        config = {"kernel": str(bare_kernel(ECHO)), "disks": [disk(tmp_path)]}
        process = start({"config": config}, fatal)
        client = meet(process)
        assert client is not None
        with client:
            worker = client.status().workers["blk0"]
            os.kill(worker, signal.SIGSTOP)
            client.stop(force=True)
        code = finish(process)
        if fatal is not None:
            os.kill(worker, signal.SIGKILL) if Path(f"/proc/{worker}").exists() else None
        return code

    found = (clients, devices, software, unknown, terminal, restore, stuck)
    return {work.__name__: work for work in found}


def serve_clients(process: subprocess.Popen[bytes]) -> None:
    client = meet(process)
    assert client is not None
    with client:
        client.timeout = 5
        with client.console(replay=100) as console:
            expect(console, b">")
            console.send(b"hello" * 500)
            expect(console, b"hello" * 500)
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as agent:
                agent.connect(os.fspath(runtime.base_directory() / NAME / runtime.AGENT))
                agent.send(b"nobody listens")
    with MachineClient(NAME) as client:
        client.timeout = 5
        client.status()
        client.pause()
        client.resume()
    with MachineClient(NAME) as client, client.log() as log:
        log.settimeout(5)
        while log.recv(4096):
            pass
    with MachineClient(NAME) as client:
        client.timeout = 5
        client.stop(force=True)


# How each ends when nothing is fatal.
EXPECTED = {
    "clients": "stopped by force",
    "devices": "the guest wrote 0 to its debug exit",
    "software": "vCPU 0 triple-faulted",
    "unknown": "vCPU 0: KVM cannot emulate the instruction",
    "terminal": "stopped from the console",
    "restore": "all memory is in",
    "stuck": "stopped by force",
}


@pytest.mark.parametrize("work", EXPECTED)
def test_everyday_work(work: str, works: dict[str, Work], capsys: pytest.CaptureFixture[str]) -> None:
    if work in WORK_ON_SOFTWARE and kvm_flavour() != "pvm":
        return  # done on other hosts only
    assert works[work](None) == 0
    assert EXPECTED[work] in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_call_is_needed(name: str, works: dict[str, Work]) -> None:
    if name in ONLY_SOFTWARE and kvm_flavour() != "pvm":
        return  # made on other hosts only
    assert works[WORK_OF.get(name, "clients")](name) == -signal.SIGSYS, f"nothing needs {name}"
