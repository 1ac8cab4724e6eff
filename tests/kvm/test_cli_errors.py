"""What users get wrong: one clear line, the documented exit code, nothing left behind. For real."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from devices.block.qcow2_create import create_qcow2
from vmrun.errors import EXIT_IMAGE, EXIT_NO_KVM, EXIT_PANIC, EXIT_TIMEOUT, EXIT_USAGE, EXIT_VMM

Boot = Callable[..., "subprocess.CompletedProcess[str]"]


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Run `vmrun boot` and hold its promise: one line, and nothing left."""
    before = links()

    def do(*arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
        command = [*options.pop("prefix", ()), sys.executable, "-m", "vmrun", "boot", *map(str, arguments)]
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )

    yield do
    assert links() == before


@pytest.fixture
def kernel(bare_kernel: Callable[[str], Path]) -> Path:
    """A guest that spins."""
    return bare_kernel("spin: jmp spin")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    with path.open("wb+") as file:
        create_qcow2(file.fileno(), 1 << 20)
    return path


def check(result: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.startswith("vmrun: this KVM has no")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("vmrun: ")
    for word in words:
        assert word in lines[0]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr


def test_disk_missing(boot: Boot, kernel: Path, tmp_path: Path) -> None:
    check(boot("--kernel", kernel, "--disk", tmp_path / "no.qcow2"), EXIT_IMAGE, "no.qcow2", "no such file")


def test_not_a_qcow2(boot: Boot, kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "fake.qcow2"
    path.write_bytes(b"this is not an image" * 1000)
    check(boot("--kernel", kernel, "--disk", path), EXIT_IMAGE, "fake.qcow2", "not a qcow2")


def test_backing_file_missing(boot: Boot, kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "top.qcow2"
    with path.open("wb") as file:
        create_qcow2(file.fileno(), 1 << 20, backing_file="base.raw", backing_format="raw")
    check(boot("--kernel", kernel, "--disk", path), EXIT_IMAGE, "base.raw", "no such file", "top.qcow2")


def test_damaged_qcow2(boot: Boot, kernel: Path, disk: Path) -> None:
    """Beyond the header, it is the worker that finds out."""
    with disk.open("r+b") as file:
        file.seek(1 << 16)  # the refcount table
        file.write(b"\xff" * 8)
    check(boot("--kernel", kernel, "--disk", disk), EXIT_IMAGE, "blk0")


def test_format_unknown(boot: Boot, kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    check(boot("--kernel", kernel, "--disk", path), EXIT_USAGE, "format=")


def test_disk_in_use(boot: Boot, kernel: Path, disk: Path) -> None:
    command = [sys.executable, "-m", "vmrun", "boot", "--kernel", kernel, "--disk", disk, "--timeout", "60s"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 30
        while not subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, check=False).stdout:
            assert time.monotonic() < deadline, "the first vmrun starts no worker"
            time.sleep(0.05)
        check(boot("--kernel", kernel, "--disk", disk), EXIT_IMAGE, "in use")
        first.kill()
    assert not workers_of(first.pid)


def workers_of(pid: int) -> set[int]:
    """Workers of a killed vmrun, given a moment to die with it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = set()
        for process in psutil.process_iter(["cmdline", "pid"]):
            if f"parent={pid}" in (process.info["cmdline"] or ()):
                left.add(process.info["pid"])
        if not left:
            return left
        time.sleep(0.05)
    return left


def test_read_only_file(boot: Boot, kernel: Path, disk: Path) -> None:
    disk.chmod(0o444)
    check(boot("--kernel", kernel, "--disk", disk), EXIT_IMAGE, "disk.qcow2", "ro")


def test_not_a_kernel(boot: Boot, disk: Path) -> None:
    check(boot("--kernel", disk), EXIT_IMAGE, "not a kernel")


def test_kernel_missing(boot: Boot, tmp_path: Path) -> None:
    check(boot("--kernel", tmp_path / "vmlinuz"), EXIT_IMAGE, "vmlinuz")


def test_memory_too_small(boot: Boot, bare_kernel: Callable[[str], Path]) -> None:
    path = bare_kernel("spin: jmp spin; .bss; .skip 64 << 20")
    check(boot("--kernel", path, "--mem", "16M"), EXIT_IMAGE, "MiB")


def test_mem_nonsense(boot: Boot, kernel: Path) -> None:
    check(boot("--kernel", kernel, "--mem", "lots"), EXIT_USAGE, "--mem")
    check(boot("--kernel", kernel, "--mem", "1K"), EXIT_USAGE, "--mem")


def test_cpus_nonsense(boot: Boot, kernel: Path) -> None:
    check(boot("--kernel", kernel, "--cpus", "0"), EXIT_USAGE, "--cpus")


def test_tap_name_too_long(boot: Boot, kernel: Path) -> None:
    check(boot("--kernel", kernel, "--nic", "a-name-of-sixteen"), EXIT_USAGE, "15")


def test_mac_malformed(boot: Boot, kernel: Path) -> None:
    check(boot("--kernel", kernel, "--nic", "tap0,mac=52:54:00"), EXIT_USAGE, "mac=52:54:00")


@pytest.mark.root
def test_no_cap_net_admin(boot: Boot, kernel: Path) -> None:
    drop = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    check(boot("--kernel", kernel, "--nic", "tap0", prefix=drop), EXIT_USAGE, "CAP_NET_ADMIN")


@pytest.mark.root
def test_no_kvm(boot: Boot, kernel: Path) -> None:
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh"]
    check(boot("--kernel", kernel, prefix=hide), EXIT_NO_KVM, "/dev/kvm")


@pytest.mark.root
def test_no_permission_for_kvm(boot: Boot, kernel: Path, tmp_path: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.fail("setpriv is missing (Debian: util-linux)")
    # Root opens everything: without its rights over files, /dev/kvm's mode counts.
    script = 'touch "$0"/kvm; chmod 0 "$0"/kvm; mount --bind "$0"/kvm /dev/kvm && shift 0 && exec "$@"'
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    hide = ["unshare", "--mount", "sh", "-c", script, str(tmp_path), *drop]
    check(boot("--kernel", kernel, prefix=hide), EXIT_NO_KVM, "/dev/kvm")


def test_timeout(boot: Boot, kernel: Path) -> None:
    check(boot("--kernel", kernel, "--timeout", "0.3s"), EXIT_TIMEOUT, "timed out")


def test_a_guest_that_exits(boot: Boot, bare_kernel: Callable[[str], Path]) -> None:
    path = bare_kernel("mov dx, 0x501; mov al, 42; out dx, al; spin: jmp spin")
    assert boot("--kernel", path).returncode == 42


def test_what_the_guest_prints_comes_out(boot: Boot, bare_kernel: Callable[[str], Path]) -> None:
    path = bare_kernel(
        "lea rsi, text[rip]; mov ecx, 6; mov dx, 0x3F8; rep outsb; mov dx, 0x604; mov ax, 0x3400; out dx, ax;"
        'spin: jmp spin; text: .ascii "hello\\n"'
    )
    result = boot("--kernel", path)
    assert (result.returncode, result.stdout) == (0, "hello\n")


def test_a_triple_fault(boot: Boot, bare_kernel: Callable[[str], Path]) -> None:
    check(boot("--kernel", bare_kernel("ud2")), EXIT_PANIC, "triple")


def test_unemulatable_code_names_itself(boot: Boot, bare_kernel: Callable[[str], Path]) -> None:
    """Where the kernel is interpreted an unknown instruction ends the machine; elsewhere it runs."""
    from vmrun.host.check import kvm_flavour

    path = bare_kernel("vpaddd zmm1, zmm2, zmm3; mov dx, 0x501; mov al, 7; out dx, al; spin: jmp spin")
    result = boot("--kernel", path)
    if kvm_flavour() == "pvm":
        check(result, EXIT_VMM, "62 f1")
    else:
        assert result.returncode in (7, 67)
