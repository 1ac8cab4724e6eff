"""The system call table and its filter, judged by a BPF interpreter and by the kernel's own numbers."""

import re
import struct
from pathlib import Path

import pytest

from devices.worker import seccomp
from devices.worker.seccomp import ABSENT, ALLOWED, FATAL, SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, Allow

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
X86_64 = 0xC000003E
I386 = 0x40000003


def verdict(number: int, *arguments: int, arch: int = X86_64) -> int:
    """Run the filter as the kernel does."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    program = list(struct.iter_unpack("=HBBI", seccomp.assemble()))
    accumulator = at = 0
    while True:
        code, jump_true, jump_false, k = program[at]
        at += 1
        if code == seccomp.BPF_LD_W_ABS:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == seccomp.BPF_ALU_AND_K:
            accumulator &= k
        elif code == seccomp.BPF_JMP_JEQ_K:
            at += jump_true if accumulator == k else jump_false
        elif code == seccomp.BPF_JMP_JSET_K:
            at += jump_true if accumulator & k else jump_false
        else:
            assert code == seccomp.BPF_RET_K
            return int(k)


def errno(error: int) -> int:
    return seccomp.SECCOMP_RET_ERRNO | error


def numbers() -> dict[str, int]:
    table = {entry.name: entry.number for entry in ALLOWED}
    table |= {name: number for name, number, _ in ABSENT}
    return table | dict(FATAL)


def test_numbers_are_the_kernels() -> None:
    if not HEADER.exists():
        pytest.skip("needs the kernel's header for x86-64 system call numbers")
    kernel = {name: int(number) for name, number in re.findall(r"__NR_(\w+)\s+(\d+)", HEADER.read_text())}
    table = numbers()
    # A kernel header older than a call does not know it.
    assert {name: kernel.get(name, number) for name, number in table.items()} == table
    assert len(table.keys() & kernel.keys()) > 0.9 * len(table)


def test_no_call_is_judged_twice() -> None:
    assert len(set(numbers().values())) == len(ALLOWED) + len(ABSENT) + len(FATAL)


def test_every_allowed_call_has_a_reason() -> None:
    assert all(len(entry.reason) > 5 for entry in ALLOWED)


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda entry: entry.name)
def test_allowed_calls(entry: Allow) -> None:
    condition = entry.condition
    if condition is None:
        assert verdict(entry.number, *[0xFFFFFFFFFFFFFFFF] * 6) == SECCOMP_RET_ALLOW
        return
    for value in condition.values:
        arguments = [0] * 6
        arguments[condition.argument] = value
        assert verdict(entry.number, *arguments) == SECCOMP_RET_ALLOW
        arguments[condition.argument] = value ^ (1 << 31)
        expected = SECCOMP_RET_ALLOW if condition.ignore >> 31 else errno(1)
        assert verdict(entry.number, *arguments) == expected


def test_soft_and_fatal_calls() -> None:
    for _, number, error in ABSENT:
        assert verdict(number) == errno(error)
    for _, number in FATAL:
        assert verdict(number) == SECCOMP_RET_KILL_PROCESS


def test_everything_else_is_refused() -> None:
    known = set(numbers().values())
    for number in range(600):
        if number not in known:
            assert verdict(number) == errno(1)


def test_other_architectures_and_x32_are_fatal() -> None:
    for number in (0, 1, 3, 39, 231):
        assert verdict(number, arch=I386) == SECCOMP_RET_KILL_PROCESS
        assert verdict(number | 0x40000000) == SECCOMP_RET_KILL_PROCESS


def test_argument_checks() -> None:
    call = {entry.name: entry.number for entry in ALLOWED}
    read_write = 3
    assert verdict(call["mmap"], 0, 4096, read_write) == SECCOMP_RET_ALLOW
    assert verdict(call["mmap"], 0, 4096, read_write | 4) == errno(1)
    assert verdict(call["mprotect"], 0, 4096, 4) == errno(1)
    # A fork, a thread, and a "thread" in a new user namespace.
    assert verdict(call["clone"], 0x01200011) == errno(1)
    assert verdict(call["clone"], 0x3D0F00) == SECCOMP_RET_ALLOW
    assert verdict(call["clone"], 0x3D0F00 | 0x10000000) == errno(1)
    assert verdict(call["newfstatat"], 3, 0, 0, 0) == errno(1)
    f_setown = 8
    assert verdict(call["fcntl"], 0, f_setown) == errno(1)


def test_a_worker_cannot_make_the_vmms_eventfds_blocking() -> None:
    """They are one open file on both sides: a blocking read of an empty one would hold the main loop."""
    fcntl, f_setfl, ioctl = 72, 4, 16
    fionbio, tiocsti = 0x5421, 0x5412
    assert verdict(fcntl, 5, f_setfl) == errno(1)
    assert verdict(ioctl, 5, fionbio) == verdict(ioctl, 5, tiocsti) == errno(1)
